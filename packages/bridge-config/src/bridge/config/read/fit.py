"""Checks whether classes, named objects and live values fit an annotation."""

from __future__ import annotations

from typing import is_typeddict

from bridge.config.schema.annotations import Anything, Class, Dtype, Function, Instance, Member
from bridge.config.schema.inspection import describe, is_dtype
from bridge.config.schema.registry import get_document_name
from bridge.config.schema.target import Target
from bridge.config.schema.values import EnumMember, Named, ParsedConfig, Partial


def accepts_instance(member: Member, target: Target) -> bool:
    """Return whether an instance of the class `target` is a value of `member`."""
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
    """Return whether the named object itself is a value of `member`."""
    match member:
        case Anything():
            return True
        case Function():  # configs, builders and enumerations are callable, but not functions
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
    """Return whether `value`, live or not built yet, is a value of `member`."""
    match value:
        case Named(target):
            return accepts_object(target, member)
        case Partial():
            return isinstance(member, (Function, Anything))
        case EnumMember(target) | ParsedConfig(target):
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
            # isinstance raises a TypeError for a typed dict.
            if cls is not None and not is_typeddict(cls):
                return isinstance(value, cls)
            return name in map(get_document_name, type(value).__mro__)
        case _:
            return False


def describe_kind(target: Target) -> str:
    """Describe what a name stands for, for a message."""
    return f"a {target.kind}" if target.kind in ("function", "dtype", "value") else f"the class {target.short_name}"
