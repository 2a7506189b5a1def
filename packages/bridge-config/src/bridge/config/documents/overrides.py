"""Parse overrides on command lines: `path=value` sets a value, `~path` removes one."""

from __future__ import annotations

import os
import re
from pathlib import Path as FilePath

from bridge.config.documents.sources import SUFFIXES
from bridge.config.errors import ConfigError, quote_name
from bridge.config.paths import parse_path

_PATH = r'[^=\s"./~+-](?:[^=\s"]|"(?:[^"\\]|\\.)*")*'
_ALMOST_AN_OVERRIDE = re.compile(r"(?P<path>[A-Za-z_$][\w.\[\]]*)(?:[:\s]\s*=?\s*(?P<value>.*))?", re.DOTALL)
_OVERRIDE = re.compile(rf"\+{{0,2}}(?P<path>{_PATH})=(?P<value>.*)|~(?P<removed>{_PATH})", re.DOTALL)


def is_override(text: str) -> bool:
    """Return whether a command line argument is an override rather than a file."""
    return _OVERRIDE.fullmatch(text) is not None and not os.path.exists(text)


def suggest_override(text: str) -> str | None:
    """Suggest an override for text such as `num_layers`, `num_layers:8` or `num_layers = 8`."""
    match = _ALMOST_AN_OVERRIDE.fullmatch(text)
    if match is None or FilePath(text).suffix in SUFFIXES:
        return None
    return f"{match['path']}={match['value'] or 'VALUE'}"


def split_override(text: str) -> tuple[str, str | None]:
    """Return the path of an override and the YAML text of its value, which is None for a removal.

    Raises:
        ConfigError: the override is malformed.
    """
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        if "=" in text:
            parse_path(text.partition("=")[0].lstrip("+"))  # what is wrong may be its path
        if suggestion := suggest_override(text):
            raise ConfigError(f"malformed: write {suggestion}, or ~path to remove")
        hint = " (one FILE at a time)" if FilePath(text).suffix in SUFFIXES else ""
        raise ConfigError(f"malformed: write path=value, or ~path to remove{hint}")
    return match["removed"] or match["path"], match["value"]


def describe_override(text: str) -> str:
    """Return the name of an override for problems with its value."""
    return f"override {quote_name(text)}"
