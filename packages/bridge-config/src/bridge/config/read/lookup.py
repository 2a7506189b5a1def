"""What names stand for: the objects of this process, or the descriptions of the table."""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import MISSING
from functools import lru_cache, partial
from itertools import compress
from operator import is_not
from typing import Any

from bridge.config.errors import TargetError
from bridge.config.problems import ReadError, refused
from bridge.config.read.lookup import Lookup
from bridge.config.read.reader import Reader
from bridge.config.schema import registry
from bridge.config.schema.annotations import Class, Instance
from bridge.config.schema.generation import stays_data
from bridge.config.schema.inspection import describe, is_dtype
from bridge.config.schema.names import qualified_name
from bridge.config.schema.table import shipped, shipped_dtypes
from bridge.config.schema.target import Target
from bridge.config.schema.values import EnumMember, Made, Named, Partial

TRANSFORMER_CONFIG = "megatron.core.transformer.transformer_config.TransformerConfig"


class Live:
    """The objects themselves: what was registered, what distributions declare. Makes real configs."""

    def __init__(self) -> None:
        self.texts, self.classes = _read_before(targets.generation())

    def named(self, name: str, *, suggest: bool = True) -> Target:
        if name.startswith("torch.") and (dtype := self.dtype(name)) is not None:
            return describe(dtype)
        return describe(targets.resolve(name, suggest=suggest), name)

    def of(self, member: Instance | Class) -> Target | None:
        return describe(member.cls) if member.cls is not None else None

    def dtype(self, name: str) -> object | None:
        torch = sys.modules.get("torch")
        # vars, not getattr: torch imports modules for the asking.
        found = vars(torch).get(name.removeprefix("torch.")) if torch else None
        return found if is_dtype(type(found)) else None

    def itself(self, target: Target) -> object:
        return target.obj

    def enum_member(self, target: Target, name: str) -> object:
        return target.obj[name]

    def partial(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> object:
        return partial(function, *args, **keywords)

    def without_objects(self, target: Target, value: object) -> World | None:
        return Tables() if stays_data(target.obj, value) else None

    def make(self, target: Target, values: dict[str, Any], *, complete: bool) -> object:
        by_position = tuple(values) == target.positional
        try:
            # By position, Python does not compare 300 names with 300 names.
            made = target.obj(*values.values()) if by_position else target.obj(**values)
        except Exception as error:  # whatever its own checks raise is about these values
            made = _made_anew(target, values) if complete else None
            if made is None:
                said = str(error) or type(error).__name__
                raise refused(f"{target.short_name} refuses these values: {said}") from error
        # A named tuple or typed dict is what its constructor was given.
        if complete and not target.open and not isinstance(made, (tuple, dict)):
            _restore(made, values, target, in_order=by_position)
        return made


class Rehearsal(Live):
    """What `Live` reads, without running a constructor: a stand-in holds the values that one would get."""

    def named(self, name: str, *, suggest: bool = True) -> Target:
        return super().named(name, suggest=False)  # the name is right, and need only be registered

    def partial(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> object:
        return Partial(function, args, keywords)

    def make(self, target: Target, values: dict[str, Any], *, complete: bool) -> object:
        return Made(target, values, () if target.hashed is not None else None)


class Tables:
    """Descriptions, the shipped ones first: the verdict is the same with and without the described libraries."""

    def __init__(self, *, defaults: bool = False) -> None:
        """`defaults`: whether fields that a document leaves out get their defaults."""
        self.texts: dict[tuple[int, str], object] = {}
        self.classes: dict[tuple[int, str], Target] = {}
        self._defaults = defaults

    def named(self, name: str, *, suggest: bool = True) -> Target:
        if name.startswith("torch.") and (dtype := self.dtype(name)) is not None:
            return dtype.target
        if targets.is_registered(name):
            return _by_its_own_name(targets.resolve(name), name)
        if (target := shipped(name)) is not None and not target.nested:
            targets.check_declared(name)
            return target
        return _by_its_own_name(targets.resolve(name, suggest=suggest), name)

    def of(self, member: Instance | Class) -> Target | None:
        name = member.name if isinstance(member, Instance) else member.bound
        found = shipped(name) if name is not None else None
        return found or (describe(member.cls) if member.cls is not None else None)

    def dtype(self, name: str) -> Named | None:
        canonical = shipped_dtypes().get(name.removeprefix("torch."))
        return Named(Target(canonical, "dtype")) if canonical is not None else None

    def itself(self, target: Target) -> object:
        return Named(target)

    def enum_member(self, target: Target, name: str) -> object:
        return EnumMember(target, name)

    def partial(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> object:
        return Partial(function, args, keywords)

    def without_objects(self, target: Target, value: object) -> World | None:
        return None

    def make(self, target: Target, values: dict[str, Any], *, complete: bool) -> object:
        embedded = values.get(target.embeds) if target.embeds else None
        elsewhere = embedded.target.field_names if isinstance(embedded, Made) else frozenset()
        filled = target.init_names - elsewhere if self._defaults else frozenset()
        whole = self._filled(target, values, filled) | values
        compared = None
        if target.hashed is not None:
            known = self._filled(target, values, target.hashed)
            compared = tuple(known.get(name) for name in target.hashed)
        return Made(target, whole, compared)

    def _filled(self, target: Target, values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
        """The values of a config in the order of its fields, those called `names` also where their default counts."""
        reader, filled = Reader(self, {}), {}
        for name, field in target.fields.items():
            if name in values:
                filled[name] = values[name]
            elif name in names and field.default is not MISSING:
                # It may be one that its annotation denies, or the name of what is not registered.
                with suppress(ReadError):
                    filled[name] = reader.value(field.default, field.type)
        return filled


# Deprecated fields that TransformerConfig of megatron-core 0.19.2 turns into others, and then refuses beside them.
_TURNED_INTO = {
    "moe_router_topk_limited_devices": ("moe_router_group_topk", "moe_router_num_groups"),
    "enable_cuda_graph": ("cuda_graph_impl",),
    "external_cuda_graph": ("cuda_graph_impl",),
}


def _made_anew(target: Target, values: dict[str, Any]) -> object | None:
    """The instance with the state `values` of a class that refuses its own state; None if it refuses it rightly."""
    if TRANSFORMER_CONFIG not in target.bases:
        return None
    derived = {name: values[name] for old, new in _TURNED_INTO.items() if values.get(old) for name in new}
    try:
        made = target.obj(**{name: value for name, value in values.items() if name not in derived}) if derived else None
    except Exception:  # these values are refused for other reasons too
        return None
    return made if derived == {name: getattr(made, name, None) for name in derived} else None


def _by_its_own_name(obj: object, name: str) -> Target:
    """The description of what documents call `name`, under the one name that it is written with."""
    return describe(obj, targets.name_of(obj) or name)


def _restore(made: object, values: dict[str, Any], target: Target, *, in_order: bool) -> None:
    """Put back what the constructor of `made` turned into something else.

    Only for a mapping that gives every field, as `as_dict` writes it: that is the state of an object, whose derived
    values may have been changed. A mapping that gives some is a description, and the constructor has the last word.
    """
    state = getattr(made, "__dict__", {})
    now = state.values() if in_order and tuple(state) == target.positional else map(state.get, values)
    changed = compress(values, map(is_not, now, values.values()))
    parameters = getattr(type(made), "__dataclass_params__", None)
    put = object.__setattr__ if parameters and parameters.frozen else setattr
    for name in list(changed):
        value, attribute = values[name], target.fields[name].attribute
        present = getattr(made, attribute)
        if present is not value and not (type(present) is type(value) and present == value):
            put(made, attribute, value)


@lru_cache(maxsize=1)
def _read_before(generation: int) -> tuple[dict[tuple[int, str], object], dict[tuple[int, str], Target]]:
    """What texts and `_target_` were read as, for as long as no name changes what it stands for."""
    return {}, {}


def check_builder(name: str, target: Target, world: World) -> None:
    """Check that documents may name the builder called `name`, and that it builds configs of the class `target`.

    Raises:
        TargetError: it is unknown, no ModelBuilder, or for other configs.
    """
    accepted = targets.accepts(name)
    # Loading what is declared under the name defines the builder, which registers it.
    found = qualified_name(accepted) if accepted else world.named(name).accepts or qualified_name(targets.accepts(name))
    if found is None:
        raise TargetError(f"{name!r} is not a ModelBuilder")
    if found not in target.bases:
        raise TargetError(f"{name} builds {found.rpartition('.')[2]}, not {target.short_name}")
