"""Paths into a document: `$.transformer.num_layers` in messages, `transformer.num_layers` on the command line."""

from __future__ import annotations

import json
import re

from bridge.config.errors import ConfigError, quote_name

Path = tuple[str | int, ...]

_STEP = re.compile(r'\.([^.\[\]"]+)|\[([0-9]+)\]|\[("(?:[^"\\]|\\.)*")\]')


def format_path(path: Path) -> str:
    """Return `path` as text, as in `$.transformer.num_layers`."""
    return "$" + "".join(_format_step(step) for step in path)


def parse_path(text: str) -> Path:
    """Parse a path: keys joined by dots, list indices and quoted keys in brackets, optionally with a leading `$`.

    Raises:
        ConfigError: `text` is not a valid path.
    """
    is_rooted = text[:2] in ("$", "$.", "$[")
    rest = text[1:] if is_rooted else text if text[:1] in ("", "[") else f".{text}"
    path: list[str | int] = []
    position = 0
    while position < len(rest):
        step = _STEP.match(rest, position)
        if step is None:
            how = "write it as 'transformer.num_layers' or 'blocks[0].size'"
            raise ConfigError(f"{quote_name(text)} is not a path: {how}")
        path.append(_parse_step(step, text))
        position = step.end()
    return tuple(path)


def _parse_step(match: re.Match[str], text: str) -> str | int:
    key, index, quoted = match.groups()
    try:
        found: str | int = int(index) if index is not None else json.loads(quoted) if quoted is not None else key
    except ValueError as error:
        raise ConfigError(f"{quote_name(text)} is not a path: {error}") from error
    return found


def _format_step(step: str | int) -> str:
    plain = isinstance(step, str) and re.fullmatch(r"[\w-]+", step)
    return f".{step}" if plain else f"[{json.dumps(step)}]"
