"""Global state of megatron-core and torch. A simulated rank starts with the state of a new process."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import random
import sys
from collections.abc import Callable, Iterator, Mapping

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding

from bridge.dist.patch import Replacement, replace_attributes
from bridge.dist.process.imports import ATTENTION_BACKEND_VARIABLES

_ATTENTION_VARIANT = "megatron.core.transformer.experimental_attention_variant.dsa"

STATE: Mapping[str, Callable[[], object]] = {
    # Auxiliary losses: their logs, and the scales of their gradients.
    "megatron.core.transformer.multi_token_prediction.MTPLossLoggingHelper.tracker": dict,
    "megatron.core.transformer.multi_token_prediction.MTPLossAutoScaler.main_loss_backward_scale": (
        lambda: torch.tensor(1.0)
    ),
    "megatron.core.transformer.moe.moe_logging._MOE_METRICS_TRACKER": lambda: None,
    "megatron.core.transformer.moe.moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale": (
        lambda: torch.ones(1)  # as the schedule sets it before the first backward pass; it cannot change the shape
    ),
    f"{_ATTENTION_VARIANT}.DSAIndexerLossLoggingHelper.tracker": dict,
    f"{_ATTENTION_VARIANT}.DSAIndexerLossAutoScaler.main_loss_backward_scale": lambda: torch.ones(1),
    # Routers and experts.
    "megatron.core.transformer.moe.moe_utils.RandomSTEShared._cache": dict,
    "megatron.core.transformer.moe.router_replay.RouterReplay.global_router_replay_instances": list,
    "megatron.core.transformer.moe.shared_experts.SharedExpertMLP.stream": lambda: None,
    "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream": lambda: None,
    # Random states, and the flag for recomputed passes, which a failed plan would leave set.
    "megatron.core.tensor_parallel.random._CUDA_RNG_STATE_TRACKER": lambda: None,
    "megatron.core.tensor_parallel.random._CUDA_RNG_STATE_TRACKER_INITIALIZED": lambda: False,
    "megatron.core.tensor_parallel.random.IS_CHECKPOINTING": lambda: False,
    # Flags for warnings already given.
    "megatron.core.tensor_parallel.layers.linear_with_grad_accumulation_and_async_allreduce.warned": lambda: False,
    "torch.distributed.distributed_c10d._backend": lambda: None,
    "torch.distributed.distributed_c10d._default_pg_init_method": lambda: None,
}
"""Variables of modules and classes that a plan changes, with their initial values in megatron-core 0.19.2, torch 2.15.

A test fails when a plan leaves another variable changed.
"""


@contextlib.contextmanager
def isolate_state() -> Iterator[None]:
    """Start with the global state of a new process within a context; restore the previous state afterwards."""
    with contextlib.ExitStack() as undo:
        for name, first in STATE.items():
            owner, _, attribute = name.rpartition(".")
            undo.enter_context(replace_attributes(Replacement(pkgutil.resolve_name(owner), attribute, first())))
        for restore in (_restore_groups, _restore_environment, _restore_random_states, _restore_error_hook):
            undo.enter_context(restore())
        try:
            yield
        finally:
            # Their caches hold the module, and through it the whole model.
            for rotary in (RotaryEmbedding, YarnRotaryEmbedding):
                rotary.forward.cache_clear()


@contextlib.contextmanager
def _restore_groups() -> Iterator[None]:
    """Restore the variables of ``parallel_state``."""
    before = dict(vars(parallel_state))
    try:
        yield
    finally:
        for name in vars(parallel_state).keys() - before.keys():
            delattr(parallel_state, name)
        vars(parallel_state).update(before)


@contextlib.contextmanager
def _restore_environment() -> Iterator[None]:
    """Restore environment variables: Megatron selects TE's attention through them, and rejects another selection."""
    before = dict(os.environ)
    for name in ATTENTION_BACKEND_VARIABLES:  # set when this process built another model
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _restore_random_states() -> Iterator[None]:
    """Restore random states: torch 2.15 numbers messages on meta with Python's, and Megatron seeds torch's."""
    python, generator = random.getstate(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.default_generator.set_state(generator)


@contextlib.contextmanager
def _restore_error_hook() -> Iterator[None]:
    """Restore ``sys.excepthook``: for every rank, torch adds one more hook that puts the rank before each line."""
    before = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = before
