"""Whether a plan fits the memory of its GPUs, in words. No torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bridge.dist.formatting import format_gib


class Verdict(NamedTuple):
    """Whether the stages fit, in a word for the style sheet, in short and in detail."""

    state: str
    verdict: str
    detail: str


def judge_memory(totals: Sequence[int], *, reserve: int, gpu_memory: int | None) -> Verdict:
    """Say whether the stages fit the memory of a GPU, by how much, and which needs the most.

    Args:
        totals: The bytes of a rank of each stage, without the reserve.
        reserve: The bytes that stay free.
        gpu_memory: The bytes of a GPU, None if unknown.
    """
    most = max(totals)
    needs = f"stage {totals.index(most)} needs the most, {format_gib(most)}"
    if reserve:
        needs += f" and the reserve of {format_gib(reserve)}"
    if gpu_memory is None:
        return Verdict("unknown", "Not checked.", f"{needs} GiB; --gpu-memory or --machine says what a GPU has")
    needs += f" of {format_gib(gpu_memory)} GiB"
    left = gpu_memory - reserve - most
    if left >= 0:
        return Verdict("fits", "Fits.", f"{format_gib(left)} GiB are left: {needs}")
    over = sum(total > gpu_memory - reserve for total in totals)
    detail = f"{format_gib(-left)} GiB too much: {needs}; {over} of {len(totals)} stages do not fit"
    return Verdict("too-large", "Does not fit.", detail)
