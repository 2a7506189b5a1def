"""The presets that installed distributions ship: documents known by name.

A distribution declares a package in the entry-point group `bridge.presets`; each `*.yaml` in it is a preset.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable

from bridge.config.errors import ConfigError

GROUP = "bridge.presets"


def presets() -> dict[str, Traversable]:
    """Every preset's file by its name, sorted by name.

    Raises:
        ConfigError: two packages ship a preset of the same name, or a declared package is not there.
    """
    found: dict[str, Traversable] = {}
    for package in sorted({point.value for point in entry_points(group=GROUP)}):
        try:
            shipped = [file for file in files(package).iterdir() if file.name.endswith(".yaml")]
        except (ImportError, OSError) as error:
            raise ConfigError(f"the presets of {package} cannot be read: {error}") from error
        for file in shipped:
            name = file.name.removesuffix(".yaml")
            if name in found:
                raise ConfigError(f"two presets are called {name!r}: {found[name]} and {file}")
            found[name] = file
    return dict(sorted(found.items()))
