"""Whether a class, a named thing or a live value fits the place that an annotation describes."""

from __future__ import annotations

from typing import is_typeddict

from bridge.config.schema.annotations import Anything, Class, Dtype, Function, Instance, Member
from bridge.config.schema.inspection import describe, is_dtype
from bridge.config.schema.registry import get_document_name
from bridge.config.schema.target import Target
from bridge.config.schema.values import EnumMember, Made, Named, Partial


def accepts_instance(member: Member, target: Target) -> bool:
    """Whether an instance of the class `target` is a value of `member`."""
    match member:
        case Anything():
            return True
        case Instance(name):
            return name in target.bases
        case Function():
            return target.calls
        case _:
            return False


def accepts_object(target: Target, member: Member) -> bool:
    """Whether the named thing itself is a value of `member`."""
    match member:
        case Anything():
            return True
        case Function():  # configs, builders and enumerations can be called too, but are no functions
            return target.kind in ("function", "class")
        case Class(bound):
            is_class = target.kind in ("class", "config", "enum", "builder")
            return is_class and (bound is None or bound in target.bases)
        case Dtype():
            return target.kind == "dtype"
        case Instance(name):
            return target.kind == "value" and name in target.bases
        case _:
            return False


def accepts_value(value: object, member: Member) -> bool:
    """Whether a live value, or a stand-in for one, is a value of `member`."""
    match value:
        case Named(target):
            return accepts_object(target, member)
        case Partial():
            return isinstance(member, (Function, Anything))
        case EnumMember(target) | Made(target):
            return accepts_instance(member, target)
    match member:
        case Anything():
            return True
        case Function():
            return describe(value).kind == "class" if isinstance(value, type) else callable(value)
        case Class(bound):
            return isinstance(value, type) and (bound is None or bound in map(get_document_name, value.__mro__))
        case Dtype():
            return is_dtype(type(value))
        case Instance(name, cls, only):
            if only and getattr(value, "name", None) not in only:
                return False
            # Not every class can be asked: of a typed dict, say, nothing is an instance.
            if cls is not None and not is_typeddict(cls):
                return isinstance(value, cls)
            return name in map(get_document_name, type(value).__mro__)
        case _:
            return False


def describe_kind(target: Target) -> str:
    """What sort of thing a name turned out to stand for."""
    return f"a {target.kind}" if target.kind in ("function", "dtype", "value") else f"the class {target.short_name}"
