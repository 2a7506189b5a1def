"""Experts: which layers have them, how many, and their sizes."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.models.huggingface.fields.row import Row, always, setting
from bridge.models.huggingface.translation import COUNT, INTEGER, INTEGERS, Name, Translation

EXPERT_SETTINGS = (
    setting("transformer.moe_router_dtype", "fp32"),
    setting("transformer.moe_token_dispatcher_type", "alltoall"),
    setting("transformer.moe_grouped_gemm", True),
)


def experts(name: str, number: int | None, chosen: int | None) -> tuple[Row, ...]:
    """Return the rows of the number of experts, and of experts per token.

    Args:
        name: The field with the number of experts.
        number: Its default in transformers.
        chosen: The default of ``num_experts_per_tok`` in transformers.
    """

    def write(t: Translation) -> None:
        if (experts := t["transformer.num_moe_experts"]) is None:
            raise t.refuse("transformer.num_moe_experts", f"missing: set the number of experts of {t.model_type}")
        t[name] = experts

    def read(t: Translation) -> None:
        t["transformer.num_moe_experts"] = t[name]

    def read_chosen(t: Translation) -> None:
        if (topk := t["num_experts_per_tok"]) is None:
            raise t.refuse("num_experts_per_tok", "missing: set the number of experts per token")
        t["transformer.moe_router_topk"] = topk

    def write_chosen(t: Translation) -> None:
        t["num_experts_per_tok"] = t["transformer.moe_router_topk"]

    return (
        Row({name: Name(COUNT, number)}, ("transformer.num_moe_experts",), read, write),
        Row({"num_experts_per_tok": Name(COUNT, chosen)}, ("transformer.moe_router_topk",), read_chosen, write_chosen),
        *EXPERT_SETTINGS,
    )


def expert_width(name: str, default: int) -> Row:
    """Return the row of an expert's hidden size, which defaults to ffn_hidden_size in a document."""

    def read(t: Translation) -> None:
        t["transformer.moe_ffn_hidden_size"] = t[name]

    def write(t: Translation) -> None:
        t[name] = _get_expert_width(t)

    return Row({name: Name(COUNT, default)}, ("transformer.moe_ffn_hidden_size",), read, write)


def _get_expert_width(t: Translation) -> int:
    width: int | None = t["transformer.moe_ffn_hidden_size"] or t["transformer.ffn_hidden_size"]
    return width or 4 * int(t["transformer.hidden_size"])


def experts_everywhere(default: int) -> tuple[Row, ...]:
    """Return the rows of models with experts in all layers; ``intermediate_size`` is their hidden size."""

    def read(t: Translation) -> None:
        t["transformer.ffn_hidden_size"] = t["transformer.moe_ffn_hidden_size"] = t["intermediate_size"]

    def write(t: Translation) -> None:
        t["intermediate_size"] = _get_expert_width(t)

    fields = ("transformer.ffn_hidden_size", "transformer.moe_ffn_hidden_size")
    return (
        Row({"intermediate_size": Name(COUNT, default)}, fields, read, write),
        always("transformer.moe_layer_freq", 1, "{model_type} has experts in all layers"),
    )


def list_expert_layers(t: Translation) -> list[int]:
    """Return 1 for each layer of a document with experts, 0 for the others.

    Raises:
        RefusedError: The list of layers has the wrong length.
    """
    layers: int = t["transformer.num_layers"]
    frequency: int | Sequence[int] = t["transformer.moe_layer_freq"]
    if isinstance(frequency, int):  # N: the first of every N layers, as in Megatron-Core
        return [int(index % frequency == 0) for index in range(layers)]
    if len(frequency) != layers:
        raise t.refuse("transformer.moe_layer_freq", f"has {len(frequency)} entries, but num_layers is {layers}")
    return list(frequency)


def encode_layers(has_experts: Sequence[bool]) -> int | list[int]:
    """Return ``moe_layer_freq``: 1 if all layers have experts, else a list of 0 and 1."""
    return 1 if all(has_experts) else [int(one) for one in has_experts]


