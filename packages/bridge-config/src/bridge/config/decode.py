"""From documents to configurations: strictly, all problems at once, and without running anything a document names."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from bridge.config import targets
from bridge.config.errors import ConfigError, DocumentError, OmittedWarning, Problem, TargetError
from bridge.config.model import ModelConfig
from bridge.config.paths import parsed, shown
from bridge.config.reader import Reader, class_named
from bridge.config.refusal import ReadError, below, got, refused

ConfigT = TypeVar("ConfigT", bound=ModelConfig)


def decode_config(data: object, cls: type[ConfigT]) -> ConfigT:
    """The configuration that the document `data` describes.

    Args:
        data: plain data with the class's name under `_target_`. It may also hold live values (a dtype, a function).
        cls: the class that the result must be an instance of.

    Raises:
        DocumentError: lists all that is wrong with `data`.
    """
    try:
        return _document(data, cls)
    except ReadError as error:
        problems = [Problem(shown(path), message) for path, message in error.found]
        raise DocumentError(problems) from error.__cause__
    except RecursionError:
        raise DocumentError([Problem("$", "nested too deeply")]) from None


def _document(data: object, cls: type[ConfigT]) -> ConfigT:
    if not isinstance(data, dict):
        raise refused(f"expected a mapping that describes a {cls.__name__}, got {got(data)}")
    if "_target_" not in data:
        raise refused("missing '_target_': the name of the config's class, such as 'bridge.models.gpt.GPTModelConfig'")
    with below("_target_"):
        found: type[ConfigT] = class_named(data["_target_"], (cls,))
    omitted = _omitted(data)
    body = {key: value for key, value in data.items() if key not in ("_builder_", "_omitted_")}
    omitted[id(body)] = omitted.get(id(data), set())
    config: ConfigT = Reader(omitted).object(body, found)
    with below("_builder_"):
        _take_builder(config, data.get("_builder_"))
    return config


def _take_builder(config: ModelConfig, name: object) -> None:
    """Give `config` the builder that its document names, unless that is its class's own."""
    if name is None or name == getattr(config, "builder", None):
        return
    if not isinstance(name, str):
        raise refused(f"expected the name of a ModelBuilder, got {got(name)}")
    try:
        targets.builder_for(name, config)
    except TargetError as error:
        raise refused(str(error)) from error
    object.__setattr__(config, "builder", name)


def _omitted(data: dict[str, Any]) -> dict[int, set[str]]:
    """The fields that the document says it leaves out, by the identity of the mapping they are missing from."""
    entries = data.get("_omitted_", [])
    fields: dict[int, set[str]] = {}
    try:
        for entry in entries:
            _note_missing(fields, data, entry["path"])
        what = "; ".join(f"{entry['path']} ({entry['reason']})" for entry in entries)
    except (TypeError, KeyError, AttributeError, ConfigError):
        raise refused("expected a list of {path: ..., reason: ...}", "_omitted_") from None
    if entries:
        warnings.warn(f"the document was written without {what}: the defaults are taken", OmittedWarning, stacklevel=5)
    return fields


def _note_missing(fields: dict[int, set[str]], data: dict[str, Any], path: str) -> None:
    """Add to `fields` the first key of `path` that `data` has not got."""
    node: Any = data
    for key in parsed(path):
        if isinstance(node, dict) and isinstance(key, str) and key not in node:
            fields.setdefault(id(node), set()).add(key)
            return
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            return
