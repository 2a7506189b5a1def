"""All architectures: those of ``families``, and those that installed distributions declare.

An entry point of the group ``bridge.huggingface`` has a ``model_type`` as its name and an ``Architecture`` as its
value. Entry points are read at the first lookup, and only the one that is looked up is imported.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from bridge.config.errors import ConfigError
from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.families import ARCHITECTURES
from bridge.models.huggingface.targets import GPT, MAMBA, T5

GROUP = "bridge.huggingface"


def list_model_types() -> list[str]:
    """Return every ``model_type`` with an architecture: shipped ones first. Imports no outside architecture."""
    return list(dict.fromkeys([*ARCHITECTURES, *_get_declarations()]))


def get_architecture(model_type: str) -> Architecture | None:
    """Return the architecture of a ``model_type``; None if there is none.

    Raises:
        ConfigError: Two distributions have it, or its entry point is broken.
    """
    points = _get_declarations().get(model_type, [])
    shipped = ARCHITECTURES.get(model_type)
    owners = [*(["bridge-models"] if shipped else []), *(_get_owner(point) for point in points)]
    if len(owners) > 1:
        raise ConfigError(
            f"{' and '.join(owners)} have an architecture {model_type!r}: uninstall one of them, or change the name of "
            f"the entry point in the group {GROUP!r}"
        )
    return _load(points[0]) if points else shipped


@cache
def _get_declarations() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        found.setdefault(point.name, []).append(point)
    return found


def _load(point: EntryPoint) -> Architecture:
    """Import the architecture of an entry point.

    Raises:
        ConfigError: It cannot be imported, or is not an architecture of this ``model_type``.
    """
    declared = f"the architecture {point.name!r} of {_get_owner(point)}, {point.value},"
    try:
        found = point.load()
    except Exception as error:  # of code that is not ours
        raise ConfigError(f"{declared} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, Architecture):
        raise ConfigError(f"{declared} is a {type(found).__name__}: expected an Architecture")
    if found.model_type != point.name:
        raise ConfigError(f"{declared} has the model_type {found.model_type!r}: name its entry point so")
    if found.target not in (GPT, MAMBA, T5):
        raise ConfigError(f"{declared} has the target {found.target!r}: expected {GPT}, {MAMBA} or {T5}")
    return found


def _get_owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value
