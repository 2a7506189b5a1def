"""Which layers a hybrid model is built from, and Mamba layers without Mamba's CUDA kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_mlp_module_spec_for_backend
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import log_single_rank
from torch.nn.functional import silu, softplus

from bridge.config.schema.hybrid_pattern import prediction_depths
from bridge.dist.process.gpu_libraries import why_missing
from bridge.models.backend.choice import (
    refuse_beyond_pytorch,
    require_transformer_engine,
    uses_transformer_engine,
    wants_pytorch_attention,
)
from bridge.models.backend.norms import fused_norm, torch_norm
from bridge.models.backend.provider import PyTorchSpecProvider, with_pytorch_attention, with_pytorch_layers
from bridge.models.backend.scan import GatedRMSNorm, causal_conv1d, selective_scan
from bridge.models.errors import LayerSpecError, UnsupportedError
from bridge.models.mamba.pattern import refuse_layers

try:
    from megatron.core.ssm import mamba_mixer
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
except RuntimeError as error:  # of triton 3.2 and 3.3, which look for a GPU where a kernel is declared
    raise UnsupportedError(
        f"megatron-core's Mamba layers cannot be imported without a GPU beside torch {torch.__version__}: use "
        "torch 2.8 or later"
    ) from error

if TYPE_CHECKING:
    from bridge.models.mamba import MambaModelConfig

logger = logging.getLogger(__name__)

_NEED_TRANSFORMER_ENGINE = "+DG"


def stack_spec(config: MambaModelConfig) -> ModuleSpec:
    """Return the layers of a model: those the configuration gives, or the default ones.

    Raises:
        UnsupportedError: The layers at hand cannot do what the configuration asks for.
        LayerSpecError: What the configuration gives is not a spec.
    """
    given = config.hybrid_stack_spec
    if given is None:
        spec: Any = default_stack_spec(config)
    elif isinstance(given, ModuleSpec):  # before callable(): a ModuleSpec is also callable
        spec = given
    elif callable(given):
        make = cast(Callable[..., object], given)
        spec = make(config) if inspect.signature(make).parameters else make()
        if not isinstance(spec, ModuleSpec):
            name = getattr(given, "__qualname__", repr(given))
            raise LayerSpecError(f"hybrid_stack_spec {name} returned {spec!r}: it must return a ModuleSpec")
    else:
        raise LayerSpecError(f"hybrid_stack_spec is {given!r}: give a ModuleSpec, a function that returns one, or None")
    if wants_pytorch_attention(config.transformer):
        spec = _with_pytorch_attention(spec)
    return cast(ModuleSpec, _with_mixer(spec))


def _with_pytorch_attention(stack: ModuleSpec) -> ModuleSpec:
    """Return a copy of a stack whose attention is computed by plain PyTorch, in the kinds of layers that have any."""
    layers = stack.submodules
    if not isinstance(layers, HybridStackSubmodules):
        return stack
    swapped: dict[str, Any] = {
        kind: with_pytorch_attention(layer)
        for kind in ("attention_layer", "mla_layer")
        if isinstance(layer := getattr(layers, kind), ModuleSpec)
    }
    return dataclasses.replace(stack, submodules=dataclasses.replace(layers, **swapped))


def default_stack_spec(config: MambaModelConfig) -> ModuleSpec:
    """Choose the layers by what the configuration asks for.

    In this order: inference-optimised, ModelOpt, Transformer Engine, PyTorch.

    Raises:
        UnsupportedError: The layers at hand cannot do what the configuration asks for.
    """
    transformer = config.transformer
    if transformer.transformer_impl == "inference_optimized":
        require_transformer_engine("transformer_impl: inference_optimized")
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_inference_stack_spec

        return hybrid_inference_stack_spec
    if uses_transformer_engine(transformer):
        if config.restore_modelopt_state:
            return _modelopt_spec()
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

        return hybrid_stack_spec
    refuse_beyond_pytorch(transformer)
    refuse_layers(config.layer_pattern, _NEED_TRANSFORMER_ENGINE, "they need Transformer Engine, install it")
    if prediction_depths(config.layer_pattern):
        require_transformer_engine("multi-token prediction of a hybrid model")
    return pytorch_stack_spec(transformer)


def _modelopt_spec() -> ModuleSpec:
    # Imported here: it takes ModelOpt's own dependencies, which only a model with a ModelOpt state needs.
    from megatron.core.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec

    return get_hybrid_stack_modelopt_spec(local_core_attention=False, remap_te_layernorm=False)


def pytorch_stack_spec(transformer: TransformerConfig) -> ModuleSpec:
    """Return layers without Transformer Engine; in checkpoints their parameters have the names of those with it."""
    # A layer of a GPT is attention and MLP; here each is a layer of its own.
    whole = get_gpt_layer_local_spec(
        normalization=transformer.normalization,
        qk_layernorm=transformer.qk_layernorm,
        qk_l2_norm=transformer.qk_l2_norm,
    )
    parts = cast(TransformerLayerSubmodules, whole.submodules)
    attention = dataclasses.replace(parts, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp)
    mlp = dataclasses.replace(
        parts, input_layernorm=IdentityOp, self_attention=IdentityOp, self_attn_bda=IdentityFuncOp
    )
    experts = dataclasses.replace(
        mlp,
        mlp=get_mlp_module_spec_for_backend(
            PyTorchSpecProvider(),
            num_experts=transformer.num_moe_experts or 1,
            moe_grouped_gemm=transformer.moe_grouped_gemm,
        ),
    )
    mamba = MambaLayerSubmodules(
        norm=fused_norm,
        mixer=ModuleSpec(
            module=MambaMixer,
            submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
        ),
        mamba_bda=get_bias_dropout_add,  # type: ignore[arg-type]  # a function, as in Megatron's own specs
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    layers = HybridStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=experts),
    )
    return ModuleSpec(
        module=TorchHybridStack,
        submodules=with_pytorch_layers(layers, grouped_experts=transformer.moe_grouped_gemm),
    )


class TorchHybridStack(HybridStack):
    """Megatron's stack of hybrid layers, whose last norm is torch's: there it is Transformer Engine's, by name."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        post_layer_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.add_module("final_norm", torch_norm(config, config.hidden_size, eps=config.layernorm_epsilon))


