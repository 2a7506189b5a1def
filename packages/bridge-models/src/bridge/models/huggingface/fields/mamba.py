"""Mamba layers."""

from __future__ import annotations

from bridge.models.huggingface.fields.biases import NO_BIASES
from bridge.models.huggingface.fields.norms import rms_norm_of
from bridge.models.huggingface.fields.row import Row, always, only
from bridge.models.huggingface.translation import COUNT, FLAG, LIST, NUMBER, TEXT, Name, Translation

_INFINITY = ({"__float__": "Infinity"}, float("inf"), "Infinity")


def _read_limit(t: Translation) -> None:
    limit = t["time_step_limit"]
    if limit is not None and not (len(limit) == 2 and limit[0] == 0 and limit[1] in _INFINITY):
        t.refuse("time_step_limit", "Megatron-Core does not clamp time steps: must be from 0 to infinity")


def mamba_layers(*, convolution: str, biases: tuple[str, ...], function: str) -> tuple[Row, ...]:
    """Return the rows of fields that Megatron-Core's Mamba layers fix to one value."""
    return (
        always("transformer.is_hybrid_model", True, "{model_type} has Mamba layers"),
        *rms_norm_of("layer_norm_epsilon", 1e-5, "norms in Megatron-Core's Mamba layers"),
        only("conv_kernel", 4, COUNT, "convolutions in Megatron-Core's Mamba layers span 4 tokens"),
        only(convolution, True, FLAG, "convolutions in Megatron-Core's Mamba layers have biases"),
        *(only(name, False, FLAG, "projections in Megatron-Core's Mamba layers have no biases") for name in biases),
        only(function, "silu", TEXT, "Megatron-Core's Mamba layers use SiLU"),
        Row({"time_step_limit": Name(LIST)}, (), _read_limit, lambda t: None),
        *(
            only(name, value, NUMBER, "Megatron-Core draws time steps from 0.001 to 0.1, and at least 0.0001")
            for name, value in (("time_step_min", 0.001), ("time_step_max", 0.1), ("time_step_floor", 1e-4))
        ),
        NO_BIASES,
    )


IGNORED_BY_MAMBA = frozenset(
    (
        "chunk_size",  # affects how a scan is computed, not its result
        "rescale_prenorm_residual",  # affects initial weights only
        "time_step_rank",
        "use_mamba_kernels",
    )
)
