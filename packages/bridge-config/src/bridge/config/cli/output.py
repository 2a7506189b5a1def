"""Output of commands, also of those in the packages above: notes, JSON and files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import click

from bridge.config.errors import ConfigError


def print_notes(source: str | Path, notes: Iterable[str]) -> None:
    """Print notes about a file or folder to standard error."""
    for note in notes:
        click.echo(f"{source}: note: {note}", err=True)


def print_written(path: Path) -> None:
    """Tell that an option has written a file or folder, on standard error: standard output may hold JSON."""
    click.echo(f"{path}: written", err=True)


def print_json(data: object) -> None:
    """Print plain data as JSON."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def check_output(file: Path | None, *, force: bool) -> None:
    """Check before the work that its result can be written to a file, which does not exist or may be overwritten.

    Raises:
        ConfigError: It exists, and ``force`` is not set; or the name or its folder allows no file.
    """
    if file is None:
        return
    try:
        folder, exists = os.path.dirname(os.path.realpath(file)), _exists(file)
    except OSError as error:  # such as a name that is too long, or a working directory that is gone
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from error
    if exists and not force:
        raise ConfigError(f"{file}: file exists: give --force to overwrite it, or another name")
    if not os.path.isdir(folder):
        raise ConfigError(f"{file} cannot be written: there is no folder {folder}: create it, or give another name")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{file} cannot be written: no permission to create files in {folder}: give another name")


def _exists(file: Path) -> bool:
    """Return whether there is such a file; unlike `Path.exists`, raise an OSError if there cannot be one."""
    try:
        os.stat(file)
    except FileNotFoundError:
        return False
    return True


def write_output(text: str, file: Path | None) -> None:
    """Write text and a line end to a file atomically, and tell so; or print it if there is none.

    Raises:
        ConfigError: The file cannot be written.
    """
    if file is None:
        click.echo(text)
    else:
        from bridge.config.documents.saving import write_file  # `bridge --help` loads this module

        # As on standard output: names of files in the text may not be UTF-8.
        write_file(file, (text + "\n").encode(errors="backslashreplace").decode())
        print_written(file)
