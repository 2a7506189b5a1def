"""Read, set and remove values in plain data by path."""

from __future__ import annotations

from typing import Any

from bridge.config.errors import ConfigError, did_you_mean
from bridge.config.paths import Path, format_path
from bridge.config.problems import describe_value


def get_value(data: Any, path: Path) -> Any:
    """Return the value at `path`.

    Raises:
        ConfigError: there is no value.
    """
    node = data
    for depth, key in enumerate(path):
        if not _has_item(node, key):
            known = [name for name in node if isinstance(name, str)] if isinstance(node, dict) else []
            raise ConfigError(f"{format_path(path[: depth + 1])} is not in the document{did_you_mean(str(key), known)}")
        node = node[key]
    return node


def set_value(data: Any, path: Path, value: Any) -> None:
    """Set the value at `path`, which must not be empty. Missing mappings are created.

    Raises:
        ConfigError: `path` leads through a value that is not a mapping, or past the end of a list.
    """
    *before, last = path
    node = data
    for depth, key in enumerate(before):
        if isinstance(node, dict) and isinstance(key, str) and node.get(key) is None:
            # null counts as missing. Built before it is attached: on an error, `data` is unchanged.
            node[key] = _nest(path[depth + 1 :], value, format_path(path[: depth + 1]))
            return
        node = _step_into(node, path, depth)
    if not (isinstance(node, dict) and isinstance(last, str)):
        _step_into(node, path, len(before))
    node[last] = value


def remove_value(data: Any, path: Path) -> None:
    """Remove the value at `path`, which must not be empty.

    Raises:
        ConfigError: there is no value.
    """
    get_value(data, path)
    del get_value(data, path[:-1])[path[-1]]


def copy_data(data: Any) -> Any:
    """Return a copy of `data` with new mappings and lists."""
    if isinstance(data, dict):
        return {key: copy_data(value) for key, value in data.items()}
    return [copy_data(value) for value in data] if isinstance(data, list) else data


def _step_into(node: Any, path: Path, depth: int) -> Any:
    """Return the value in `node`, which is at `path[:depth]`, at the next step of `path`."""
    key = path[depth]
    if not _has_item(node, key):
        size = f" of length {len(node)}" if isinstance(node, list) else ""
        raise ConfigError(f"{format_path(path[:depth])} is {describe_value(node)}{size}: there is no {key!r} in it")
    return node[key]


def _has_item(node: Any, key: str | int) -> bool:
    if isinstance(node, dict):
        return key in node
    return isinstance(node, list) and isinstance(key, int) and key < len(node)


def _nest(path: Path, value: Any, above: str) -> Any:
    """Return `value` wrapped in mappings with the keys in `path`. `above` is the path before, for the error."""
    for key in reversed(path):
        if not isinstance(key, str):
            raise ConfigError(f"{above} is not a list, or not in the document: set the whole list")
        value = {key: value}
    return value
