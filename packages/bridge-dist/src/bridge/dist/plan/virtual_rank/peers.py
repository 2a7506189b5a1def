"""Answers in place of the other ranks of a job, which do not exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch.distributed import ProcessGroup

from bridge.dist.patch import Replacement, replace_attributes


def answer_for_all_ranks() -> AbstractContextManager[None]:
    """Return a context in which every rank answers ``all_gather_object`` with the object of this rank.

    Megatron's optimizer gathers the kinds of parameters of all ranks. With ten thousand ranks, that would take most of
    the time of a plan.
    """

    def answer(answers: list[Any], mine: Any, group: ProcessGroup | None = None) -> None:
        answers[:] = [mine] * len(answers)

    return replace_attributes(Replacement(torch.distributed, "all_gather_object", answer))


def supply_shapes(inputs: Iterator[torch.Size], gradients: Iterator[torch.Size]) -> Replacement:
    """Return a replacement for the exchange of shapes between pipeline ranks that returns the given ones in order.

    Megatron exchanges shapes with ``variable_seq_lengths``, and when multi-token prediction has its own stage.
    """

    def supply(
        _: object, send_next: object, send_prev: object, recv_prev: bool, recv_next: bool
    ) -> tuple[torch.Size | None, torch.Size | None]:
        return next(inputs) if recv_prev else None, next(gradients) if recv_next else None

    return Replacement(P2PCommunicator, "_communicate_shapes", supply)
