"""Find presets: named documents that installed distributions ship.

A distribution declares a package in the entry-point group `bridge.presets`. Each `*.yaml` file in it is a preset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path

from bridge.config.errors import ConfigError, warn

GROUP = "bridge.presets"


@dataclass(frozen=True)
class _Presets:
    """The presets of all installed distributions."""

    files: dict[str, list[Traversable]] = field(default_factory=dict)
    """The files of every preset name."""

    unreadable: list[str] = field(default_factory=list)
    """A line for each distribution whose presets cannot be read: its name, and why."""


def list_presets() -> dict[str, Traversable]:
    """Return the file of every preset by name, sorted. A name with two files is left out.

    Presets that cannot be read give a warning.
    """
    return {name: found[0] for name, found in sorted(_find_presets().files.items()) if len(found) == 1}


def find_preset(name: str) -> Traversable | None:
    """Return the file of a preset, or None. Presets that cannot be read give a warning.

    Raises:
        ConfigError: two presets have the name.
    """
    found = _find_presets().files.get(name, [])
    if len(found) > 1:
        raise ConfigError(
            f"two presets have the name {name!r}: {found[0]} and {found[1]}; give the path of one of them"
        )
    return found[0] if found else None


def list_unreadable() -> list[str]:
    """Return a line for each distribution whose presets cannot be read: its name, and why."""
    return _scan_distributions().unreadable


def _find_presets() -> _Presets:
    presets = _scan_distributions()
    for line in presets.unreadable:
        _warn_once(line)
    return presets


@cache
def _warn_once(line: str) -> None:  # a command looks up presets several times
    warn(line)


def _scan_distributions() -> _Presets:
    presets = _Presets()
    owners = {point.value: point.dist.name if point.dist else point.name for point in entry_points(group=GROUP)}
    for package, owner in sorted(owners.items()):
        try:
            shipped = [file for file in _list_files(package) if file.name.endswith(".yaml")]
        except Exception as error:  # code of the distribution may run, and raise anything
            reason = f"{type(error).__name__}: {error}"
            presets.unreadable.append(f"the presets of {owner} ({package}) cannot be read: {reason}")
            continue
        for file in shipped:
            presets.files.setdefault(file.name.removesuffix(".yaml"), []).append(file)
    return presets


def _list_files(package: str) -> list[Traversable]:
    """Return the files of a package. It is imported only if it is not in a folder, but for example in a zip file."""
    folders: Sequence[Traversable] = _find_folders(package) or [files(package)]
    return [file for folder in folders for file in folder.iterdir()]


def _find_folders(package: str) -> list[Path]:
    """Return the folders of a package: several for a namespace package. Nothing is imported: its parents may be slow.

    `find_spec` imports the parents of a package, so it is called only for the outermost one.
    """
    outermost, *inner = package.split(".")
    spec = find_spec(outermost)
    folders = [Path(place) for place in spec.submodule_search_locations or ()] if spec is not None else []
    for name in inner:
        folders = [folder / name for folder in folders if (folder / name).is_dir()]
        # As Python does: the first folder with __init__.py is the package, else all form a namespace package.
        folders = [folder for folder in folders if (folder / "__init__.py").is_file()][:1] or folders
    return [folder for folder in folders if folder.is_dir()]
