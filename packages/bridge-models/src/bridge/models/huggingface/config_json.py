"""Read config.json, keeping the source positions of its values."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bridge.config.documents.document import Document
from bridge.config.documents.hub_cache import resolve_repository
from bridge.config.documents.sources import STANDARD_INPUT, read_file, suggest_source
from bridge.config.errors import DocumentError, Problem
from bridge.config.problems import describe_value
from bridge.config.text.parse import parse_json


def load_config_json(source: str) -> Document:
    """Read a config.json, from a file, a folder, a repository in the Hugging Face cache (`org/name`) or standard input.

    Python writes infinity as ``Infinity``, which is not JSON: it becomes ``{"__float__": "Infinity"}``, as version 5
    of transformers writes it.

    Raises:
        DocumentError: The file cannot be read, or is not a JSON object.
    """
    file = Path(resolve_repository(source))
    if os.path.isdir(file):  # unlike Path, it accepts every name
        file /= "config.json"
    name = str(file)
    if source != STANDARD_INPUT and not os.path.exists(file):
        raise DocumentError(
            [Problem("$", f"file not found: give a config.json, or a folder with one{suggest_source(name)}", name)]
        )
    text = read_file(name)
    parsed = parse_json(_replace_infinity(text), name)
    if not isinstance(parsed.data, dict):
        raise DocumentError(
            [Problem("$", f"expected a JSON object at the top level, got {describe_value(parsed.data)}", name)]
        )
    return Document.from_text(parsed, name)


# The possessive quantifier and the optional closing quote scan an unterminated string only once.
_TEXT_OR_INFINITY = re.compile(r'"(?:[^"\\]|\\.)*+"?|-?Infinity\b', re.DOTALL)


def _replace_infinity(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        text = match[0]
        return text if text.startswith('"') else f'{{"__float__": "{text}"}}'

    return _TEXT_OR_INFINITY.sub(replace, text)
