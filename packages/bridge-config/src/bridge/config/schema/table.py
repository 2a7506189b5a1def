"""Descriptions of what documents may name, and the table of them that is shipped with this package.

The table describes the classes and functions of megatron-core, torch and the Bridge packages, so that documents can be
checked where none of them is installed. It is made from the real ones by `.github/scripts/make_tables.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Literal

from bridge.config.schema.annotations import PYTHON_TYPES, Anything, Plain, Type, from_json, to_json
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
    """The default in its written form; MISSING if there is none, or none that can be written."""

    doc: str = ""
    attribute: str = ""
    """Where an instance keeps the value, if not under the field's name."""

    kept: bool = True
    """Whether instances keep the value; an `InitVar` is for the constructor alone."""

    @cached_property
    def ready(self) -> Kinds:
        """The types whose values may stand here as they are."""
        return ready_for(self.type)


def ready_for(type_: Type) -> Kinds:
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

    shapes: dict[Shape, Any] = field(default_factory=dict, compare=False, repr=False)
    """What readers and writers found out about mappings and instances of one shape, see `shape_of`."""

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


def shape_of(purpose: str, values: dict[str, Any]) -> Shape:
    """The keys of `values` and the types of what they hold: which fields need a closer look depends on these alone."""
    return purpose, tuple(values), tuple(map(type, values.values()))


def remember(target: Target, shape: Shape, found: object) -> None:
    """Keep what was found out about a shape; there are few in a process."""
    if shape not in target.shapes and len(target.shapes) >= _MAX_SHAPES:
        target.shapes.clear()
    target.shapes[shape] = found


MODEL_CONFIG = "bridge.config.model.ModelConfig"


def is_model(target: Target) -> bool:
    """Whether `target` is a ModelConfig class."""
    return MODEL_CONFIG in target.bases


def shipped(name: str) -> Target | None:
    """The description of the thing called `name` (or of the alias `name`) in the table; None if it has none."""
    return _shipped(_table()["aliases"].get(name, name))


def shipped_names() -> Iterator[str]:
    """All names in the table, aliases included."""
    table = _table()
    yield from table["targets"]
    yield from table["aliases"]


def nameable() -> Iterator[str]:
    """The names in the table that documents may use wherever they fit."""
    table = _table()
    return (name for name in shipped_names() if not table["targets"].get(name, {}).get("nested"))


def shipped_aliases() -> dict[str, str]:
    """What each alias of the table stands for."""
    return dict(_table()["aliases"])


def shipped_dtypes() -> dict[str, str]:
    """The dtypes of torch: every name without `torch.`, old ones such as `half` included, and the canonical name."""
    return dict(_table()["dtypes"])


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(files("bridge.config").joinpath("tables.json").read_text(encoding="utf-8"))
    return table


@cache
def _shipped(name: str) -> Target | None:
    entry = _table()["targets"].get(name)
    if entry is None:
        return None
    return target_from_json(name, entry, _shipped(entry["inherits"]) if "inherits" in entry else None)


def target_from_json(name: str, entry: dict[str, Any], parent: Target | None = None) -> Target:
    """The description that `target_to_json` wrote; what it has from `parent` stands there."""
    fields = dict(parent.fields) if parent else {}
    for key, value in entry.get("fields", {}).items():
        fields[key] = _field_from_json(key, value)
    return Target(
        name=name,
        kind=entry["kind"],
        doc=entry.get("doc", ""),
        bases=(name, *entry.get("bases", ())) if entry["kind"] not in ("function", "dtype") else (),
        fields=fields,
        members=tuple(entry.get("members", ())),
        embeds=entry.get("embeds"),
        builder=entry.get("builder"),
        accepts=entry.get("accepts"),
        schema=Schema.from_json(entry["schema"]) if "schema" in entry else None,
        open=entry.get("open", False),
        files=entry.get("files", {}),
        nested=entry.get("nested", False),
        calls=entry.get("calls", False),
        hashed=tuple(entry["hashed"]) if "hashed" in entry else None,
    )


def target_to_json(target: Target, parent: Target | None = None) -> dict[str, Any]:
    """`target` as plain data, without its name and without the fields that it has from `parent`."""
    inherited = parent.fields if parent else {}
    fields = {one.name: _field_to_json(one) for one in target.fields.values() if inherited.get(one.name) != one}
    entry = {
        "kind": target.kind,
        "doc": target.doc,
        "inherits": parent.name if parent else None,
        "bases": list(target.bases[1:]),
        "members": list(target.members),
        "embeds": target.embeds,
        "builder": target.builder,
        "accepts": target.accepts,
        "schema": target.schema.to_json() if target.schema else None,
        "open": target.open,
        "files": target.files,
        "nested": target.nested,
        "calls": target.calls,
        "fields": fields,
    }
    if target.hashed is not None:
        entry["hashed"] = list(target.hashed)
    return {key: value for key, value in entry.items() if value or key == "hashed"}


def _field_from_json(name: str, entry: dict[str, Any]) -> Field:
    return Field(
        name=name,
        type=from_json(entry["type"]),
        required=entry.get("required", False),
        init=entry.get("init", True),
        default=entry.get("default", MISSING),
        doc=entry.get("doc", ""),
        attribute=entry.get("attribute", ""),
        kept=entry.get("kept", True),
    )


def _field_to_json(one: Field) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": to_json(one.type)}
    if one.required:
        entry["required"] = True
    if not one.init:
        entry["init"] = False
    if one.default is not MISSING:
        entry["default"] = one.default
    if one.doc:
        entry["doc"] = one.doc
    if one.attribute:
        entry["attribute"] = one.attribute
    if not one.kept:
        entry["kept"] = False
    return entry
