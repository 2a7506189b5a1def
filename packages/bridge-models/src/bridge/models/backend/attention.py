"""Attention in PyTorch between projected queries, keys and values, under context parallelism too."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from bridge.models.backend.extra_state import HasExtraState
from bridge.models.errors import UnsupportedError


class TorchAttention(HasExtraState, DotProductAttention):
    """Attention by ``torch.nn.functional.scaled_dot_product_attention``.

    Under context parallelism, the keys and values of all ranks are gathered. The mask follows from the distribution of
    tokens by ``get_batch_on_this_cp_rank``: it cuts the sequence into 2 x cp pieces, and rank r holds pieces r and
    2 x cp - 1 - r, so that causal attention is the same work on each rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,  # unused: taken from the shapes of queries and keys
        v_channels: int | None = None,  # unused: taken from the shape of values
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        # The base class only checks this size: it does not support context parallelism.
        without_cp = copy.copy(config)
        without_cp.context_parallel_size = 1
        super().__init__(
            without_cp,
            layer_number,
            attn_mask_type,
            attention_type,
            attention_dropout=attention_dropout,
            softmax_scale=softmax_scale,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.config = config
        self.cp_group = pg_collection.cp
        # Query-key layer scaling divides the scores by the layer number, and the fused softmax of Megatron multiplies
        # them by it again, so the result is that without scaling. `softmax_scale` has the division only.
        coefficient = self.layer_number if config.apply_query_key_layer_scaling else 1
        self.scale: float = self.softmax_scale * coefficient
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)  # type: ignore[arg-type]
        self.window = config.window_size if windowed else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Compute attention.

        Args:
            query: [sequence, batch, heads, channels], of this rank.
            key: [sequence, batch, groups, channels]; a group serves heads / groups heads.
            value: [sequence, batch, groups, value channels].
            attention_mask: True where a key is masked out, [batch or 1, 1, sequence, sequence]; ignored under context
                parallelism.
            attn_mask_type: Overrides the type that the layer was built with.
            attention_bias: [batch or 1, heads, queries, keys], added to the scaled scores, as Transformer Engine's
                ``post_scale_bias`` is; not under context parallelism.
            packed_seq_params: Not supported.

        Returns:
            [sequence, batch, heads x value channels].

        Raises:
            UnsupportedError: The sequences are packed, or the mask or a bias is not supported under context
                parallelism.
        """
        if packed_seq_params is not None:
            raise UnsupportedError(
                "attention in PyTorch does not support packed sequences: install Transformer Engine, or do not pack"
            )
        mask_type = attn_mask_type or self.attn_mask_type
        if self.cp_group.size() > 1:
            if mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
                raise UnsupportedError(
                    f"attention under context parallelism does not support a {mask_type.name} mask: use a causal one"
                )
            if attention_bias is not None:
                raise UnsupportedError(
                    "attention under context parallelism does not support an attention bias: "
                    "set context_parallel_size to 1"
                )
            attention_mask = None
            key, value = (
                tensor_parallel.gather_from_sequence_parallel_region(part, group=self.cp_group) for part in (key, value)
            )
        allowed, is_causal = self._find_allowed_keys(
            len(query), len(key), attention_mask, mask_type, device=query.device
        )
        # [batch, heads, sequence, channels]
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        if self.softmax_offset is not None:
            context = self._attend_with_sink(query, key, value, allowed, sink=self.softmax_offset, bias=attention_bias)
        else:
            mask = None if is_causal else allowed
            if attention_bias is not None:
                mask, is_causal = _mask_bias(attention_bias.to(query.dtype), allowed), False
            with self._fork_dropout_state():
                context = torch.nn.functional.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask=mask,
                    dropout_p=self.attention_dropout.p if self.training else 0.0,
                    is_causal=is_causal,
                    scale=self.scale,
                    enable_gqa=query.size(1) != key.size(1),
                )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _find_allowed_keys(
        self,
        queries: int,
        keys: int,
        attention_mask: torch.Tensor | None,
        mask_type: AttnMaskType,
        *,
        device: torch.device,
    ) -> tuple[torch.Tensor | None, bool]:
        """Return the mask of allowed keys (None: all), and whether it is the plain causal mask."""
        is_causal = mask_type is AttnMaskType.padding_causal or (
            # As in Megatron's local attention, an explicit mask replaces the causal one.
            mask_type in (AttnMaskType.causal, AttnMaskType.causal_bottom_right) and attention_mask is None
        )
        allowed = None if attention_mask is None else ~attention_mask
        if not is_causal and self.window is None:
            return allowed, False
        query, key = self._get_positions(queries, keys, device)
        conditions = [key <= query] if is_causal else []
        if self.window is not None:
            before, after = self.window  # -1: unlimited
            conditions += [key >= query - before] if before >= 0 else []
            conditions += [key <= query + after] if after >= 0 else []
        for condition in conditions:
            allowed = condition if allowed is None else allowed & condition
        # torch computes this mask itself, with a faster kernel.
        is_plain = attention_mask is None and self.window is None and self.cp_group.size() == 1 and queries == keys
        return allowed, is_plain

    def _get_positions(self, queries: int, keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions in the whole sequence of queries, [queries, 1], and keys, [1, keys]."""
        ranks = self.cp_group.size()
        if ranks == 1:  # with a KV cache, queries are the last positions
            positions = torch.arange(keys, device=device)
            return positions[keys - queries :, None], positions[None]
        pieces = torch.arange(keys, device=device).chunk(2 * ranks)
        by_rank = [torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]]) for rank in range(ranks)]
        return by_rank[self.cp_group.rank()][:, None], torch.cat(by_rank)[None]

    def _attend_with_sink(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        *,
        sink: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute attention with one more score per head, ``sink``, in the softmax, to which no value belongs.

        All tensors are [batch, heads, sequence, channels], ``sink`` is [heads]. torch's function cannot do this.
        """
        heads = query.size(1) // key.size(1)
        key, value = (part.repeat_interleave(heads, dim=1) for part in (key, value))
        scores = (query @ key.transpose(-1, -2)).float() * self.scale
        if bias is not None:
            scores = scores + bias
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        sinks = sink.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1].to(value.dtype)
        with self._fork_dropout_state():
            weights = torch.nn.functional.dropout(weights, self.attention_dropout.p, self.training)
        return weights @ value

    def _fork_dropout_state(self) -> AbstractContextManager[None]:
        """Return a context with the random state for dropout: the tensor-parallel one, as ranks hold different heads.

        Under sequence parallelism, the transformer block has already selected it.
        """
        if self.config.sequence_parallel or not (self.training and self.attention_dropout.p):
            return nullcontext()
        fork: AbstractContextManager[None] = tensor_parallel.get_cuda_rng_tracker().fork()
        return fork


def _mask_bias(bias: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """Return the bias with disallowed positions set to minus infinity."""
    return bias if allowed is None else torch.where(allowed, bias, -math.inf)
