"""Weights of experts: one tensor for each, or one tensor that stacks those of all."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.models.huggingface.weights.feed_forward import NAMES, Names, feed_forward
from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Entry, Part, Weight, linear, same, stack


def experts(
    sizes: Sizes,
    mcore: str,
    hf: str,
    *,
    names: Names = NAMES,
    module: str = "mlp",
    shared: str = "shared_experts",
) -> Iterator[Entry]:
    """Yield the weights of experts, their router and the shared expert.

    Args:
        sizes: Sizes of the model.
        mcore: Prefix of Megatron-Core's names.
        hf: Prefix of transformers' names.
        names: The projections of an expert, where experts have tensors of their own.
        module: The module in place of ``mlp`` in folders that have tensors for each expert.
        shared: The module of the shared expert.
    """
    assert sizes.experts is not None
    each = f"{hf.removesuffix('mlp.')}{module}." if hf.endswith("mlp.") else hf
    router = (sizes.experts, sizes.hidden)
    forms = dict.fromkeys((f"{each}gate.weight", f"{hf}gate.weight"))
    yield Weight(f"{mcore}router.weight", router, tuple(stack([name], router) for name in forms))
    if sizes.router_bias:
        yield same(f"{mcore}router.expert_bias", f"{hf}gate.e_score_correction_bias", (sizes.experts,))
    width = sizes.expert_latent or sizes.hidden
    if sizes.expert_latent is not None:
        yield from linear(f"{mcore}fc1_latent_proj", f"{hf}fc1_latent_proj", width, sizes.hidden, bias=False)
        yield from linear(f"{mcore}fc2_latent_proj", f"{hf}fc2_latent_proj", sizes.hidden, width, bias=False)
    for expert in range(sizes.experts):
        yield from _expert(sizes, expert, f"{mcore}experts.", each, f"{hf}experts.", names=names, width=width)
    if sizes.shared_width is not None:
        prefix = f"{mcore}shared_experts."
        yield from feed_forward(sizes, prefix, f"{hf}{shared}.", width=sizes.shared_width)
        if sizes.shared_gate:
            yield same(f"{prefix}gate_weight", f"{hf}{shared}_gate.weight", (1, sizes.hidden))


def _expert(
    sizes: Sizes, expert: int, mcore: str, hf: str, packed: str, *, names: Names, width: int
) -> Iterator[Weight]:
    """Yield the matrices of an expert, from tensors of its own or from those of all experts that version 5 packs."""
    gate, up, down = names
    first = [gate, up] if sizes.gated else [up]
    inner = sizes.expert_width
    rows = len(first) * inner
    count = sizes.experts or 0
    together = "gate_up_proj" if sizes.gated else "up_proj"
    yield Weight(
        f"{mcore}linear_fc1.weight{expert}",
        (rows, width),
        (
            stack([f"{hf}experts.{expert}.{name}.weight" for name in first], (inner, width)),
            (Part(f"{packed}{together}", (count, rows, width), range(rows), index=expert),),
        ),
    )
    yield Weight(
        f"{mcore}linear_fc2.weight{expert}",
        (width, inner),
        (
            stack([f"{hf}experts.{expert}.{down}.weight"], (width, inner)),
            (Part(f"{packed}down_proj", (count, width, inner), range(width), index=expert),),
        ),
    )


def packed_experts(sizes: Sizes, mcore: str, hf: str) -> Iterator[Entry]:
    """Yield the weights of GPT-OSS's experts: stored as [expert, input, output], with alternating gate and up rows."""
    count, hidden, inner = sizes.experts or 0, sizes.hidden, sizes.expert_width
    yield from linear(f"{mcore}router", f"{hf}router", count, hidden, bias=True)
    alternating = range(0, 2 * inner, 2), range(1, 2 * inner, 2)
    for expert in range(count):
        for name, tensor, rows, columns in (
            ("linear_fc1", "gate_up_proj", alternating, hidden),
            ("linear_fc2", "down_proj", (range(hidden),), inner),
        ):
            size = sum(map(len, rows))
            name, tensor = f"{mcore}experts.{name}", f"{hf}experts.{tensor}"
            matrix, vector = (count, columns, size), (count, size)
            parts = tuple(Part(tensor, matrix, one, index=expert, transposed=True) for one in rows)
            yield Weight(f"{name}.weight{expert}", (size, columns), (parts,))
            parts = tuple(Part(f"{tensor}_bias", vector, one, index=expert) for one in rows)
            yield Weight(f"{name}.bias{expert}", (size,), (parts,))
