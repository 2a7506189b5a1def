"""Plain data as YAML and JSON text that reads back equal."""

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
    """Plain data as YAML text that reads back equal, by YAML 1.2 and by 1.1; every scalar on one line.

    Raises:
        ConfigError: there is something in it that YAML cannot say; with its path.
    """
    check_writable(data)
    return _dump(data, flow=False)


def dump_flow(data: Any) -> str:
    """Writable data as YAML on one line, with brackets and braces, as it may stand among others."""
    return _dump([data], flow=True)[1:-2]


def dump_json(data: Any) -> str:
    """Plain data as indented JSON text. An infinite number, which JSON has not, is written as a call of `float`.

    Raises:
        ConfigError: there is something in it that JSON cannot say; with its path.
    """
    check_writable(data)
    return json.dumps(_encode_infinity(data), indent=2, ensure_ascii=False)


def check_writable(data: Any) -> None:
    """Refuse what no text can say, or what could not be read back.

    Raises:
        ConfigError: says what it is, and its path.
    """
    count = 0

    def check(value: Any, path: Path) -> None:
        nonlocal count
        count += 1
        if flaw := find_flaw(value):
            raise ConfigError(f"{format_path(path)} cannot be written: {flaw}")
        if count > MAX_VALUES or len(path) > MAX_DEPTH:  # what holds itself is among these
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
    """`data` with infinite numbers in the form that documents have for them."""
    if isinstance(data, dict):
        return {key: _encode_infinity(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_encode_infinity(value) for value in data]
    if isinstance(data, float) and math.isinf(data):
        return {"_target_": "builtins.float", "_args_": [str(data)]}
    return data


def _dump(data: Any, *, flow: bool) -> str:
    return str(_load_dumper()(data, default_flow_style=flow)).removesuffix("...\n")


@cache
def _load_dumper() -> Callable[..., Any]:
    """PyYAML's dump by its safe dumper, without aliases for what stands in two places, and strict about text."""
    import yaml  # it takes 20 ms: JSON and `bridge --help` need it not

    base = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    strict: Any = type("StrictDumper", (base,), {"ignore_aliases": lambda self, data: True})
    strict.yaml_representers = base.yaml_representers | {str: _represent_text}
    return partial(yaml.dump, Dumper=strict, allow_unicode=True, width=2**31 - 1, sort_keys=False)


def _represent_text(dumper: SafeRepresenter, text: str) -> ScalarNode:
    style = None if _is_unambiguous(text) else "'"
    # Line separators, tabs and the like are best seen; and a scalar stays on its line.
    style = style if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _is_unambiguous(text: str) -> bool:
    """Whether `text`, written plainly, is text to YAML 1.2, and y and n to 1.1. (The rest of 1.1 PyYAML knows.)"""
    try:
        return isinstance(read_plain(text), str) and text not in ("y", "Y", "n", "N")
    except ValueError:
        return False
