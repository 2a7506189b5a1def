"""GPTs with experts: Mixtral, Qwen2-MoE, Qwen3-MoE and GPT-OSS; and the rows that all architectures with experts share.

A router of transformers takes the softmax of all experts' scores and then the best ones; whether it normalises their
weights makes the difference: it is the softmax of the best ones' scores (``moe_router_pre_softmax`` off), or not (on).
"""

from __future__ import annotations

from collections.abc import Sequence

from bridge.models.huggingface.common import (
    GATED,
    NO_BIASES,
    NO_HIDDEN_DROPOUT,
    activation,
    attention_dropout,
    heads,
    language_model,
    rms_norm,
    sizes,
)
from bridge.models.huggingface.dense import NO_ATTENTION_BIAS, QK_NORM
from bridge.models.huggingface.mapping import (
    COUNT,
    FLAG,
    GPT,
    INTEGERS,
    NUMBER,
    TEXT,
    Architecture,
    Name,
    Row,
    Translation,
    always,
    only,
    same,
    setting,
)
from bridge.models.huggingface.rope import ANY_TRANSFORMER, rotary
from bridge.models.huggingface.windows import window_by_switch, window_everywhere, window_in_turns

HOW_EXPERTS_RUN = (
    setting("transformer.moe_router_dtype", "fp32"),
    setting("transformer.moe_token_dispatcher_type", "alltoall"),
    setting("transformer.moe_grouped_gemm", True),
)


def experts(name: str, number: int | None, chosen: int | None) -> tuple[Row, ...]:
    """How many experts there are, and how many of them a token goes to.

    Args:
        name: The field with the number.
        number: What transformers takes for it where it is left out.
        chosen: Likewise for ``num_experts_per_tok``.
    """

    def write(t: Translation) -> None:
        if (experts := t["transformer.num_moe_experts"]) is None:
            raise t.refuse("transformer.num_moe_experts", "this architecture has experts: set their number")
        t[name] = experts

    def read(t: Translation) -> None:
        t["transformer.num_moe_experts"] = t[name]

    def read_chosen(t: Translation) -> None:
        if (found := t["num_experts_per_tok"]) is None:
            raise t.refuse("num_experts_per_tok", "missing: how many experts does a token go to?")
        t["transformer.moe_router_topk"] = found

    def write_chosen(t: Translation) -> None:
        t["num_experts_per_tok"] = t["transformer.moe_router_topk"]

    return (
        Row({name: Name(COUNT, number)}, ("transformer.num_moe_experts",), read, write),
        Row({"num_experts_per_tok": Name(COUNT, chosen)}, ("transformer.moe_router_topk",), read_chosen, write_chosen),
        *HOW_EXPERTS_RUN,
    )


def expert_width(name: str, default: int) -> Row:
    """The width of an expert's feed-forward layer; where a document leaves it out, it is that of other layers."""

    def read(t: Translation) -> None:
        t["transformer.moe_ffn_hidden_size"] = t[name]

    def write(t: Translation) -> None:
        t[name] = _expert_width(t)

    return Row({name: Name(COUNT, default)}, ("transformer.moe_ffn_hidden_size",), read, write)


def _expert_width(t: Translation) -> int:
    width: int | None = t["transformer.moe_ffn_hidden_size"] or t["transformer.ffn_hidden_size"]
    return width or 4 * int(t["transformer.hidden_size"])


def _of_experts_alone(default: int) -> tuple[Row, ...]:
    """All layers have experts, and ``intermediate_size`` is their width."""

    def read(t: Translation) -> None:
        t["transformer.ffn_hidden_size"] = t["transformer.moe_ffn_hidden_size"] = t["intermediate_size"]

    def write(t: Translation) -> None:
        t["intermediate_size"] = _expert_width(t)

    fields = ("transformer.ffn_hidden_size", "transformer.moe_ffn_hidden_size")
    return (
        Row({"intermediate_size": Name(COUNT, default)}, fields, read, write),
        always("transformer.moe_layer_freq", 1, "all layers of this architecture have experts"),
    )


def softmax_router(*, normalises: bool | None) -> Row:
    """A router that takes the softmax of scores.

    Args:
        normalises: What transformers takes for ``norm_topk_prob`` where it is left out; None if the architecture has no
            such field and normalises.
    """

    def read(t: Translation) -> None:
        pre_softmax = normalises is not None and not t["norm_topk_prob"]
        if not pre_softmax and t["num_experts_per_tok"] == 1:
            t.refuse("num_experts_per_tok", "Megatron-Core does not give all weight to a single expert: at least 2")
        t["transformer.moe_router_pre_softmax"] = pre_softmax

    def write(t: Translation) -> None:
        pre_softmax = t["transformer.moe_router_pre_softmax"]
        if normalises is not None:
            t["norm_topk_prob"] = not pre_softmax
        elif pre_softmax:
            t.refuse("transformer.moe_router_pre_softmax", "this architecture normalises weights: it can only be false")

    names = {} if normalises is None else {"norm_topk_prob": Name(FLAG, normalises)}
    return Row(names, ("transformer.moe_router_pre_softmax",), read, write)


