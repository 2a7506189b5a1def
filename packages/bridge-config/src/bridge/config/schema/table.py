"""The shipped table of descriptions, tables.json.

The table describes the classes and functions of megatron-core, torch and the Bridge packages, so that documents can be
checked where none of them is installed. It is made from the real ones by `.github/scripts/make_tables.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING
from functools import cache
from importlib.resources import files
from typing import Any

from bridge.config.schema.annotations import from_json, to_json
from bridge.config.schema.target import Field, Target
from bridge.config.schema.versions import Schema


def get_shipped(name: str) -> Target | None:
    """Return the description of `name`, a name or an alias, from the table; None if it is not there."""
    return _load_shipped(_load_table()["aliases"].get(name, name))


def list_shipped_names() -> Iterator[str]:
    """Yield all names in the table, including aliases."""
    table = _load_table()
    yield from table["targets"]
    yield from table["aliases"]


def list_nameable() -> Iterator[str]:
    """Yield the names in the table that documents may use anywhere, without those of nested classes."""
    table = _load_table()
    return (name for name in list_shipped_names() if not table["targets"].get(name, {}).get("nested"))


def get_shipped_aliases() -> dict[str, str]:
    """Return alias -> full name."""
    return dict(_load_table()["aliases"])


def get_shipped_dtypes() -> dict[str, str]:
    """Return dtype name -> canonical name, both without `torch.`. Old names such as `half` are included."""
    return dict(_load_table()["dtypes"])


@cache
def _load_table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(files("bridge.config").joinpath("tables.json").read_text(encoding="utf-8"))
    return table


@cache
def _load_shipped(name: str) -> Target | None:
    entry = _load_table()["targets"].get(name)
    if entry is None:
        return None
    return target_from_json(name, entry, _load_shipped(entry["inherits"]) if "inherits" in entry else None)


def target_from_json(name: str, entry: dict[str, Any], parent: Target | None = None) -> Target:
    """Return the description that `target_to_json` encoded. `parent` supplies the inherited fields."""
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
    """Return `target` as plain data, without its name and the fields inherited unchanged from `parent`."""
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
