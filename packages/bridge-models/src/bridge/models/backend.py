"""Layers in plain PyTorch, for what Megatron-Core's own cannot do without Transformer Engine.

They take the places that megatron-core's backend spec provider names: norms under sequence parallelism, attention under
context parallelism and with heads of unequal width (multi-latent attention), grouped experts. All of it is torch
operations and Megatron's collectives, so it runs wherever torch does.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from megatron.core.utils import divide
from torch.nn.functional import linear

from bridge.models.errors import UnsupportedError

SpecT = TypeVar("SpecT")


class PyTorchSpecProvider(LocalSpecProvider):
    """Megatron's local backend with the layers of this module in their places."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """Return what builds a norm; which one it is, the configuration says."""
        return torch_norm

    def core_attention(self) -> type:
        """Return the attention between projected queries, keys and values."""
        return TorchAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Return what builds the experts of a rank: with one weight a matrix each, or one module an expert."""
        if not moe_use_grouped_gemm:
            local: Any = super().grouped_mlp_modules(moe_use_grouped_gemm)
            return partial(SequentialExperts, **local.keywords)
        return partial(
            TEGroupedMLP,  # by its name Transformer Engine's; it takes any grouped linear layers
            submodules=GroupedMLPSubmodules(
                linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear
            ),
        )


def with_pytorch_layers(spec: SpecT, *, grouped_experts: bool | None = None) -> SpecT:
    """Return a copy of a spec with this backend's layers in place of Megatron's local ones; ``spec`` is left alone.

    Megatron's functions that make local specs take no backend (seen in megatron-core 0.19.2).

    Args:
        spec: A ModuleSpec, or whatever specs are made of: dataclasses, partials, lists.
        grouped_experts: Whether experts are grouped; needed if there are any.

    Raises:
        UnsupportedError: There are experts, and it is not said whether they are grouped.
    """
    return cast(SpecT, _replaced(spec, grouped_experts))


def _replaced(spec: Any, grouped_experts: bool | None) -> Any:
    provider = PyTorchSpecProvider()
    if spec is WrappedTorchNorm or spec is FusedLayerNorm:  # the other is Apex's, where that is installed
        return provider.layer_norm()
    if spec is DotProductAttention:
        return provider.core_attention()
    if spec is MLASelfAttention:
        return LatentAttention
    if isinstance(spec, partial):
        if spec.func is SequentialMLP:
            if grouped_experts is None:
                raise UnsupportedError("the spec has experts: pass grouped_experts=config.moe_grouped_gemm")
            return provider.grouped_mlp_modules(grouped_experts)
        keywords = {name: _replaced(value, grouped_experts) for name, value in spec.keywords.items()}
        return partial(_replaced(spec.func, grouped_experts), *spec.args, **keywords)
    if isinstance(spec, list):
        return [_replaced(item, grouped_experts) for item in spec]
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        fields = [field.name for field in dataclasses.fields(spec) if field.init]
        copied = dataclasses.replace(spec, **{name: _replaced(getattr(spec, name), grouped_experts) for name in fields})
        return _with_checkpoint_keys(copied) if isinstance(copied, TransformerLayerSubmodules) else copied
    return spec


def _with_checkpoint_keys(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """Return a layer that writes the checkpoint keys of the same layer made of Transformer Engine's parts.

    There a norm is part of the linear layer behind it, wherever one can be. The local specs of megatron-core 0.19.2 say
    so of plain attention and of MLPs; they also say it of experts, where the norm stands alone, and not of multi-latent
    attention.
    """
    keys = dict(layer.sharded_state_dict_keys_map)
    attention: Any = layer.self_attention
    module = attention.module if isinstance(attention, ModuleSpec) else None
    is_latent = isinstance(module, type) and issubclass(module, MLASelfAttention)
    if is_latent:
        keys |= {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
        parts = _with_fused_norms(attention.submodules, ("q_layernorm", "kv_layernorm"))
        attention = dataclasses.replace(attention, submodules=parts)
    builds_mlp = layer.mlp.func if isinstance(layer.mlp, partial) else None
    if builds_mlp is MoELayer:
        keys.pop("pre_mlp_layernorm.", None)
    elif is_latent and builds_mlp == MLP.as_mlp_submodule:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer = _with_fused_norms(layer, [name for name in ("input_layernorm", "pre_mlp_layernorm") if f"{name}." in keys])
    return dataclasses.replace(layer, self_attention=attention, sharded_state_dict_keys_map=keys)


def _with_fused_norms(spec: SpecT, names: Iterable[str]) -> SpecT:
    """Return a copy of a spec whose norms of these names are part of the next linear layer in checkpoints."""
    norms = {name: fused_norm for name in names if getattr(spec, name) is torch_norm}
    return cast(SpecT, dataclasses.replace(cast(Any, spec), **norms))


def torch_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> TorchNorm:
    """Build the norm that a configuration asks for, torch's own.

    Under sequence parallelism each rank sees part of the sequence, so the weights are marked for Megatron to add up
    their gradients over the tensor-parallel ranks.

    Raises:
        UnsupportedError: There is no such norm.
    """
    norms: dict[str, Callable[..., TorchNorm]] = (
        {"LayerNorm": ZeroCenteredLayerNorm, "RMSNorm": ZeroCenteredRMSNorm}
        if config.layernorm_zero_centered_gamma
        else {"LayerNorm": TorchLayerNorm, "RMSNorm": TorchRMSNorm}
    )
    if config.normalization not in norms:
        raise UnsupportedError(f"normalization {config.normalization!r} is not known: set one of {', '.join(norms)}")
    norm = norms[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def fused_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> TorchNorm:
    """Build a norm that Transformer Engine makes part of the next linear layer; otherwise as ``torch_norm``."""
    norm = torch_norm(config, hidden_size, eps)
    norm.is_fused = True
    return norm


class _HasExtraState(torch.nn.Module):
    """A layer with an empty ``_extra_state`` in its state, as Megatron's own linear layers have.

    Transformer Engine's layers keep how they quantise there, and ask each checkpoint for it.
    """

    def get_extra_state(self) -> None:
        """Return nothing: there is none, but torch writes the key."""

    def set_extra_state(self, state: object) -> None:
        """Leave it aside."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class TorchNorm(_HasExtraState):
    """What all norms of this backend have in common: which keys they write into checkpoints."""

    is_fused = False
    """Whether it is part of the next linear layer in Transformer Engine, which then has the only extra state."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_fused:
            del destination[f"{prefix}_extra_state"]


class TorchLayerNorm(TorchNorm, torch.nn.LayerNorm):
    """Torch's own, under a name of its own.

    nvidia-modelopt 0.47 quantises the input of ``torch.nn.LayerNorm``, of no other norm, and loses in Megatron's
    distributed checkpoints how. It tells a layer by its ``forward``.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        return super().forward(x)


