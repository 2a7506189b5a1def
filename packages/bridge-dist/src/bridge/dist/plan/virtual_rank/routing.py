"""Token routing on the meta device, where routers have no values: every expert gets an equal share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from bridge.dist.patch import Replacement, replace_attributes


@contextlib.contextmanager
def assume_equal_shares() -> Iterator[None]:
    """Give every expert an equal share of the tokens within a context; on the meta device, token routing is unknown."""
    with replace_attributes(Replacement(MoEAlltoAllTokenDispatcher, "preprocess", _preprocess_with_equal_shares)):
        yield


def _preprocess_with_equal_shares(dispatcher: Any, routing_map: torch.Tensor) -> torch.Tensor:
    """Replace ``preprocess`` of megatron-core 0.19.2: set the sizes of the exchange, with values despite meta."""
    tokens = routing_map.shape[0] * dispatcher.config.moe_router_topk
    ranks, per_rank = dispatcher.ep_size, dispatcher.num_local_experts
    # The first experts get the remainder.
    by_expert = np.full(dispatcher.num_experts, tokens // dispatcher.num_experts)
    by_expert[: tokens % dispatcher.num_experts] += 1
    by_rank = by_expert.reshape(ranks, per_rank)
    local = by_rank[dispatcher.ep_group.rank()]
    dispatcher.num_out_tokens = tokens
    if ranks > 1 or dispatcher.tp_size > 1:
        dispatcher.input_splits = by_rank.sum(axis=1)
        dispatcher.output_splits = np.full(ranks, local.sum())
        dispatcher.output_splits_tp = np.full(dispatcher.tp_size, local.sum() * ranks)
    senders = ranks * dispatcher.tp_size
    dispatcher.num_global_tokens_per_local_expert = torch.from_numpy(np.tile(local, (senders, 1)))
    return torch.from_numpy(local * senders)
