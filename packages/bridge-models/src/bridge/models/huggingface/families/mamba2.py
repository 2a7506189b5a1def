"""Mamba-2: Mamba layers only."""

from __future__ import annotations

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.dropout import NO_HIDDEN_DROPOUT
from bridge.models.huggingface.fields.language_model import language_model
from bridge.models.huggingface.fields.mamba import IGNORED_BY_MAMBA, mamba_layers
from bridge.models.huggingface.fields.row import Row, always, only, same
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.targets import MAMBA
from bridge.models.huggingface.translation import COUNT, FLAG, Name, Translation
from bridge.models.huggingface.weights.mamba import hybrid


def _read_heads(t: Translation) -> None:
    heads = t["num_heads"]
    if heads * t["head_dim"] != t["expand"] * t["hidden_size"]:
        t.refuse("num_heads", "num_heads * head_dim must equal expand * hidden_size")
    t["transformer.mamba_num_heads"] = heads
    # Unused, but Megatron-Core requires a multiple of the tensor-parallel size.
    t["transformer.num_attention_heads"] = heads
    t["transformer.mamba_head_dim"] = t["head_dim"]


def _write_heads(t: Translation) -> None:
    size, channels = t["transformer.hidden_size"], t["transformer.mamba_head_dim"]
    heads = t["transformer.mamba_num_heads"] or 2 * size // channels
    if heads * channels % size:
        t.refuse(
            "transformer.mamba_num_heads",
            f"all heads together have {heads * channels} channels: must be a multiple of {size}",
        )
    t["num_heads"], t["head_dim"], t["expand"] = heads, channels, heads * channels // size


def _write_pattern(t: Translation) -> None:
    pattern = t["hybrid_layer_pattern"]
    if pattern is not None and set(pattern) - set("M|"):
        t.refuse("hybrid_layer_pattern", f"{t.model_type} has only Mamba layers: must be M for each layer")


MAMBA2 = Architecture(
    model_type="mamba2",
    model_class="Mamba2ForCausalLM",
    target=MAMBA,
    rows=(
        *sizes(vocab_size=32768, num_hidden_layers=64, hidden_size=4096),
        Row({}, ("hybrid_layer_pattern",), lambda t: None, _write_pattern),
        always("position_embedding_type", "none", "{model_type} has no position embeddings"),
        Row(
            {"num_heads": Name(COUNT, 128), "head_dim": Name(COUNT, 64), "expand": Name(COUNT, 2)},
            ("transformer.mamba_num_heads", "transformer.mamba_head_dim", "transformer.num_attention_heads"),
            _read_heads,
            _write_heads,
        ),
        same("state_size", "transformer.mamba_state_dim", COUNT, 128),
        same("n_groups", "transformer.mamba_num_groups", COUNT, 8),
        *mamba_layers(convolution="use_conv_bias", biases=("use_bias",), function="hidden_act"),
        only("rms_norm", True, FLAG, "Megatron-Core's Mamba layers have a gated norm"),
        same("residual_in_fp32", "transformer.fp32_residual_connection", FLAG, True),
        NO_HIDDEN_DROPOUT,
        *language_model(tied=False, std=0.1),
    ),
    weights=hybrid,
    base="backbone.",
    unused_tensors=(),
    # transformers normalises after the gate whatever norm_before_gate is, and derives intermediate_size
    ignored=IGNORED_BY_MAMBA | {"norm_before_gate", "intermediate_size", "time_step_init_scheme", "time_step_scale"},
)