def balance(name: str, default: float | None, kind: str, *, note: str = "") -> Row:
    """The weight of the loss that balances experts in training.

    Args:
        name: The field.
        default: What transformers takes where it is left out; None for no such loss.
        kind: The value of ``moe_router_load_balancing_type``.
        note: What is to be said of it.
    """

    def read(t: Translation) -> None:
        if (weight := t[name]) is None:
            return
        t["transformer.moe_aux_loss_coeff"] = float(weight)
        t["transformer.moe_router_load_balancing_type"] = kind
        if note:
            t.note(f"$.{name} is taken over: {note}")

    def write(t: Translation) -> None:
        weight, balanced = t["transformer.moe_aux_loss_coeff"], t["transformer.moe_router_load_balancing_type"]
        if isinstance(weight, list) or (weight and balanced != kind):
            t.note("$.transformer.moe_aux_loss_coeff is left out: config.json does not know this way of balancing")
        elif weight or default is not None:
            t[name] = weight

    fields = ("transformer.moe_aux_loss_coeff", "transformer.moe_router_load_balancing_type")
    return Row({name: Name(NUMBER, default)}, fields, read, write)


_BALANCE = balance(
    "router_aux_loss_coef",
    0.001,
    "aux_loss",
    note="Megatron-Core's loss is of each layer by itself, that of transformers of all together, and top-k times it",
)


def which_layers(t: Translation) -> list[int]:
    """For each layer of a document, 1 if it has experts."""
    layers: int = t["transformer.num_layers"]
    frequency: int | Sequence[int] = t["transformer.moe_layer_freq"]
    if isinstance(frequency, int):
        return [int(index % frequency == 0) for index in range(layers)]
    if len(frequency) != layers:
        raise t.refuse("transformer.moe_layer_freq", f"has {len(frequency)} layers, num_layers is {layers}")
    return list(frequency)


def frequency(has_experts: Sequence[bool]) -> int | list[int]:
    """How a document says which layers have experts."""
    return 1 if all(has_experts) else [int(one) for one in has_experts]


def _read_sparse_layers(t: Translation) -> None:
    every, dense = t["decoder_sparse_step"], t["mlp_only_layers"] or ()
    has_experts = [(index + 1) % every == 0 and index not in dense for index in range(t["num_hidden_layers"])]
    if not any(has_experts):
        raise t.refuse("decoder_sparse_step", "no layer has experts, and Megatron-Core wants some")
    t["transformer.moe_layer_freq"] = frequency(has_experts)


def _write_sparse_layers(t: Translation) -> None:
    has_experts = which_layers(t)
    sparse = [index + 1 for index, one in enumerate(has_experts) if one]
    every = next(step for step in range(min(sparse, default=1), 0, -1) if not any(at % step for at in sparse))
    t["decoder_sparse_step"] = every
    t["mlp_only_layers"] = [index for index, one in enumerate(has_experts) if not one and (index + 1) % every == 0]


_SPARSE_LAYERS = Row(
    {"decoder_sparse_step": Name(COUNT, 1), "mlp_only_layers": Name(INTEGERS)},
    ("transformer.moe_layer_freq",),
    _read_sparse_layers,
    _write_sparse_layers,
)


def _shared_expert(default: int) -> Row:
    """One expert for all tokens, behind a gate."""

    def read(t: Translation) -> None:
        t["transformer.moe_shared_expert_intermediate_size"] = t["shared_expert_intermediate_size"]
        t["transformer.moe_shared_expert_gate"] = True

    def write(t: Translation) -> None:
        width = t["transformer.moe_shared_expert_intermediate_size"]
        if width is None:
            raise t.refuse("transformer.moe_shared_expert_intermediate_size", "this architecture has a shared expert")
        if not t["transformer.moe_shared_expert_gate"]:
            t.refuse("transformer.moe_shared_expert_gate", "this architecture has a gate: it can only be true")
        t["shared_expert_intermediate_size"] = width

    return Row(
        {"shared_expert_intermediate_size": Name(COUNT, default)},
        ("transformer.moe_shared_expert_intermediate_size", "transformer.moe_shared_expert_gate"),
        read,
        write,
    )


def _read_qkv_bias(t: Translation) -> None:
    t["transformer.add_qkv_bias"] = t["qkv_bias"]


def _write_qkv_bias(t: Translation) -> None:
    t["qkv_bias"] = t["transformer.add_qkv_bias"]


