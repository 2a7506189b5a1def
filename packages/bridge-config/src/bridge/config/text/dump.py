"""Dump plain data as YAML and JSON text that reads back equal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from bridge.config.errors import ConfigError
from bridge.config.paths import Path, format_path
from bridge.config.text.keys import find_written_key_flaw
from bridge.config.text.limits import MAX_DEPTH, MAX_VALUES
from bridge.config.text.scalars import find_flaw, read_plain

if TYPE_CHECKING:
    from yaml import ScalarNode
    from yaml.representer import SafeRepresenter


def dump_yaml(data: Any) -> str:
    """Return plain data as YAML that reads back equal under YAML 1.2 and 1.1, with every scalar on one line.

    Raises:
        ConfigError: YAML cannot express a value; the message has its path.
    """
    check_writable(data)
    return _dump(data, flow=False)


def dump_flow(data: Any) -> str:
    """Return data that `check_writable` accepts as YAML on one line, for use inside a flow collection."""
    return _dump([data], flow=True)[1:-2]  # in a list, so that PyYAML quotes what is special between brackets


def dump_json(data: Any) -> str:
    """Return plain data as indented JSON. Infinity, which JSON lacks, is written as a call of `float`.

    Raises:
        ConfigError: JSON cannot express a value; the message has its path.
    """
    check_writable(data)
    return json.dumps(_encode_infinity(data), indent=2, ensure_ascii=False)


def check_writable(data: Any) -> None:
    """Check that data can be written and read back.

    Raises:
        ConfigError: a value cannot be written; the message has its path.
    """
    count = 0

    def check(value: Any, path: Path) -> None:
        nonlocal count
        count += 1
        if flaw := find_flaw(value):
            raise ConfigError(f"{format_path(path)} cannot be written: {flaw}")
        if count > MAX_VALUES or len(path) > MAX_DEPTH:  # a collection that contains itself ends here too
            bound = f"more than {MAX_VALUES} values" if count > MAX_VALUES else f"nested more than {MAX_DEPTH} deep"
            raise ConfigError(f"$ cannot be written: {bound}")
        if type(value) is dict:
            for key, item in value.items():
                if flaw := find_written_key_flaw(key):
                    raise ConfigError(f"{format_path(path)} cannot be written: {flaw}")
                check(item, (*path, key))
        elif type(value) in (list, tuple):
            for index, item in enumerate(value):
                check(item, (*path, index))

    check(data, ())


def _encode_infinity(data: Any) -> Any:
    """Return `data` with each infinite number replaced by a call of `float`."""
    if isinstance(data, dict):
        return {key: _encode_infinity(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_encode_infinity(value) for value in data]
    if isinstance(data, float) and math.isinf(data):
        return {"_target_": "builtins.float", "_args_": [str(data)]}
    return data


def _dump(data: Any, *, flow: bool) -> str:
    # PyYAML ends a document that is one plain scalar with "...".
    return str(_load_dumper()(data, default_flow_style=flow)).removesuffix("...\n")


@cache
def _load_dumper() -> Callable[..., Any]:
    """Return PyYAML's `dump` with a safe dumper that writes no aliases and quotes ambiguous text."""
    import yaml  # takes 20 ms, which JSON and `bridge --help` should not pay

    base = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    strict: Any = type("StrictDumper", (base,), {"ignore_aliases": lambda self, data: True})
    strict.yaml_representers = base.yaml_representers | {str: _represent_text}
    return partial(yaml.dump, Dumper=strict, allow_unicode=True, width=2**31 - 1, sort_keys=False)


def _represent_text(dumper: SafeRepresenter, text: str) -> ScalarNode:
    style = None if _is_unambiguous(text) else "'"
    # Double quotes make tabs and line separators visible as escapes and keep the scalar on one line.
    style = style if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _is_unambiguous(text: str) -> bool:
    """Return whether `text` is a string without quotes.

    This covers YAML 1.2 and the booleans y and n of YAML 1.1. PyYAML itself quotes the other special words of 1.1.
    """
    try:
        return isinstance(read_plain(text), str) and text not in ("y", "Y", "n", "N")
    except ValueError:
        return False
