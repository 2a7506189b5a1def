"""Multi-latent attention without Transformer Engine."""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent attention with correct gradients under tensor parallelism.

    Without Transformer Engine, megatron-core 0.19.2 splits the down projections over the ranks, and has these faults:

    - The heads of all ranks use the same positional key, but each rank continues with the gradient from its own heads.
    - Megatron sums the gradients of ``q_layernorm``, which it finds by name, over the ranks. This is right for a norm
      of each rank's heads. Here the norm comes before the heads, and without sequence parallelism each rank already has
      the whole gradient.
    - If queries are not compressed (``q_lora_rank`` is None), only keys and values need a norm, but Megatron requires
      Transformer Engine's layer that normalises the input of the queries as well.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.q_lora_rank is not None and not self.config.sequence_parallel:
            for parameter in cast(torch.nn.Module, self.q_layernorm).parameters():
                parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> Any:
        """Return the projections and norms to build; for uncompressed queries, without a norm of queries."""
        compressed = cast(int | None, self.config.q_lora_rank) is not None  # Megatron annotates it as never None
        if compressed or not self.config.qk_layernorm:
            return super()._resolve_qk_norm_config(submodules)
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "kv_layernorm": submodules.kv_layernorm,
        }

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project down. Latent keys and values and the positional key are whole on each rank, with whole gradients."""
        query, latent = super()._qkv_down_projection(hidden_states)  # type: ignore[no-untyped-call]
        if self.tp_group.size() == 1:
            return query, latent
        latent = tensor_parallel.gather_from_tensor_model_parallel_region(latent, group=self.tp_group)
        if self.config.sequence_parallel:  # the caller gathers the sequence again, which sums the gradients
            return query, tensor_parallel.scatter_to_sequence_parallel_region(latent, group=self.tp_group)
        # The up projection already sums the gradient of the latent part; copying sums that of the positional key.
        latent, position = latent.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        position = tensor_parallel.copy_to_tensor_model_parallel_region(position, group=self.tp_group)
        return query, torch.cat([latent, position], dim=-1)