_QKV_BIAS = Row({"qkv_bias": Name(FLAG, True)}, ("transformer.add_qkv_bias",), _read_qkv_bias, _write_qkv_bias)

MIXTRAL = Architecture(
    model_type="mixtral",
    causal="MixtralForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=(
        *sizes(
            vocab_size=32000,
            max_position_embeddings=131072,
            num_hidden_layers=32,
            hidden_size=4096,
            num_attention_heads=32,
        ),
        *_of_experts_alone(14336),
        *heads(8),
        window_everywhere(None),
        rotary(1e6),
        *rms_norm("rms_norm_eps", 1e-5),
        GATED,
        NO_BIASES,
        activation("hidden_act", "silu"),
        *experts("num_local_experts", 8, 2),
        softmax_router(normalises=None),
        _BALANCE,
        only("router_jitter_noise", 0.0, NUMBER, "Megatron-Core puts noise on what routers read alone"),
        attention_dropout("attention_dropout", 0.0),
        NO_HIDDEN_DROPOUT,
        *language_model(tied=False),
    ),
    aliases={"num_experts": "num_local_experts"},
)

QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    causal="Qwen2MoeForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=(
        *sizes(
            vocab_size=151936,
            max_position_embeddings=32768,
            num_hidden_layers=24,
            hidden_size=2048,
            intermediate_size=5632,
            num_attention_heads=16,
        ),
        *heads(16),
        window_by_switch(in_turns=True),
        rotary(),
        *rms_norm("rms_norm_eps", 1e-6),
        GATED,
        NO_BIASES,
        _QKV_BIAS,
        activation("hidden_act", "silu"),
        *experts("num_experts", 60, 4),
        expert_width("moe_intermediate_size", 1408),
        _shared_expert(5632),
        _SPARSE_LAYERS,
        softmax_router(normalises=False),
        _BALANCE,
        attention_dropout("attention_dropout", 0.0),
        NO_HIDDEN_DROPOUT,
        *language_model(tied=False),
    ),
)

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    causal="Qwen3MoeForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=(
        *sizes(
            vocab_size=151936,
            max_position_embeddings=32768,
            num_hidden_layers=24,
            hidden_size=2048,
            intermediate_size=6144,
            num_attention_heads=32,
        ),
        *heads(4),
        window_by_switch(everywhere=True),
        rotary(),
        *rms_norm("rms_norm_eps", 1e-6),
        GATED,
        NO_BIASES,
        NO_ATTENTION_BIAS,
        *QK_NORM,
        activation("hidden_act", "silu"),
        *experts("num_experts", 128, 8),
        expert_width("moe_intermediate_size", 768),
        _SPARSE_LAYERS,
        softmax_router(normalises=False),
        _BALANCE,
        attention_dropout("attention_dropout", 0.0),
        NO_HIDDEN_DROPOUT,
        *language_model(tied=False),
    ),
    aliases={"num_local_experts": "num_experts"},
    ignored=frozenset(("max_window_layers",)),
)

GPT_OSS = Architecture(
    model_type="gpt_oss",
    causal="GptOssForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=(
        *sizes(
            vocab_size=201088,
            max_position_embeddings=131072,
            num_hidden_layers=36,
            hidden_size=2880,
            num_attention_heads=64,
        ),
        *_of_experts_alone(2880),
        *heads(8, 64),
        window_in_turns(128, lambda index: index % 2 == 0),
        rotary(
            150000.0,
            default={
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        ),
        always("transformer.softmax_type", "learnable", "each head of this architecture has a sink of attention"),
        *rms_norm("rms_norm_eps", 1e-5),
        GATED,
        always("transformer.add_bias_linear", True, "all linear layers of this architecture have biases"),
        only("attention_bias", True, FLAG, "Megatron-Core has biases in all linear layers or none"),
        always(
            "transformer.activation_func",
            "megatron.core.fusions.fused_bias_geglu.quick_gelu",
            "gates of this architecture are x * sigmoid(1.702 x)",
        ),
        only("hidden_act", "silu", TEXT, "experts of this architecture have a function of their own, which silu names"),
        only("swiglu_alpha", 1.702, NUMBER, "Megatron-Core's function has this slope"),
        same("swiglu_limit", "transformer.activation_func_clamp_value", NUMBER, 7.0),
        always("transformer.glu_linear_offset", 1.0, "this architecture adds one to what is gated"),
        *experts("num_local_experts", 128, 4),
        softmax_router(normalises=None),
        _BALANCE,
        attention_dropout("attention_dropout", 0.0),
        NO_HIDDEN_DROPOUT,
        *language_model(tied=False),
    ),
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    ignored=frozenset(("initial_context_length",)),  # unused: rope_scaling says it
)
