"""The process of a build: its environment for the pre-flight rules, and the settings that a configuration needs."""

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
    """Return the environment of this process and its GPU."""
    return Environment(
        compute_capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        variables=dict(os.environ),
        has_user_buffers=_has_user_buffers(),
        is_batch_invariant=_is_batch_invariant(),
        has_ring_exchange=hasattr(torch.distributed, "ring_exchange"),
    )


# Both read sys.modules: nothing can be set in a module that was not imported.


def _has_user_buffers() -> bool:
    linear = sys.modules.get("transformer_engine.pytorch.module.base")
    return getattr(linear, "_ub_communicators", None) is not None  # private; seen in Transformer Engine 1 and 2


def _is_batch_invariant() -> bool:
    kernels = sys.modules.get("megatron.core.transformer.custom_layers.batch_invariant_kernels")
    return kernels is not None and kernels.is_batch_invariant_mode_enabled()


def prepare_process(config: TransformerConfig) -> None:
    """Set the process state that megatron.training sets at start-up, for this configuration.

    Call it after the device is chosen and before anything is computed on it.
    """
    # Transformer Engine captures its CUDA graphs on another stream than the default one.
    of_graphs = config.cuda_graph_impl == "transformer_engine"
    torch.cuda.set_stream(torch.cuda.Stream() if of_graphs else torch.cuda.default_stream())
    if torch.are_deterministic_algorithms_enabled() != config.deterministic_mode:  # the setter imports torch's compiler
        torch.use_deterministic_algorithms(config.deterministic_mode)


def disable_cuda_graphs(config: TransformerConfig) -> None:
    """Disable CUDA graphs in a configuration if there is no GPU, and log it. Results do not change."""
    if config.cuda_graph_impl == "none" or torch.cuda.is_available():
        return
    if torch.distributed.is_initialized():  # logged by ranks only, not by the process that starts them
        message = "cuda_graph_impl is %s, but there is no GPU: computing without CUDA graphs"
        log_single_rank(logger, logging.WARNING, message, config.cuda_graph_impl)
    config.cuda_graph_impl = "none"