def has_mamba_kernels() -> bool:
    """Whether the CUDA kernels of Mamba can be used: mamba-ssm and causal-conv1d, which it calls."""
    return bool(mamba_mixer.HAVE_MAMBA_SSM) and mamba_mixer.causal_conv1d_fn is not None


def _with_mixer(spec: Any) -> Any:
    """A copy of a spec with the mixers of this module in place of Megatron's."""
    if spec is MambaMixer:
        if not has_mamba_kernels():
            _report_fallback()
        return WrappableMambaMixer if has_mamba_kernels() else TorchMambaMixer
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        fields = [field.name for field in dataclasses.fields(spec) if field.init]
        return dataclasses.replace(spec, **{name: _with_mixer(getattr(spec, name)) for name in fields})
    return spec


@functools.cache
def _report_fallback() -> None:
    missing = why_missing("mamba_ssm", "causal_conv1d")
    message = f"mamba-ssm and causal-conv1d {missing}: computing Mamba layers in PyTorch"
    log_single_rank(logger, logging.WARNING, message)


class WrappableMambaMixer(MambaMixer):
    """Megatron's mixer, whose parameters may be replaced after it was made, and drawn anew.

    megatron-core 0.19.2 computes with the parameters that the mixer was made with, so that those which torch FSDP2
    puts in their places get no gradients.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = inspect.signature(MambaMixer.__init__).bind(self, *args, **kwargs)
        given.apply_defaults()
        self._drawn_from: Mapping[str, Any] = given.arguments
        for parameter in (self.A_log, self.D):
            parameter.keep_fp32 = True  # type: ignore[attr-defined]

    @property
    def initialisers(self) -> Mapping[str, Callable[[torch.Tensor], object]]:
        """How each parameter of the mixer itself is drawn, by name."""
        return {"A_log": self._draw_decay, "dt_bias": self._draw_step} | dict.fromkeys(
            ("conv1d_weight", "conv1d_bias"), self._draw_filter
        )

    def _draw_decay(self, log_rate: torch.Tensor) -> None:
        log_rate.uniform_(*self._drawn_from["A_init_range"]).log_()

    def _draw_step(self, bias: torch.Tensor) -> None:
        """Draw the steps evenly by their logarithms; the bias is what softplus makes them of."""
        low, high, floor = (self._drawn_from[name] for name in ("dt_min", "dt_max", "dt_init_floor"))
        step = bias.uniform_(math.log(low), math.log(high)).exp_().clamp_(min=floor)
        step.add_(step.neg().expm1().neg_().log_())

    def _draw_filter(self, filter_or_bias: torch.Tensor) -> None:
        bound = 1 / math.sqrt(self.d_conv)  # each channel has a filter of its own
        filter_or_bias.uniform_(-bound, bound)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix along the sequence, with the parameters as they are now; see ``MambaMixer``."""
        for name in ("conv1d_weight", "conv1d_bias", "dt_bias", "A_log", "D"):
            setattr(self.cp, f"{name}_cp1", getattr(self, name))
        return cast(tuple[torch.Tensor, torch.Tensor | None], super().forward(*args, **kwargs))


