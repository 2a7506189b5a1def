"""Public names in code and in documents are independent of the modules that define them.

`public_names.yaml` lists them, with fingerprints that were computed before modules moved.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.config import ModelConfig, TargetError
from bridge.config.canonical import canonicalize, fingerprint
from bridge.config.documents.presets import find_preset
from bridge.config.schema import registry, registry_state
from bridge.config.schema.table import get_shipped

NAMES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("public_names.yaml").read_text())
DISTRIBUTIONS = ("bridge-config", "bridge-builders", "bridge-dist", "bridge-models")
DOCUMENTS: dict[str, Any] = NAMES["documents"]
IN_DOCUMENTS = [name for name in NAMES["entry_points"][registry.GROUP] if "." in name]
REEXPORTS = ("bridge.models.common.base",)
"""Packages whose names are those of others."""
API = Path(__file__).parents[1] / "docs" / "api"
API_ENTRY = re.compile(r"^\.\. (currentmodule|auto\w+|py:data):: (\S+)", re.M)
OTHER_LIBRARIES = ("megatron.core.extensions.transformer_engine.", "transformers.")


def declared(group: str) -> list[EntryPoint]:
    return [point for point in entry_points(group=group) if point.dist and point.dist.name in DISTRIBUTIONS]


@pytest.mark.parametrize("package", NAMES["exports"])
def test_a_package_exports_its_public_names(package: str) -> None:
    module = import_module(package)
    assert sorted(module.__all__) == NAMES["exports"][package]
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert {*module.__all__} <= {*dir(module)}


def list_api_entries() -> list[tuple[str, str, str]]:
    """Return the directive, module and name of each entry in the pages of the API."""
    entries = []
    for page in sorted(API.glob("*.md")):
        module = ""
        for directive, name in API_ENTRY.findall(page.read_text()):
            if directive == "currentmodule":
                module = name
            else:
                entries.append((directive, module, name))
    return entries


def test_the_api_has_one_entry_per_public_name() -> None:
    names = {
        f"{package}.{name}" for package, names in NAMES["exports"].items() for name in names if package not in REEXPORTS
    }
    entries = Counter(f"{module}.{name}" for _, module, name in list_api_entries())
    assert names - entries.keys() == set()
    assert [name for name, count in entries.items() if count > 1] == []


def test_no_entry_of_the_api_is_private_or_empty() -> None:
    for directive, module, name in list_api_entries():
        assert not re.search(r"(^|\.)_", f"{module}.{name}")
        found = getattr(import_module(module), name)
        if not directive.endswith("data"):  # the text of a value is in its source, or on the page
            text = inspect.getdoc(found) or ""
            assert text, f"{module}.{name} has no docstring"
            assert not text.startswith(f"{name}("), f"{module}.{name} has the generated docstring of a dataclass"


@pytest.mark.parametrize("group", NAMES["entry_points"])
def test_entry_points_have_their_public_names(group: str) -> None:
    assert sorted(point.name for point in declared(group)) == NAMES["entry_points"][group]


def test_every_document_name_is_read_and_written_unchanged() -> None:
    for name in IN_DOCUMENTS:
        try:
            found = registry.resolve(name)
        except TargetError:
            found = None
        if found is None:  # None in megatron-core without Transformer Engine
            assert name.startswith(OTHER_LIBRARIES)
            continue
        assert registry.find_document_name(found) == name
        assert not isinstance(found, type) or registry.get_document_name(found) == name


def test_every_bridge_name_is_in_the_table() -> None:
    for name in IN_DOCUMENTS:
        target = get_shipped(name)
        assert target is not None
        assert target.name == name


def test_builder_names_are_read_and_written_unchanged() -> None:
    for name in NAMES["entry_points"]["bridge.rules"]:
        builder = registry.import_builder(name)
        accepts = registry_state.get_accepted_config(builder)
        assert accepts is not None
        assert registry.get_document_name(builder) == accepts.builder == name


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_is_written_as_it_was_read(name: str) -> None:
    given = DOCUMENTS[name]["document"]
    config = ModelConfig.from_dict(given)
    written = config.as_dict()
    assert written["_target_"] == given["_target_"]
    assert written["_builder_"] == given["_builder_"]
    assert written["transformer"]["_target_"] == given["transformer"]["_target_"]
    for field in given.keys() - {"transformer"}:
        assert written[field] == canonicalize(given)[field]
    assert ModelConfig.from_dict(written).as_dict() == written


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document_fingerprints_are_stable(name: str) -> None:
    assert fingerprint(DOCUMENTS[name]["document"]) == DOCUMENTS[name]["fingerprint"]


@pytest.mark.parametrize("name", NAMES["presets"])
def test_preset_fingerprints_are_stable(name: str) -> None:
    file = find_preset(name)
    assert file is not None
    assert fingerprint(yaml.safe_load(file.read_text())) == NAMES["presets"][name]
