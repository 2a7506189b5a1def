"""Find presets: named documents that installed distributions ship.

A distribution declares a package in the entry-point group `bridge.presets`. Each `*.yaml` file in it is a preset.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable

from bridge.config.errors import ConfigError

GROUP = "bridge.presets"


def list_presets() -> dict[str, Traversable]:
    """Return the file of every preset by name, sorted. A name with two files is left out.

    Raises:
        ConfigError: a declared package is missing.
    """
    return {name: files[0] for name, files in sorted(_find_presets().items()) if len(files) == 1}


def find_preset(name: str) -> Traversable | None:
    """Return the file of a preset, or None.

    Raises:
        ConfigError: two presets have the name, or a declared package is missing.
    """
    found = _find_presets().get(name, [])
    if len(found) > 1:
        raise ConfigError(
            f"two presets have the name {name!r}: {found[0]} and {found[1]}; give the path of one of them"
        )
    return found[0] if found else None


def _find_presets() -> dict[str, list[Traversable]]:
    """Return the files of every preset name."""
    found: dict[str, list[Traversable]] = {}
    for package in sorted({point.value for point in entry_points(group=GROUP)}):
        try:
            shipped = [file for file in files(package).iterdir() if file.name.endswith(".yaml")]
        except (ImportError, OSError) as error:
            raise ConfigError(f"the presets of {package} cannot be read: {error}") from error
        for file in shipped:
            found.setdefault(file.name.removesuffix(".yaml"), []).append(file)
    return found
