"""Formats unexpected errors for the terminal, with a short traceback."""

from __future__ import annotations

from traceback import StackSummary, walk_tb

_LAST_FRAMES = 3
# Modules whose frames surround user code: the last frame outside them is the most useful one.
_LIBRARIES = ("__main__", "bridge", "click", "contextlib", "megatron", "torch", "transformer_engine")


def format_error(error: BaseException) -> str:
    """Return the error on one line, then its last frames and the last frame of user code."""
    summary = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{summary}\n{_format_last_frames(error)}".rstrip("\n")


def _format_last_frames(error: BaseException) -> str:
    frames = list(walk_tb(error.__traceback__))
    modules = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
    outside = [index for index, module in enumerate(modules) if module not in _LIBRARIES]
    shown = sorted({*outside[-1:], *range(max(0, len(frames) - _LAST_FRAMES), len(frames))})
    return "".join(StackSummary.extract(iter([frames[index] for index in shown])).format())