def _read_sparse_layers(t: Translation) -> None:
    every, dense = t["decoder_sparse_step"], t["mlp_only_layers"] or ()
    has_experts = [(index + 1) % every == 0 and index not in dense for index in range(t["num_hidden_layers"])]
    if not any(has_experts):
        raise t.refuse("decoder_sparse_step", "leaves no layer with experts: Megatron-Core needs at least one")
    t["transformer.moe_layer_freq"] = encode_layers(has_experts)


def _write_sparse_layers(t: Translation) -> None:
    has_experts = list_expert_layers(t)
    sparse = [index + 1 for index, one in enumerate(has_experts) if one]
    # The largest step that reaches all layers with experts. Layers that it reaches without need are listed as dense.
    every = next(step for step in range(min(sparse, default=1), 0, -1) if not any(at % step for at in sparse))
    t["decoder_sparse_step"] = every
    t["mlp_only_layers"] = [index for index, one in enumerate(has_experts) if not one and (index + 1) % every == 0]


SPARSE_LAYERS = Row(
    {"decoder_sparse_step": Name(COUNT, 1), "mlp_only_layers": Name(INTEGERS)},
    ("transformer.moe_layer_freq",),
    _read_sparse_layers,
    _write_sparse_layers,
)


def dense_first_layers(default: int) -> Row:
    """Return the row of the number of first layers without experts."""

    def read(t: Translation) -> None:
        layers, dense = t["num_hidden_layers"], t["first_k_dense_replace"] or 0
        if dense >= layers:
            raise t.refuse("first_k_dense_replace", "leaves no layer with experts: Megatron-Core needs at least one")
        t["transformer.moe_layer_freq"] = encode_layers([index >= dense for index in range(layers)])

    def write(t: Translation) -> None:
        has_experts = list_expert_layers(t)
        if has_experts != sorted(has_experts):  # 0 for all dense layers, then 1
            raise t.refuse(
                "transformer.moe_layer_freq", f"{t.model_type} can only have layers without experts before all others"
            )
        t["first_k_dense_replace"] = has_experts.count(0)

    return Row(
        {"first_k_dense_replace": Name(INTEGER, default, null=True)}, ("transformer.moe_layer_freq",), read, write
    )


def shared_expert(default: int) -> Row:
    """Return the row of one gated shared expert."""

    def read(t: Translation) -> None:
        t["transformer.moe_shared_expert_intermediate_size"] = t["shared_expert_intermediate_size"]
        t["transformer.moe_shared_expert_gate"] = True

    def write(t: Translation) -> None:
        width = t["transformer.moe_shared_expert_intermediate_size"]
        if width is None:
            raise t.refuse(
                "transformer.moe_shared_expert_intermediate_size", f"missing: {t.model_type} has a shared expert"
            )
        if not t["transformer.moe_shared_expert_gate"]:
            t.refuse("transformer.moe_shared_expert_gate", f"{t.model_type} gates its shared expert: must be true")
        t["shared_expert_intermediate_size"] = width

    return Row(
        {"shared_expert_intermediate_size": Name(COUNT, default)},
        ("transformer.moe_shared_expert_intermediate_size", "transformer.moe_shared_expert_gate"),
        read,
        write,
    )


def shared_experts(default: int) -> Row:
    """Return the row of ungated shared experts, which Megatron-Core fuses into one."""

    def read(t: Translation) -> None:
        t["transformer.moe_shared_expert_intermediate_size"] = t["n_shared_experts"] * t["moe_intermediate_size"]

    def write(t: Translation) -> None:
        path = "transformer.moe_shared_expert_intermediate_size"
        width, each = t[path], t["transformer.moe_ffn_hidden_size"] or t["transformer.ffn_hidden_size"]
        if width is None or not each or width % each:
            raise t.refuse(
                path,
                f"must be a multiple of moe_ffn_hidden_size: {t.model_type} has shared experts of that size",
            )
        t["n_shared_experts"] = width // each

    fields = ("transformer.moe_shared_expert_intermediate_size",)
    return Row({"n_shared_experts": Name(COUNT, default)}, fields, read, write)
