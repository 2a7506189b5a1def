"""Errors that are not Bridge's own, as a terminal shows them: what went wrong, and where."""

from __future__ import annotations

from traceback import StackSummary, walk_tb

_SHOWN = 3
# Their frames are around those of whoever extends them.
_LIBRARIES = ("__main__", "bridge", "click", "contextlib", "megatron", "torch", "transformer_engine")


def describe(error: BaseException) -> str:
    """The error in a line, and below it its last frames, with the last one outside Bridge, megatron-core and torch."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{said}\n{_format_last_frames(error)}".rstrip("\n")


def _format_last_frames(error: BaseException) -> str:
    frames = list(walk_tb(error.__traceback__))
    modules = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
    outside = [index for index, module in enumerate(modules) if module not in _LIBRARIES]
    shown = sorted({*outside[-1:], *range(max(0, len(frames) - _SHOWN), len(frames))})
    return "".join(StackSummary.extract(iter([frames[index] for index in shown])).format())
