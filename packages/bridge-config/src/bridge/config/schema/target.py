"""Target: the description of something that documents may name, equal for the shipped table and live classes."""

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
    """From the table: the encoded default; MISSING if there is none, or it cannot be encoded."""

    make_default: Callable[[], Any] | None = field(default=None, compare=False, repr=False)
    """From a live class: returns the default itself. It is encoded on demand, see `write.encoded_defaults`."""

    doc: str = ""
    attribute: str = ""
    """The attribute that holds the value, if its name is not that of the field."""

    kept: bool = True
    """Whether instances keep the value. False for an `InitVar`, which only the constructor sees."""

    @cached_property
    def ready(self) -> Kinds:
        """The Python types whose values need no conversion here."""
        return find_ready_types(self.type)


def find_ready_types(type_: Type) -> Kinds:
    """Return the Python types whose values a field of this type takes without conversion."""
    found: set[type] = set()
    for member in type_:
        if isinstance(member, Plain):
            found |= PYTHON_TYPES[member.kind]
        elif isinstance(member, Anything):
            found = found.union(*PYTHON_TYPES.values())
    return frozenset(found)


@dataclass(frozen=True)
class Target:
    """The description of a class, function, dtype or value that documents may name."""

    name: str
    kind: Kind
    doc: str = ""
    bases: tuple[str, ...] = ()
    """Dotted names of the MRO of a class, itself first; for a value, that of its class."""

    fields: dict[str, Field] = field(default_factory=dict)
    """The fields of a config, in the order of its constructor."""

    members: tuple[str, ...] = ()
    """Names of an enumeration's members."""

    embeds: str | None = None
    """For a `WriteThrough` config: the field with the embedded config, which owns the fields that both have."""

    builder: str | None = None
    """For a model config: the ModelBuilder that its class names."""

    accepts: str | None = None
    """For a ModelBuilder: the config class that it builds."""

    schema: Schema | None = None
    """Schema version of the config and its changes; None if it is not versioned."""

    open: bool = False
    """Whether the constructor takes any keyword."""

    files: dict[str, str] = field(default_factory=dict)
    """Field with the path of a file that the constructor reads -> field that can hold the content instead."""

    nested: bool = False
    """Whether only annotations name it: documents may then name it in fields with such an annotation, nowhere else."""

    hashed: tuple[str, ...] | None = None
    """For a config with hashable instances: the fields they are compared by, empty if by identity. None: unhashable."""

    calls: bool = False
    """For a config: whether its instances are callable, so that they fit where a function does."""

    obj: Any = field(default=None, compare=False, repr=False)
    """The described object; None for a description from the table."""

    positional: tuple[str, ...] = ()
    """Constructor arguments by position; empty if any of them cannot be passed by position."""

    defaults: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Cache of a live class: encoded defaults by field name."""

    shapes: dict[Shape, Any] = field(default_factory=dict, compare=False, repr=False)
    """Cache of readers and writers, by the shape of a mapping or instance, see `get_shape`."""

    @property
    def short_name(self) -> str:
        """The name without its module."""
        return self.name.rpartition(".")[2]

    @cached_property
    def field_names(self) -> frozenset[str]:
        """The names of all fields."""
        return frozenset(self.fields)

    @cached_property
    def init_names(self) -> frozenset[str]:
        """The names of the fields that the constructor takes."""
        return frozenset(one.name for one in self.fields.values() if one.init)


def get_shape(purpose: str, values: dict[str, Any]) -> Shape:
    """Return the cache key of a mapping: its keys and the types of its values decide which fields need conversion."""
    return purpose, tuple(values), tuple(map(type, values.values()))


def cache_shape(target: Target, shape: Shape, found: object) -> None:
    """Cache the result for a shape. A process sees few shapes, so a full cache is simply cleared."""
    if shape not in target.shapes and len(target.shapes) >= _MAX_SHAPES:
        target.shapes.clear()
    target.shapes[shape] = found


def is_model(target: Target) -> bool:
    """Return whether `target` is a ModelConfig class."""
    return MODEL_CONFIG in target.bases
