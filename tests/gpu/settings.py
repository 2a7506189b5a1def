"""Models, precisions and settings of the rows. Imports nothing heavy, so that pytest collects quickly."""

from __future__ import annotations

from typing import NamedTuple

MODELS = ("tiny", "moe-tiny", "mla-tiny", "hybrid-tiny", "t5-tiny")
PRECISIONS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16": ("transformer.bf16=true", "transformer.params_dtype=torch.bfloat16"),
    "fp16": ("transformer.fp16=true", "transformer.params_dtype=torch.float16"),
}
CASES = tuple(f"{model}-{precision}" for precision in ("fp32", "bf16") for model in MODELS)
STEPS = 5
BATCH = {"seq_length": 64, "global_batch_size": 8, "micro_batch_size": 2}


class Tolerance(NamedTuple):
    """Largest relative differences of losses and of gradient norms."""

    loss: float
    grad_norm: float


# The significand has 8 bits in bf16 and 11 in fp16. On the CPU, five steps of these models in bf16 differ from fp32 by
# at most 3e-4 (losses) and 4e-3 (gradient norms).
TOLERANCES = {"fp32": Tolerance(1e-4, 1e-4), "bf16": Tolerance(1e-3, 1e-2), "fp16": Tolerance(1e-3, 1e-2)}

LLAMA = "llama-3.2-1b"
TE_SEQUENCE = 4096
"""Tokens of a sequence in the rows of Transformer Engine's memory."""
TE_STORAGE: dict[str, tuple[str, ...]] = {
    "bf16": (),
    **{
        recipe: ("transformer.fp8=hybrid", f"transformer.fp8_recipe={recipe}")
        for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")
    },
}
"""Overrides of the Llama for each storage of weights and activations by Transformer Engine."""


def list_te_overrides(storage: str, layers: int) -> list[str]:
    """Return the overrides of a Llama with some layers, whose memory is measured and modelled."""
    return [*TE_STORAGE[storage], f"transformer.num_layers={layers}", f"seq_length={TE_SEQUENCE}"]


class Setting(NamedTuple):
    """Training options of the Llama: overrides, wrapper, batch."""

    overrides: tuple[str, ...] = ()
    wrapper: str = "ddp"
    distributed_optimizer: bool = False
    seq_length: int = 4096
    micro_batch_size: int = 1
    global_batch_size: int = 4


SETTINGS = {
    "ddp": Setting(),
    "recompute": Setting(
        overrides=(
            "transformer.recompute_granularity=full",
            "transformer.recompute_method=uniform",
            "transformer.recompute_num_layers=1",
        ),
        distributed_optimizer=True,
        seq_length=8192,
        global_batch_size=2,
    ),
    "short": Setting(seq_length=2048, global_batch_size=8),
    "megatron-fsdp": Setting(wrapper="megatron-fsdp", seq_length=2048, micro_batch_size=2),
}

# Overrides that shrink the Llama for a rehearsal on the CPU.
SMALL_LLAMA = (
    "vocab_size=512",
    "transformer.num_layers=2",
    "transformer.hidden_size=64",
    "transformer.ffn_hidden_size=128",
    "transformer.num_attention_heads=4",
    "transformer.num_query_groups=2",
    "generation_config=null",
)
SMALL_SEQUENCE = 32
