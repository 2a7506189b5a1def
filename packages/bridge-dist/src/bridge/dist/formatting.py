"""Format bytes, times and layer ranges for display. Importing this module imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence


def format_gib(size: int) -> str:
    """Format bytes as GiB with three decimals."""
    return f"{size / 2**30:,.3f}"


def format_bytes(size: int) -> str:
    """Format bytes as GB or MB with three decimals, as disks are measured."""
    return f"{size / 1e9:,.3f} GB" if size >= 1e9 else f"{size / 1e6:,.3f} MB"


def choose_time_unit(seconds: float) -> tuple[float, str]:
    """Return the unit in which three decimals show a time well: how many of it are in a second, and its name."""
    return (1, "s") if seconds >= 0.1 or seconds == 0 else (1e3, "ms") if seconds >= 1e-4 else (1e6, "us")


def format_seconds(seconds: float) -> str:
    """Format a time in s, ms or us with three decimals."""
    factor, unit = choose_time_unit(seconds)
    return f"{seconds * factor:,.3f} {unit}"


def format_layer_ranges(layers: Sequence[int]) -> str:
    """Format sorted layer indices as ranges: ``0-3, 8-11``; ``none`` for a stage without layers."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges) or "none"
