"""Saving: files written whole or not at all, and the JSON Schema that editors find beside a YAML file."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path as FilePath
from typing import Any

from bridge.config.errors import ConfigError, TargetError
from bridge.config.text.dump import dump_json
from bridge.config.text.parse import BYTE_ORDER_MARK

_MODELINE = re.compile(r"^\ufeff?#\s*yaml-language-server:(?:\s*\$schema=(?P<schema>\S+))?", re.MULTILINE)


def add_schema_line(text: str, target: object) -> str:
    """The YAML `text` of a new file, with the line that names the JSON Schema of `target` if there is one."""
    if _MODELINE.search(text) or _make_schema(target) is None:
        return text
    mark = BYTE_ORDER_MARK if text.startswith(BYTE_ORDER_MARK) else ""
    end = "\r\n" if "\r\n" in text else "\n"
    return f"{mark}# yaml-language-server: $schema={_make_schema_name(target)}{end}{text[len(mark) :]}"


def write_schema_beside(file: FilePath, text: str, target: object) -> None:
    """Put the JSON Schema that the text of `file` names beside it, unless it is there. Where else it may be is not
    looked.
    """
    named = _MODELINE.search(text)
    beside = file.with_name(_make_schema_name(target))
    is_missing = named is not None and named["schema"] == beside.name and not beside.exists()
    if is_missing and (schema := _make_schema(target)) is not None:
        write_file(beside, dump_json(schema) + "\n")


def write_file(file: FilePath, text: str) -> None:
    """Put `text` into a file: all of it or, where that fails, nothing.

    Raises:
        ConfigError: it cannot be written.
    """
    target = FilePath(os.path.realpath(file))  # a link stays one
    if target.exists() and not target.is_file():
        raise ConfigError(f"{file} cannot be written: not a regular file")
    written = target.with_name(f".{target.name}.{os.urandom(4).hex()}")
    try:
        with written.open("xb") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        if target.exists():
            shutil.copymode(target, written)
        written.replace(target)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            written.unlink()


def _make_schema(target: object) -> dict[str, Any] | None:
    """The JSON Schema of the config that `target` names; None if there is none."""
    from bridge.config.schema.jsonschema import json_schema  # 20 ms that only new files need

    try:
        return json_schema(target) if isinstance(target, str) else None
    except TargetError:  # a class of the running program, say
        return None


def _make_schema_name(target: object) -> str:
    """What the file of the JSON Schema is called."""
    return f"{str(target).rpartition('.')[2]}.schema.json"
