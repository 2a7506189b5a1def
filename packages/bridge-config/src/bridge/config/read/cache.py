"""Caches that reading keeps between documents.

They make `from_dict` fast, which reads the same few classes repeatedly. Which fields of a mapping need a closer look
depends only on its keys and the types of its values, and a text in a place of one type has the same meaning until the
registry changes. Measured with the preset llama-3.1-8b as `as_dict` writes it: 210 us with all caches, 320 us without
the plans, 322 us without the texts, 224 us without the classes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from bridge.config.schema.annotations import Choice, Member, Plain, Type
from bridge.config.schema.target import Target

Texts = dict[tuple[int, str], Any]
"""Cache: (id(type), text) -> value."""

Classes = dict[tuple[int, str], Target]
"""Cache: (id(type), `_target_`) -> config class."""


@lru_cache(maxsize=1)
def get_caches(generation: int) -> tuple[Texts, Classes]:
    """Return the caches for live objects; they are new for each generation of the registrations."""
    return {}, {}


class Plan(NamedTuple):
    """How to read mappings of one shape."""

    read: tuple[tuple[str, Type], ...]
    """The fields whose values are converted; all others stay as they are."""

    left_out: tuple[str, ...]
    """The keys that are not read: those such as `_target_`, and fields that the class computes."""

    unknown: tuple[Any, ...]
    required: tuple[str, ...]
    """The required fields that are not there."""

    missing: frozenset[str]
    """All fields that are not there."""

    composed: tuple[str, ...]
    """The fields whose values may contain placeholders, which are built later."""

    in_order: bool
    """Whether the fields are all arguments of the constructor, in its order."""


_CONFIG_KEYS = frozenset({"_target_", "_version_"})
_DOCUMENT_KEYS = _CONFIG_KEYS | {"_builder_", "_omitted_"}


def make_plan(data: dict[str, Any], target: Target, *, is_document: bool) -> Plan:
    """Return how to read mappings of the shape of `data` as a config `target`."""
    heading = _DOCUMENT_KEYS if is_document else _CONFIG_KEYS
    if target.schema is None:
        heading -= {"_version_"}
    given, read, left_out, unknown = [], [], [], []
    for key, value in data.items():
        field = target.fields.get(key)
        if key in heading or (field is not None and not field.init):
            left_out.append(key)
        elif field is None:
            unknown.append(key)
        else:
            given.append(key)
            if type(value) not in field.ready:
                read.append((key, field.type))
    return Plan(
        read=tuple(read),
        left_out=tuple(left_out),
        unknown=tuple(unknown),
        required=tuple(field.name for field in target.fields.values() if field.required and field.name not in data),
        missing=target.init_names - data.keys(),
        composed=(*(key for key, type_ in read if not all(map(_is_plain, type_))), *unknown),
        in_order=not unknown and tuple(given) == target.positional,
    )


def _is_plain(member: Member) -> bool:
    """Return whether the values of `member` contain no placeholders."""
    return isinstance(member, (Plain, Choice))
