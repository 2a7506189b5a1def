"""Mamba's mixer, with or without Mamba's CUDA kernels."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch.nn.functional import silu, softplus

from bridge.dist.process.gpu_libraries import explain_missing
from bridge.models.backend.choice import report_fallback
from bridge.models.backend.scan import GatedRMSNorm, causal_conv1d, selective_scan
from bridge.models.backend.specs import SpecT, replace_modules
from bridge.models.errors import UnsupportedError

try:
    from megatron.core.ssm import mamba_mixer
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
except RuntimeError as error:  # triton 3.2 and 3.3 need a GPU to declare a kernel
    raise UnsupportedError(
        f"megatron-core's Mamba layers cannot be imported without a GPU with torch {torch.__version__}: "
        "upgrade torch to 2.8 or later"
    ) from error


def has_mamba_kernels() -> bool:
    """Return whether Mamba's CUDA kernels, mamba-ssm and causal-conv1d, are available."""
    return bool(mamba_mixer.HAVE_MAMBA_SSM) and mamba_mixer.causal_conv1d_fn is not None


def local_mixer_spec() -> ModuleSpec:
    """Return the spec of Megatron's mixer with linear layers that do not require Transformer Engine."""
    parts = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    return ModuleSpec(module=MambaMixer, submodules=parts)


def replace_mixers(spec: SpecT) -> SpecT:
    """Return a copy of a spec with the mixers of this module in place of Megatron's; ``spec`` is not changed."""

    def replace(part: Any) -> Any:
        if part is not MambaMixer:
            return part
        if has_mamba_kernels():
            return WrappableMambaMixer
        missing = explain_missing("mamba_ssm", "causal_conv1d")
        report_fallback(f"mamba-ssm and causal-conv1d {missing}: computing Mamba layers in PyTorch")
        return TorchMambaMixer

    return replace_modules(spec, replace)


class WrappableMambaMixer(MambaMixer):
    """Megatron's mixer, with parameters that can be replaced after construction, and initialised again.

    megatron-core 0.19.2 keeps using the parameters from construction, so the sharded ones that torch FSDP2 puts in
    their place get no gradients.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Megatron does not keep the ranges that it initialises from.
        bound = inspect.signature(MambaMixer.__init__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        self._init_arguments: Mapping[str, Any] = bound.arguments
        # Megatron creates these in fp32; a cast of the model to half precision must not change that.
        for parameter in (self.A_log, self.D):
            parameter.keep_fp32 = True  # type: ignore[attr-defined]

    @property
    def initialisers(self) -> Mapping[str, Callable[[torch.Tensor], object]]:
        """The functions that initialise the mixer's own parameters in place, by name; see ``draw_weights``."""
        return {"A_log": self._draw_decay, "dt_bias": self._draw_step} | dict.fromkeys(
            ("conv1d_weight", "conv1d_bias"), self._draw_filter
        )

    def _draw_decay(self, log_rate: torch.Tensor) -> None:
        log_rate.uniform_(*self._init_arguments["A_init_range"]).log_()

    def _draw_step(self, bias: torch.Tensor) -> None:
        """Draw steps with uniformly distributed logarithms, and set the bias so that softplus(bias) is the step.

        The inverse of softplus is step + log(1 - exp(-step)).
        """
        low, high, floor = (self._init_arguments[name] for name in ("dt_min", "dt_max", "dt_init_floor"))
        step = bias.uniform_(math.log(low), math.log(high)).exp_().clamp_(min=floor)
        step.add_(step.neg().expm1().neg_().log_())

    def _draw_filter(self, filter_or_bias: torch.Tensor) -> None:
        bound = 1 / math.sqrt(self.d_conv)  # torch's bound for a convolution: each channel has its own filter
        filter_or_bias.uniform_(-bound, bound)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix along the sequence with the current parameters; see ``MambaMixer``."""
        for name in ("conv1d_weight", "conv1d_bias", "dt_bias", "A_log", "D"):
            setattr(self.cp, f"{name}_cp1", getattr(self, name))
        return cast(tuple[torch.Tensor, torch.Tensor | None], super().forward(*args, **kwargs))


class TorchMambaMixer(WrappableMambaMixer):
    """A mixer in plain PyTorch, see ``backend.scan``, for training and scoring. It does not generate token by token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _allow_missing_kernels():
            super().__init__(*args, **kwargs)

    def _ssm_training(self, zxBCdt: torch.Tensor, packed_seq_params: PackedSeqParams | None = None) -> torch.Tensor:  # noqa: N803 - Megatron's names
        if packed_seq_params is not None:
            raise UnsupportedError(
                "Mamba layers in PyTorch do not support packed sequences: install mamba-ssm and causal-conv1d, "
                "or give each sequence its own row"
            )
        return self._mix(zxBCdt)

    def _ssm_prefill(  # type: ignore[override]  # Megatron's other arguments are for generation
        self,
        zxBCdt: torch.Tensor,  # noqa: N803
        conv_state: torch.Tensor | None = None,
        ssm_state: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        if conv_state is not None or ssm_state is not None:
            raise UnsupportedError(
                "Mamba layers in PyTorch do not support token-by-token generation: install mamba-ssm and causal-conv1d"
            )
        return self._mix(zxBCdt)

    def _mix(self, projected: torch.Tensor) -> torch.Tensor:
        """Convolve, scan, gate and normalise the output of the input projection, [sequence, batch, channels].

        Its channels are the gate z, then x, B and C, which are convolved, then dt, as in Mamba-2.
        """
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
        skip = self.cp.get_D().float().view(heads, -1)  # one per head, or one per channel of a head
        gated = (y.float() + skip * x.float()).flatten(2) * silu(gate.float())
        mixed: torch.Tensor = self.cp.post_conv_ssm(gated.to(projected.dtype).transpose(0, 1).contiguous())
        return cast(torch.Tensor, self.norm(mixed)) if self.rmsnorm else mixed


class _ShardedGatedNorm(GatedRMSNorm):
    """A gated norm that describes to checkpoints how tensor parallelism splits its weight."""

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
def _allow_missing_kernels() -> Iterator[None]:
    """Let a mixer be constructed without mamba-ssm, which megatron-core 0.19.2 refuses, and give it a norm."""
    replaced = {"HAVE_MAMBA_SSM": True, "ExtendedRMSNorm": _ShardedGatedNorm}
    before = {name: getattr(mamba_mixer, name) for name in replaced}
    vars(mamba_mixer).update(replaced)
    try:
        yield
    finally:
        vars(mamba_mixer).update(before)
