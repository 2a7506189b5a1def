"""Multi-latent attention without Transformer Engine."""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent attention with correct gradients under tensor parallelism.

    Seen in megatron-core 0.19.2, whose layers without Transformer Engine split the down projections over the ranks:

    - Every rank's heads use the one positional key, but each rank goes on with the gradient of its own heads only.
    - Gradients of ``q_layernorm``, found by its name, are added up over the ranks. That is right for a norm of a rank's
      own heads; here it stands before the heads, and without sequence parallelism each rank has the whole gradient.
    - Where queries are not compressed (``q_lora_rank`` None), there is nothing to norm but keys and values: Megatron
      asks for Transformer Engine's layer that norms the queries' input once more.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.q_lora_rank is not None and not self.config.sequence_parallel:
            for parameter in cast(torch.nn.Module, self.q_layernorm).parameters():
                parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> Any:
        """Return the projections and norms to build."""
        compressed = cast(int | None, self.config.q_lora_rank) is not None  # Megatron annotates it as never None
        if compressed or not self.config.qk_layernorm:
            return super()._resolve_qk_norm_config(submodules)
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "kv_layernorm": submodules.kv_layernorm,
        }

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project down; the latent key and value with the positional key come out whole, not split over the ranks."""
        query, latent = super()._qkv_down_projection(hidden_states)  # type: ignore[no-untyped-call]
        if self.tp_group.size() == 1:
            return query, latent
        latent = tensor_parallel.gather_from_tensor_model_parallel_region(latent, group=self.tp_group)
        if self.config.sequence_parallel:  # the caller gathers the sequence again, and that adds up gradients
            return query, tensor_parallel.scatter_to_sequence_parallel_region(latent, group=self.tp_group)
        latent, position = latent.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        position = tensor_parallel.copy_to_tensor_model_parallel_region(position, group=self.tp_group)
        return query, torch.cat([latent, position], dim=-1)
