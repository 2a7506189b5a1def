"""The nearest sizes that would work, for messages about sizes that do not. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def find_nearest(wanted: int, fits: Callable[[int], bool], *, largest: int) -> list[int]:
    """Return the largest size below ``wanted`` that fits and the smallest above it, up to ``largest``, if any."""
    below = next((size for size in range(min(wanted - 1, largest), 0, -1) if fits(size)), None)
    above = next((size for size in range(wanted + 1, largest + 1) if fits(size)), None)
    return [size for size in (below, above) if size is not None]


def suggest(name: str, wanted: int, fits: Callable[[int], bool], *, largest: int) -> str:
    """Return the nearest sizes that fit as ``tp = 2 or 4``; empty if there are none."""
    sizes = " or ".join(str(size) for size in find_nearest(wanted, fits, largest=largest))
    return f"{name} = {sizes}" if sizes else ""


def divides(number: int) -> Callable[[int], bool]:
    """Return a function that tells whether a size divides a number."""
    return lambda size: number % size == 0


def suggest_multiple(wanted: int, of: int) -> str:
    """Return the nearest multiples of a number as ``8 or 16``."""
    return " or ".join(f"{size}" for size in _list_multiples(wanted, of))


def _list_multiples(wanted: int, of: int) -> Iterator[int]:
    below = wanted // of * of
    if below:
        yield below
    yield below + of
