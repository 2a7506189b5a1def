"""Descriptions of what documents may name: the same from the shipped table and of live classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from functools import cached_property
from typing import Any, Literal

from bridge.config.schema.annotations import PYTHON_TYPES, Anything, Plain, Type
from bridge.config.schema.names import MODEL_CONFIG
from bridge.config.schema.versions import Schema

Kinds = frozenset[type]
Kind = Literal["config", "enum", "function", "dtype", "class", "builder", "value"]
Shape = tuple[str, tuple[str, ...], tuple[type, ...]]
_MAX_SHAPES = 64


@dataclass(frozen=True)
class Field:
    """One field of a config."""

    name: str
    type: Type
    required: bool = False
    init: bool = True
    default: Any = field(default_factory=lambda: MISSING)
    """Of the table: the default in its written form; MISSING if there is none, or none that can be written."""

    make_default: Callable[[], Any] | None = field(default=None, compare=False, repr=False)
    """Of a live class: gives the default itself; its written form is made on demand, see `write.defaults`."""

    doc: str = ""
    attribute: str = ""
    """Where an instance keeps the value, if not under the field's name."""

    kept: bool = True
    """Whether instances keep the value; an `InitVar` is for the constructor alone."""

    @cached_property
    def ready(self) -> Kinds:
        """The types whose values may stand here as they are."""
        return find_ready_types(self.type)


def find_ready_types(type_: Type) -> Kinds:
    """The types whose values may stand as they are in a place of this type."""
    found: set[type] = set()
    for member in type_:
        if isinstance(member, Plain):
            found |= PYTHON_TYPES[member.kind]
        elif isinstance(member, Anything):
            found = found.union(*PYTHON_TYPES.values())
    return frozenset(found)


@dataclass(frozen=True)
class Target:
    """The description of one thing that documents may name."""

    name: str
    kind: Kind
    doc: str = ""
    bases: tuple[str, ...] = ()
    """Dotted names of the classes that it is, or a value is an instance of: its MRO, itself first."""

    fields: dict[str, Field] = field(default_factory=dict)
    """Of a config, in the order of its constructor."""

    members: tuple[str, ...] = ()
    """Names of an enumeration's members."""

    embeds: str | None = None
    """Of a `WriteThrough` config: the field whose config owns the fields that both have."""

    builder: str | None = None
    """Of a model config: the ModelBuilder that its class names."""

    accepts: str | None = None
    """Of a ModelBuilder: the config class that it builds."""

    schema: Schema | None = None
    """Version and changes of the config's form in documents; None if it has no versions."""

    open: bool = False
    """Whether the constructor takes any keyword."""

    files: dict[str, str] = field(default_factory=dict)
    """Fields that name a file which the constructor reads unless another field, named here, holds its content."""

    nested: bool = False
    """Whether the table has it only because annotations name it: documents may name it in those places alone."""

    hashed: tuple[str, ...] | None = None
    """Of a config whose instances have a hash: the fields that they are compared by, none if by identity."""

    calls: bool = False
    """Of a config: whether its instances can be called, and so stand where a function may."""

    obj: Any = field(default=None, compare=False, repr=False)
    """The described object itself; None for a description from the table."""

    positional: tuple[str, ...] = ()
    """The arguments that the constructor takes by position, if it takes all of them so."""

    defaults: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The written defaults of a live class, as far as they were asked for."""

    shapes: dict[Shape, Any] = field(default_factory=dict, compare=False, repr=False)
    """What readers and writers found out about mappings and instances of one shape, see `get_shape`."""

    @property
    def short_name(self) -> str:
        """The name without its module."""
        return self.name.rpartition(".")[2]

    @cached_property
    def field_names(self) -> frozenset[str]:
        """All fields."""
        return frozenset(self.fields)

    @cached_property
    def init_names(self) -> frozenset[str]:
        """The fields that the constructor takes."""
        return frozenset(one.name for one in self.fields.values() if one.init)


def get_shape(purpose: str, values: dict[str, Any]) -> Shape:
    """The keys of `values` and the types of what they hold: which fields need a closer look depends on these alone."""
    return purpose, tuple(values), tuple(map(type, values.values()))


def remember(target: Target, shape: Shape, found: object) -> None:
    """Keep what was found out about a shape; there are few in a process."""
    if shape not in target.shapes and len(target.shapes) >= _MAX_SHAPES:
        target.shapes.clear()
    target.shapes[shape] = found


def is_model(target: Target) -> bool:
    """Whether `target` is a ModelConfig class."""
    return MODEL_CONFIG in target.bases
