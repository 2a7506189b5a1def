"""Layers in PyTorch in place of Megatron's local ones, with the checkpoint keys of Transformer Engine's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from bridge.models.backend.attention import TorchAttention
from bridge.models.backend.experts import ColumnParallelGroupedLinear, RowParallelGroupedLinear, SequentialExperts
from bridge.models.backend.latent import LatentAttention
from bridge.models.backend.norms import fused_norm, torch_norm
from bridge.models.backend.specs import SpecT, replace_modules
from bridge.models.errors import UnsupportedError


class PyTorchSpecProvider(LocalSpecProvider):
    """Megatron's local backend, with the layers in PyTorch of this package."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """Return the function that builds the norm of the configuration."""
        return torch_norm

    def core_attention(self) -> type:
        """Return the class of the attention between projected queries, keys and values."""
        return TorchAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Return the builder of a rank's experts: grouped, or one module per expert."""
        if not moe_use_grouped_gemm:
            local: Any = super().grouped_mlp_modules(moe_use_grouped_gemm)
            return partial(SequentialExperts, **local.keywords)
        return partial(
            TEGroupedMLP,  # despite its name it accepts any grouped linear layers
            submodules=GroupedMLPSubmodules(
                linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear
            ),
        )


def with_pytorch_layers(spec: SpecT, *, grouped_experts: bool | None = None) -> SpecT:
    """Return a copy of a spec with this backend's layers in place of Megatron's local ones; ``spec`` is not changed.

    The functions of megatron-core 0.19.2 that make local specs take no backend.

    Args:
        spec: A ModuleSpec, or a part of one: a dataclass, a partial or a list.
        grouped_experts: Whether experts are grouped; required if the spec has experts.

    Raises:
        UnsupportedError: The spec has experts and ``grouped_experts`` is None.
    """
    provider = PyTorchSpecProvider()

    def replace(part: Any) -> Any:
        if part is WrappedTorchNorm or part is FusedLayerNorm:  # Apex's, if it is installed
            return provider.layer_norm()
        if part is DotProductAttention:
            return provider.core_attention()
        if part is MLASelfAttention:
            return LatentAttention
        if isinstance(part, partial) and part.func is SequentialMLP:
            if grouped_experts is None:
                raise UnsupportedError("the spec has experts: pass grouped_experts=config.moe_grouped_gemm")
            return provider.grouped_mlp_modules(grouped_experts)
        return part

    return replace_modules(replace_modules(spec, replace), _set_checkpoint_keys)


def _set_checkpoint_keys(layer: Any) -> Any:
    """Return a transformer layer with the checkpoint keys of Transformer Engine's layer; other parts unchanged.

    Transformer Engine fuses a norm with the linear layer behind it, if there is one. The local specs of megatron-core
    0.19.2 map these keys for plain attention and MLPs. They also map them for experts, whose norm is separate, and do
    not map them for multi-latent attention; both are wrong.
    """
    if not isinstance(layer, TransformerLayerSubmodules):
        return layer
    keys = dict(layer.sharded_state_dict_keys_map)
    attention: Any = layer.self_attention
    module = attention.module if isinstance(attention, ModuleSpec) else None
    is_latent = isinstance(module, type) and issubclass(module, MLASelfAttention)
    if is_latent:
        keys |= {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
        parts = _fuse_norms(attention.submodules, ("q_layernorm", "kv_layernorm"))
        attention = dataclasses.replace(attention, submodules=parts)
    builds_mlp = layer.mlp.func if isinstance(layer.mlp, partial) else None
    # Experts: no fused norm. Latent attention: the spec lacks the entry of its MLP.
    if builds_mlp is MoELayer:
        keys.pop("pre_mlp_layernorm.", None)
    elif is_latent and builds_mlp == MLP.as_mlp_submodule:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer = _fuse_norms(layer, [name for name in ("input_layernorm", "pre_mlp_layernorm") if f"{name}." in keys])
    return dataclasses.replace(layer, self_attention=attention, sharded_state_dict_keys_map=keys)


def _fuse_norms(spec: SpecT, names: Iterable[str]) -> SpecT:
    """Return a copy of a spec in which the named norms are fused with the next linear layer in checkpoints."""
    norms = {name: fused_norm for name in names if getattr(spec, name) is torch_norm}
    return cast(SpecT, dataclasses.replace(cast(Any, spec), **norms))


def with_pytorch_attention(spec: SpecT) -> SpecT:
    """Return a copy of a spec with attention in PyTorch; ``spec`` is not changed.

    Layers without a core attention (no-op or linear attention of heterogeneous models) are kept.
    """

    def replace(part: Any) -> Any:
        core = getattr(part, "core_attention", part)
        if core is part or not dataclasses.is_dataclass(part) or isinstance(part, type):
            return part
        if isinstance(core, ModuleSpec) and core.submodules is not None:
            return part  # has parts, such as an indexer, so it computes something else
        return dataclasses.replace(part, core_attention=TorchAttention)

    return replace_modules(spec, replace)
