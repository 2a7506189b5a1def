"""field_docs.yaml documents every field of megatron-core's configurations and has no stale entries."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("megatron.core")

DOCS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parents[1] / "field_docs.yaml").read_text())


@pytest.mark.parametrize("name", DOCS)
def test_every_field_of_the_class_is_documented_and_none_is_stale(name: str) -> None:
    assert set(DOCS[name]["fields"]) == _declared_fields(_import_class(name))


@pytest.mark.parametrize("name", DOCS)
def test_each_line_is_short_enough_for_a_tooltip(name: str) -> None:
    too_long = {field: line for field, line in DOCS[name]["fields"].items() if not 30 <= len(line) <= 160}
    assert not too_long


def _import_class(name: str) -> type:
    module, _, qualname = name.rpartition(".")
    found: type = getattr(importlib.import_module(module), qualname)
    return found


def _declared_fields(cls: type) -> set[str]:
    """Return the fields that a class declares itself; TransformerConfig includes those of ModelParallelConfig."""
    if cls.__name__ == "TransformerConfig":
        return {field.name for field in dataclasses.fields(cls)}
    if dataclasses.is_dataclass(cls):
        return set(inspect.get_annotations(cls))
    if hasattr(cls, "__members__"):
        return set()
    return {one.name for one in inspect.signature(cls).parameters.values() if one.kind is not one.VAR_KEYWORD}
