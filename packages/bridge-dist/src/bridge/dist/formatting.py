"""Format bytes and layer ranges for display. Importing this module imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence


def format_gib(size: int) -> str:
    """Format bytes as GiB with three decimals."""
    return f"{size / 2**30:,.3f}"


def format_layer_ranges(layers: Sequence[int]) -> str:
    """Format sorted layer indices as ranges: ``0-3, 8-11``; ``none`` for a stage without layers."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges) or "none"