class TorchMambaMixer(WrappableMambaMixer):
    """A mixer in plain PyTorch, see ``bridge.models.backend.scan``; for training and for scoring, not to generate tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _without_kernels():
            super().__init__(*args, **kwargs)

    def _ssm_training(self, zxBCdt: torch.Tensor, packed_seq_params: PackedSeqParams | None = None) -> torch.Tensor:  # noqa: N803 - Megatron's names
        if packed_seq_params is not None:
            raise UnsupportedError(
                "Mamba layers in PyTorch cannot do packed sequences: install mamba-ssm and causal-conv1d, "
                "or give each sequence its own row"
            )
        return self._mix(zxBCdt)

    def _ssm_prefill(  # type: ignore[override]  # what more Megatron passes is for generation
        self,
        zxBCdt: torch.Tensor,  # noqa: N803
        conv_state: torch.Tensor | None = None,
        ssm_state: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        if conv_state is not None or ssm_state is not None:
            raise UnsupportedError(
                "Mamba layers in PyTorch cannot generate token by token: install mamba-ssm and causal-conv1d"
            )
        return self._mix(zxBCdt)

    def _mix(self, projected: torch.Tensor) -> torch.Tensor:
        """Convolve, scan, gate and normalise what the input projection gave, [sequence, batch, channels]."""
        heads, channels, state = self.cp.nheads_local_tpcp, self.cp.d_inner_local_tpcp, self.d_state
        groups = self.cp.ngroups_local_tpcp
        gate, convolved, dt = projected.transpose(0, 1).split([channels, channels + 2 * groups * state, heads], dim=-1)
        convolved = silu(causal_conv1d(convolved, self.cp.get_conv1d_weight(), self.cp.get_conv1d_bias()))
        x, b, c = convolved.split([channels, groups * state, groups * state], dim=-1)
        x = x.unflatten(-1, (heads, -1))
        y, _ = selective_scan(
            x,
            softplus(dt.float() + self.cp.get_dt_bias().float()),
            -self.cp.get_A_log().float().exp(),
            b.unflatten(-1, (groups, -1)),
            c.unflatten(-1, (groups, -1)),
            chunk_size=self.chunk_size,
        )
        skip = self.cp.get_D().float().view(heads, -1)  # one for a head, or one for each of its channels
        gated = (y.float() + skip * x.float()).flatten(2) * silu(gate.float())
        mixed: torch.Tensor = self.cp.post_conv_ssm(gated.to(projected.dtype).transpose(0, 1).contiguous())
        return cast(torch.Tensor, self.norm(mixed)) if self.rmsnorm else mixed


class _ShardedGatedNorm(GatedRMSNorm):
    """A gated norm that knows how tensor parallelism splits its weight."""

    tp_group: torch.distributed.ProcessGroup  # the mixer sets it

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the weight for Megatron's distributed checkpoints."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return sharded


@contextlib.contextmanager
def _without_kernels() -> Iterator[None]:
    """While a mixer is made: megatron-core 0.19.2 refuses to make one, and has no norm for it, without mamba-ssm."""
    replaced = {"HAVE_MAMBA_SSM": True, "ExtendedRMSNorm": _ShardedGatedNorm}
    before = {name: getattr(mamba_mixer, name) for name in replaced}
    vars(mamba_mixer).update(replaced)
    try:
        yield
    finally:
        vars(mamba_mixer).update(before)
