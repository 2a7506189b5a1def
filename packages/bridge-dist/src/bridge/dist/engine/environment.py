"""The process that a model is built in: what pre-flight rules look at, and what a configuration wants set."""

from __future__ import annotations

import logging
import os
import sys

import torch
import torch.distributed
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import log_single_rank

from bridge.dist.checks.preflight import Environment

logger = logging.getLogger(__name__)


def inspect_process() -> Environment:
    """Return what is true of this process and its GPU."""
    return Environment(
        compute_capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        variables=dict(os.environ),
        has_user_buffers=_has_user_buffers(),
        is_batch_invariant=_is_batch_invariant(),
        has_ring_exchange=hasattr(torch.distributed, "ring_exchange"),
    )


# Neither imports what nobody has imported: then nothing was set there.


def _has_user_buffers() -> bool:
    linear = sys.modules.get("transformer_engine.pytorch.module.base")
    return getattr(linear, "_ub_communicators", None) is not None  # private; seen in Transformer Engine 1 and 2


def _is_batch_invariant() -> bool:
    kernels = sys.modules.get("megatron.core.transformer.custom_layers.batch_invariant_kernels")
    return kernels is not None and kernels.is_batch_invariant_mode_enabled()


def prepare_process(config: TransformerConfig) -> None:
    """Set what Megatron's own start-up sets in a process, for this configuration alone.

    To be called after the device was chosen and before anything is computed there.
    """
    # Transformer Engine captures its CUDA graphs on another stream than the default one.
    of_graphs = config.cuda_graph_impl == "transformer_engine"
    torch.cuda.set_stream(torch.cuda.Stream() if of_graphs else torch.cuda.default_stream())
    if torch.are_deterministic_algorithms_enabled() != config.deterministic_mode:  # setting it imports the compiler
        torch.use_deterministic_algorithms(config.deterministic_mode)


def leave_out_cuda_graphs(config: TransformerConfig) -> None:
    """Set a configuration to go without CUDA graphs where there is no GPU; they change no number. The log says so."""
    if config.cuda_graph_impl == "none" or torch.cuda.is_available():
        return
    if torch.distributed.is_initialized():  # once: the process that starts ranks checks before they do
        message = "cuda_graph_impl is %s, but there is no GPU: computing without CUDA graphs"
        log_single_rank(logger, logging.WARNING, message, config.cuda_graph_impl)
    config.cuda_graph_impl = "none"