class TorchRMSNorm(TorchNorm, torch.nn.RMSNorm):
    """Torch's own."""


class ZeroCenteredLayerNorm(TorchNorm, torch.nn.LayerNorm):
    """LayerNorm that multiplies by one more than its weight, which starts at zero."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        normed = torch.nn.functional.layer_norm(x, self.normalized_shape, eps=self.eps)
        return torch.addcmul(normed, normed, self.weight) + self.bias  # one plus a small weight would round it away


class ZeroCenteredRMSNorm(TorchNorm, torch.nn.RMSNorm):
    """RMSNorm that multiplies by one more than its weight, which starts at zero."""

    def reset_parameters(self) -> None:
        """Set the weight to zero."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        normed = torch.nn.functional.rms_norm(x, self.normalized_shape, eps=self.eps)
        return torch.addcmul(normed, normed, self.weight)


class TorchAttention(_HasExtraState, DotProductAttention):
    """Attention by ``torch.nn.functional.scaled_dot_product_attention``.

    Under context parallelism the keys and values of the other ranks are gathered, and what may be attended to follows
    from where ``get_batch_on_this_cp_rank`` took each token from: of the sequence cut into 2 x cp pieces, rank r holds
    pieces r and 2 x cp - 1 - r.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,  # those of queries and keys, seen in their shapes
        v_channels: int | None = None,  # those of values, likewise
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # the base class, which refuses more, only looks at it
        super().__init__(
            alone,
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
        # The coefficient of query-key layer scaling divides the scores and multiplies them again before the softmax.
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
        """Attend.

        Args:
            query: [sequence, batch, heads, channels], of this rank.
            key: [sequence, batch, groups, channels]; a group serves heads / groups heads.
            value: [sequence, batch, groups, value channels].
            attention_mask: True where nothing may be attended to, [batch or 1, 1, sequence, sequence]; under context
                parallelism it is left aside.
            attn_mask_type: In place of the one the layer was built with.
            attention_bias: [batch or 1, heads, queries, keys], added to the scaled scores, as Transformer Engine's
                ``post_scale_bias`` is; not under context parallelism.
            packed_seq_params: Not supported.

        Returns:
            [sequence, batch, heads x value channels].

        Raises:
            UnsupportedError: For what is not supported.
        """
        if packed_seq_params is not None:
            raise UnsupportedError(
                "attention in PyTorch cannot do packed sequences: install Transformer Engine, or leave them out"
            )
        mask_type = attn_mask_type or self.attn_mask_type
        if self.cp_group.size() > 1:
            if mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
                raise UnsupportedError(
                    f"attention under context parallelism cannot do a mask of type {mask_type.name}: use a causal one"
                )
            if attention_bias is not None:
                raise UnsupportedError(
                    "attention under context parallelism cannot do an attention bias: set context_parallel_size to 1"
                )
            attention_mask = None
            key, value = (
                tensor_parallel.gather_from_sequence_parallel_region(part, group=self.cp_group) for part in (key, value)
            )
        allowed, is_causal = self._allowed(len(query), len(key), attention_mask, mask_type, device=query.device)
        # [batch, heads, sequence, channels]
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        if self.softmax_offset is not None:
            context = self._with_sink(query, key, value, allowed, sink=self.softmax_offset, bias=attention_bias)
        else:
            mask = None if is_causal else allowed
            if attention_bias is not None:
                mask, is_causal = _biased(attention_bias.to(query.dtype), allowed), False
            with self._dropout_generator():
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

    def _allowed(
        self,
        queries: int,
        keys: int,
        attention_mask: torch.Tensor | None,
        mask_type: AttnMaskType,
        *,
        device: torch.device,
    ) -> tuple[torch.Tensor | None, bool]:
        """What may be attended to (None: everything), and whether that is just what comes before."""
        follows = mask_type is AttnMaskType.padding_causal or (
            # As in Megatron's local attention, a mask that is given is the whole one.
            mask_type in (AttnMaskType.causal, AttnMaskType.causal_bottom_right) and attention_mask is None
        )
        allowed = None if attention_mask is None else ~attention_mask
        if not follows and self.window is None:
            return allowed, False
        at, of = self._positions(queries, keys, device)
        conditions = [of <= at] if follows else []
        if self.window is not None:
            before, after = self.window
            conditions += [of >= at - before] if before >= 0 else []
            conditions += [of <= at + after] if after >= 0 else []
        for condition in conditions:
            allowed = condition if allowed is None else allowed & condition
        is_plain = attention_mask is None and self.window is None and self.cp_group.size() == 1 and queries == keys
        return allowed, is_plain

    def _positions(self, queries: int, keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of queries, [queries, 1], and of keys, [1, keys], in the whole sequence."""
        ranks = self.cp_group.size()
        if ranks == 1:  # queries are the last ones, where keys of earlier steps are kept
            of = torch.arange(keys, device=device)
            return of[keys - queries :, None], of[None]
        pieces = torch.arange(keys, device=device).chunk(2 * ranks)
        by_rank = [torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]]) for rank in range(ranks)]
        return by_rank[self.cp_group.rank()][:, None], torch.cat(by_rank)[None]

    def _with_sink(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        *,
        sink: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention whose softmax has one more term for each head, ``sink``, that nothing is taken from."""
        heads = query.size(1) // key.size(1)
        key, value = (part.repeat_interleave(heads, dim=1) for part in (key, value))
        scores = (query @ key.transpose(-1, -2)).float() * self.scale
        if bias is not None:
            scores = scores + bias
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        ends = sink.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, ends], dim=-1).softmax(dim=-1)[..., :-1].to(value.dtype)
        with self._dropout_generator():
            weights = torch.nn.functional.dropout(weights, self.attention_dropout.p, self.training)
        return weights @ value

    def _dropout_generator(self) -> AbstractContextManager[None]:
        """Tensor-parallel ranks hold different heads and drop each on its own; with sequence parallelism all do."""
        if self.config.sequence_parallel or not (self.training and self.attention_dropout.p):
            return nullcontext()
        fork: AbstractContextManager[None] = tensor_parallel.get_cuda_rng_tracker().fork()
        return fork


def _biased(bias: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """What is added to the scores for a bias where only some may be attended to."""
    return bias if allowed is None else torch.where(allowed, bias, -math.inf)


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent attention with right gradients under tensor parallelism.

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
        """Choose what projects, and what norms."""
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


class SequentialExperts(SequentialMLP):
    """Megatron's experts one by one, drawn on the CPU as one rank would draw them all.

    There all ranks have one random state: each rank of expert parallelism in megatron-core 0.19.2 draws the same ones.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        on_cpu = config.use_cpu_initialization and config.perform_initialization
        ranks, rank = (pg_collection.ep.size(), pg_collection.ep.rank()) if on_cpu else (1, 0)
        super().__init__(num_local_experts * ranks, config, submodules, pg_collection, name)
        self.num_local_experts = num_local_experts
        self.local_experts = self.local_experts[rank * num_local_experts :][:num_local_experts]


class _GroupedLinear(_HasExtraState):
    """One matrix for each expert of a rank, named as Transformer Engine names them: ``weight0``, ``weight1``, ...

    The exchange of tokens between the ranks, of expert-tensor parallelism too, is the token dispatcher's work.
    """

    split: int
    """The dimension of a weight, [output, input], that expert-tensor parallelism splits."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], object],
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.num_gemms = num_gemms
        self.skip_bias_add = skip_bias_add
        self.groups = pg_collection
        self.has_bias = bias
        self.shape = [output_size, input_size]
        self.init_method = init_method
        self.on_cpu = config.use_cpu_initialization
        # A rank's part of a gated layer's first matrix is one of the gate and one of what is gated.
        gated = self.split == 0 and config.gated_linear_unit and config.moe_mlp_glu_interleave_size is None
        self.stride = 2 if gated else 1
        own_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        shape = list(self.shape)
        shape[self.split] = divide(shape[self.split], pg_collection.expt_tp.size())
        placed = {} if self.on_cpu else {"device": torch.cuda.current_device()}
        make = partial(torch.empty, dtype=config.params_dtype, **placed)
        for expert in range(num_gemms):
            parts = {"weight": (make(*shape), True)} | ({"bias": (make(shape[0]), self.split == 0)} if bias else {})
            for kind, (empty, is_split) in parts.items():
                parameter = torch.nn.Parameter(empty)
                if is_split:
                    set_tensor_model_parallel_attributes(
                        parameter, is_parallel=True, dim=self.split, stride=self.stride
                    )
                parameter.allreduce = not own_groups  # type: ignore[attr-defined]
                self.register_parameter(f"{kind}{expert}", parameter)
        if config.perform_initialization:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights as the configuration says, and set biases to zero."""
        for name, parameter in self.named_parameters():
            if name.startswith("bias"):
                parameter.zero_()
            elif not self.on_cpu:
                with tensor_parallel.get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    self.init_method(parameter)
        if self.on_cpu:
            self._draw_on_cpu()

    def _draw_on_cpu(self) -> None:
        """Draw the weights of all experts and keep this rank's part of its own, as Megatron's layers draw the whole.

        All ranks have one random state here: each would draw the same experts.
        """
        ranks, rank = self.groups.expt_tp.size(), self.groups.expt_tp.rank()
        own = {self.groups.ep.rank() * self.num_gemms + index: index for index in range(self.num_gemms)}
        for expert in range(self.groups.ep.size() * self.num_gemms):
            whole = torch.empty(self.shape, device=self.get_parameter("weight0").device)
            self.init_method(whole)
            if expert in own:
                pieces = whole.chunk(ranks * self.stride, dim=self.split)
                self.get_parameter(f"weight{own[expert]}").copy_(torch.cat(pieces[rank::ranks], dim=self.split))

    def forward(self, tokens: torch.Tensor, tokens_per_expert: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply.

        Args:
            tokens: [tokens, input], those of the first expert first.
            tokens_per_expert: How many there are of each.

        Returns:
            [tokens, output]; and the biases, [experts, output], if the caller is to add them.
        """
        weights: list[torch.Tensor] = [getattr(self, f"weight{expert}") for expert in range(self.num_gemms)]
        parts = tokens.split(tokens_per_expert)
        if not self.has_bias:
            return torch.cat([linear(part, weight) for part, weight in zip(parts, weights, strict=True)]), None
        biases: list[torch.Tensor] = [getattr(self, f"bias{expert}") for expert in range(self.num_gemms)]
        added = [None if self.skip_bias_add else bias for bias in biases]
        outputs = [linear(part, weight, bias) for part, weight, bias in zip(parts, weights, added, strict=True)]
        return torch.cat(outputs), torch.stack(biases) if self.skip_bias_add else None

    def backward_dw(self) -> None:
        """Nothing is left to compute: gradients of weights are not delayed."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe each expert's parameters as parts of those of all experts, as Megatron's other experts do."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        experts = self.groups.ep.size() * self.num_gemms
        described = {}
        for index in range(self.num_gemms):
            expert = self.groups.ep.rank() * self.num_gemms + index
            alone = metadata.get("singleton_local_shards", False)
            offsets = sharded_offsets if alone else (*sharded_offsets, (len(sharded_offsets), expert, experts))
            kinds = ("weight", "bias") if self.has_bias else ("weight",)
            parts = make_sharded_tensors_for_checkpoint(
                {kind: getattr(self, f"{kind}{index}") for kind in kinds} | {"_extra_state": None},
                "",
                {"weight": self.split} | ({"bias": 0} if self.split == 0 else {}),
                offsets,
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(parts, "", f"{expert}.{prefix}" if alone else prefix)
            for kind, part in parts.items():
                part.replica_id = (*part.replica_id[:2], self.groups.expt_dp.rank())
                # the first expert's extra state has the name that torch gives it, those after it a number
                number = "" if kind == "_extra_state" and index == 0 else index
                described[f"{prefix}{kind}{number}"] = part
        return described

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for index in range(1, self.num_gemms):
            state_dict.pop(f"{prefix}_extra_state{index}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ColumnParallelGroupedLinear(_GroupedLinear):
    """The first matrices of the experts: expert-tensor parallelism splits their output."""

    split = 0


class RowParallelGroupedLinear(_GroupedLinear):
    """The second matrices of the experts: expert-tensor parallelism splits their input."""

    split = 1
