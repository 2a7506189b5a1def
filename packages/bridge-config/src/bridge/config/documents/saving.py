"""Write files atomically, and the JSON Schema of a YAML file beside it for editors."""

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
    """Return YAML text with a first line that names the JSON Schema of `target`, if `target` has one."""
    if _MODELINE.search(text) or _make_schema(target) is None:
        return text
    mark = BYTE_ORDER_MARK if text.startswith(BYTE_ORDER_MARK) else ""
    end = "\r\n" if "\r\n" in text else "\n"
    return f"{mark}# yaml-language-server: $schema={_make_schema_name(target)}{end}{text[len(mark) :]}"


def write_schema_beside(file: FilePath, text: str, target: object) -> None:
    """Write the JSON Schema that the text of `file` names beside it, unless it exists.

    Other locations are not searched.
    """
    named = _MODELINE.search(text)
    beside = file.with_name(_make_schema_name(target))
    is_missing = named is not None and named["schema"] == beside.name and not beside.exists()
    if is_missing and (schema := _make_schema(target)) is not None:
        write_file(beside, dump_json(schema) + "\n")


def write_file(file: FilePath, text: str) -> None:
    """Write `text` to a file atomically: on failure, the file is unchanged.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        target = FilePath(os.path.realpath(file))  # replace the target of a link, not the link
        if os.path.exists(target) and not os.path.isfile(target):  # unlike Path, they accept every name
            raise ConfigError(f"{file} cannot be written: not a regular file")
        _replace_file(target, text)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from error


def _replace_file(target: FilePath, text: str) -> None:
    """Write a new file beside `target` and rename it to that name, with the mode of the file before."""
    written = target.with_name(f".{target.name}.{os.urandom(4).hex()}")
    try:
        with written.open("xb") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())  # after a crash, the renamed file must not be empty
        if target.exists():
            shutil.copymode(target, written)
        written.replace(target)
    finally:
        with contextlib.suppress(OSError):
            written.unlink()


def _make_schema(target: object) -> dict[str, Any] | None:
    """Return the JSON Schema of the configuration class `target`, or None."""
    from bridge.config.schema.jsonschema import make_json_schema  # takes 20 ms, needed only for new files

    try:
        return make_json_schema(target) if isinstance(target, str) else None
    except TargetError:  # for example, a class of the running program
        return None


def _make_schema_name(target: object) -> str:
    """Return the file name of the JSON Schema."""
    return f"{str(target).rpartition('.')[2]}.schema.json"
