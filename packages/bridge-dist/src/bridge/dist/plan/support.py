"""Checks of what a plan can count, and settings that it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from bridge.config import Document
from bridge.dist.errors import PlanError
from bridge.dist.internals import TESTED_THROUGHOUT, TORCH
from bridge.dist.plan.layers import Layers

_NOT_MODELLED: Mapping[str, Callable[[TransformerConfig], object]] = {
    "use_transformer_engine_op_fuser": lambda c: c.use_transformer_engine_op_fuser,
    "use_grouped_gemm_for_dense_mlp": lambda c: c.use_grouped_gemm_for_dense_mlp,
    "use_te_activation_func": lambda c: c.use_te_activation_func,
    "fused_residual_rmsnorm": lambda c: c.fused_residual_rmsnorm,
    "fused_single_qkv_rope": lambda c: c.fused_single_qkv_rope,
    "moe_paged_stash": lambda c: c.moe_paged_stash,
    "fp4": lambda c: c.fp4,
    "fp8_recipe: custom": lambda c: c.fp8 and c.fp8_recipe == "custom",
    "fp8_output_proj": lambda c: c.fp8_output_proj,
    "quant_recipe": lambda c: c.quant_recipe is not None,
    "cp_comm_type: a2a+p2p": lambda c: c.context_parallel_size > 1 and "a2a+p2p" in (c.cp_comm_type or ()),
}
"""Features of Transformer Engine that its stand-in lacks, and when they are in use."""

_LEFT_OUT = ("cpu_offloading", "fine_grained_activation_offloading")


def check_supported(transformer: TransformerConfig, layers: Layers) -> None:
    """Check that a plan can count a model.

    Raises:
        PlanError: It cannot.
    """
    if TORCH < TESTED_THROUGHOUT:
        raise PlanError(f"plans need torch 2.11 or later, got {torch.__version__}: upgrade torch")
    if transformer.num_moe_experts and transformer.moe_token_dispatcher_type != "alltoall":
        raise PlanError(
            f"moe_token_dispatcher_type {transformer.moe_token_dispatcher_type} cannot be planned: "
            "its sizes depend on tokens; set it to alltoall"
        )
    if layers is Layers.TRANSFORMER_ENGINE:
        used = [name for name, is_used in _NOT_MODELLED.items() if is_used(transformer)]
        if used:
            raise PlanError(
                f"plans do not model these features of Transformer Engine: {', '.join(used)}: do without them"
            )


def leave_out_offloading(document: Document) -> list[str]:
    """Switch off offloading of activations in a document, so that they are counted; return the fields that were set."""
    prefix, fields = ("transformer.", document.data.get("transformer"))
    if not isinstance(fields, dict):
        prefix, fields = "", document.data
    given: dict[str, Any] = fields
    left_out = [name for name in _LEFT_OUT if given.get(name)]
    for name in left_out:
        document.set(prefix + name, False)
    return left_out
