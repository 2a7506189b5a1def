"""Model-FLOPs utilisation: the FLOPs that a model needs per step, and the peak FLOPs of a GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod

from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from bridge.dist.train.batch import Batch

_PEAKS = (
    (re.compile(r"\bA100\b"), 312e12),
    (re.compile(r"\bH100 PCIe\b"), 756e12),
    (re.compile(r"\b(H100|H200) NVL\b"), 835.5e12),
    (re.compile(r"\b(H100|H200|GH200)\b"), 989.4e12),
    (re.compile(r"\bB200\b"), 2250e12),
    (re.compile(r"\bGB200\b"), 2500e12),
)
"""Dense bf16 FLOPs per second of the tensor cores, by a pattern of CUDA's device name; the first match counts.

Sources: NVIDIA's data sheets of these products, and the whitepaper of the Hopper architecture. Data sheets that count
sparse matrices list twice as many.
"""


def find_peak_flops(device: str) -> float | None:
    """Return the dense bf16 (and fp16) peak FLOPs per second of a device by its CUDA name; None if unknown."""
    if "MIG" in device.split():  # a part of a GPU, whose share of the peak the name does not tell
        return None
    return next((peak for name, peak in _PEAKS if name.search(device)), None)


_LOOKED_UP = re.compile(r".*(position_embeddings|relative_attention_bias)\.weight")
_EMBEDDING = re.compile(r"(.*\.)?word_embeddings\.weight")
_OUTPUT = re.compile(r"(.*\.)?output_layer\.weight")
_ROUTED = re.compile(r".*\.experts\..*")
_AFTER_ATTENTION = re.compile(r".*attention\.linear_proj\.weight")
_AFTER_SCAN = re.compile(r".*\bmixer\.out_proj\.weight")


def count_model_flops(parameters: Mapping[str, Sequence[int]], config: TransformerConfig, batch: Batch) -> int:
    """Return the FLOPs that a model needs per training step, over all ranks, independent of the layout and the layers.

    Per token, following appendix B of the PaLM paper (arXiv 2204.02311): two FLOPs for each element of a matrix that
    the token is multiplied with, where experts count by the share of tokens routed to them; attention scores and values
    in full, not halved for the causal mask; for a state-space layer, two FLOPs for each element of the state to update
    it and two to read it. The backward pass needs twice the FLOPs of the forward pass. Recomputation, padding and
    element-wise operations do not count.

    Args:
        parameters: The shapes of the whole model's parameters, without padding, by full-model name.
        config: Sizes of attention, experts and states.
        batch: Samples per step and tokens per sample. T5's encoder and decoder each take that many tokens.
    """
    matrices = {name: shape for name, shape in parameters.items() if len(shape) > 1}
    tied = not any(map(_OUTPUT.fullmatch, matrices))
    products = sum(prod(shape) * count_uses(name, config, tied=tied) for name, shape in matrices.items())
    for name, shape in matrices.items():
        if _AFTER_ATTENTION.fullmatch(name):
            products += batch.seq_length * shape[1] * (1 + compute_width_ratio(config))
        elif _AFTER_SCAN.fullmatch(name):
            products += 2 * shape[1] * config.mamba_state_dim
    # Two FLOPs per multiply-add, and three passes: one forward, and twice its FLOPs backward.
    return round(3 * 2 * products * batch.global_batch_size * batch.seq_length)


def count_uses(name: str, config: TransformerConfig, *, tied: bool) -> float:
    """Return how often a token is multiplied with a matrix, on average."""
    if (_EMBEDDING.fullmatch(name) and not tied) or _LOOKED_UP.fullmatch(name):
        return 0  # rows are looked up, not multiplied
    if _EMBEDDING.fullmatch(name) or _OUTPUT.fullmatch(name):
        return 1 + (config.mtp_num_layers or 0)  # multi-token prediction computes logits for each predicted token
    if _ROUTED.fullmatch(name) and config.num_moe_experts:
        return config.moe_router_topk / config.num_moe_experts
    return 1


def compute_width_ratio(config: TransformerConfig) -> float:
    """Return a head's query width divided by its value width; they differ in multi-head latent attention."""
    if isinstance(config, MLATransformerConfig):
        return (config.qk_head_dim + config.qk_pos_emb_head_dim) / config.v_head_dim
    return 1.0
