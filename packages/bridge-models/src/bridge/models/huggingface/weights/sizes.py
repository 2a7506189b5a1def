"""The sizes of a model, from the fields of its document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Sizes:
    """Sizes and switches that determine which parameters a model has, with Megatron-Core's defaults filled in."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Take the fields of a document by dotted path, with defaults (``document_fields.read_fields``)."""

        def of(name: str) -> Any:
            return fields.get(f"transformer.{name}")

        self.vocabulary: int = fields["vocab_size"]
        self.positions: int = fields["seq_length"]
        self.tied: bool = fields["share_embeddings_and_output_weights"]
        self.hidden: int = of("hidden_size")
        self.layers: int = of("num_layers")
        self.norms_have_biases: bool = of("normalization") == "LayerNorm"
        self.biases: bool = of("add_bias_linear")
        self.qkv_biases: bool = self.biases or of("add_qkv_bias")

        self.heads: int = of("num_attention_heads")
        self.groups: int = of("num_query_groups") or self.heads
        """Groups of queries that share a key and a value."""

        self.channels: int = of("kv_channels") or self.hidden // self.heads
        self.norms_queries: bool = of("qk_layernorm")
        self.sinks: bool = of("softmax_type") == "learnable"
        self.query_rank: int | None = of("q_lora_rank")
        self.latent_rank: int = of("kv_lora_rank")
        self.latent_channels: int = of("qk_head_dim")
        """Channels of a latent head's query without positions."""

        self.position_channels: int = of("qk_pos_emb_head_dim")
        self.value_channels: int = of("v_head_dim")

        self.gated: bool = of("gated_linear_unit")
        self.feed_forward: int = of("ffn_hidden_size") or 4 * self.hidden
        self.experts: int | None = of("num_moe_experts")
        self.expert_width: int = of("moe_ffn_hidden_size") or self.feed_forward
        self.expert_latent: int | None = of("moe_latent_size")
        self.shared_width: int | None = of("moe_shared_expert_intermediate_size")
        self.shared_gate: bool = of("moe_shared_expert_gate")
        self.router_bias: bool = of("moe_router_enable_expert_bias")
        self.predictions: int = of("mtp_num_layers") or 0
        """Layers of multi-token prediction."""

        self._expert_layers: int | list[int] = of("moe_layer_freq")
        self.pattern: str = (fields.get("hybrid_layer_pattern") or "M" * self.layers).replace("|", "")
        self.encoder_layers: int = fields.get("encoder_num_layers") or self.layers
        self.buckets: int = fields.get("relative_attention_num_buckets") or 0
        self.mamba_channels: int = of("mamba_head_dim")
        self.mamba_heads: int = of("mamba_num_heads") or 2 * self.hidden // self.mamba_channels
        self.mamba_groups: int = of("mamba_num_groups")
        self.mamba_states: int = of("mamba_state_dim")

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, has experts."""
        if self.experts is None:
            return False
        every = self._expert_layers
        return layer % every == 0 if isinstance(every, int) else bool(every[layer])
