"""Give parameters values: drawn by full-model name, so that they are the same under every layout, or others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.moe.router import Router
from megatron.core.utils import get_model_config

from bridge.dist.engine.placement import EMBEDDING, NamedParameter, get_tensor_group, named_parameters

Initialiser = Callable[[torch.Tensor], object]

# torch initialises biases randomly; Megatron's layers start with zeros.
_TORCH_LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def draw_weights(
    stages: Sequence[MegatronModule], pg_collection: ProcessGroupCollection, *, vocab_size: int | None
) -> None:
    """Draw every random parameter again with the configuration's initialisers, seeded by its full-model name.

    Each rank draws the whole parameter on the CPU and keeps its shard, so that a model starts from the same weights
    under every layout and on every device. Matrices are random, and so are vectors whose elements differ. Vectors of
    equal elements (norm weights, most biases) keep their values.

    Args:
        stages: The stages of this rank, not yet sharded by FSDP. A module may override initialisers with an attribute
            ``initialisers``, a mapping from a parameter's name to a function that fills a tensor.
        pg_collection: The process groups of this rank.
        vocab_size: Rows of the embedding and the output layer beyond it are padding, set to zero; None for no padding.
    """
    for stage in stages:
        config = get_model_config(stage)
        for named in named_parameters(stage, pg_collection):
            initialise = _find_initialiser(named, config, pg_collection)
            if initialise is not None:
                _draw(named, initialise, vocab_size)


def _find_initialiser(
    named: NamedParameter, config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> Initialiser | None:
    """Return the initialiser of a parameter; None if the parameter is constant."""
    leaf = named.placement.name.rpartition(".")[2]
    own: Initialiser | None = getattr(named.owner, "initialisers", {}).get(leaf)
    if own is not None:
        return own
    if named.parameter.dim() < 2:
        return _find_vector_initialiser(named, leaf, config, pg_collection)
    if named.placement.full_name == EMBEDDING or isinstance(named.owner, VocabParallelEmbedding | torch.nn.Embedding):
        initialiser = config.embedding_init_method
    elif getattr(named.parameter, "partition_dim", None) == 1:  # a row-parallel layer, the last of attention or MLP
        initialiser = config.output_layer_init_method
    else:
        initialiser = config.init_method
    assert initialiser is not None  # TransformerConfig fills them in
    return initialiser


def _find_vector_initialiser(
    named: NamedParameter, leaf: str, config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> Initialiser | None:
    owner = named.owner
    if isinstance(owner, _TORCH_LAYERS) and leaf == "bias":
        return partial(_draw_bias, bound=owner.weight[0].numel() ** -0.5)
    # Megatron draws attention sinks and router biases with the initialiser of matrices.
    if leaf == "softmax_offset" or isinstance(owner, Router) or not _is_constant(named, pg_collection):
        assert config.init_method is not None
        return config.init_method
    return None


def _draw_bias(bias: torch.Tensor, *, bound: float) -> None:
    """Draw a bias like ``torch.nn.Linear.reset_parameters``; ``bound`` is 1 / sqrt(inputs per output)."""
    bias.uniform_(-bound, bound)


def _is_constant(named: NamedParameter, pg_collection: ProcessGroupCollection) -> bool:
    """Return whether all elements of an unsharded vector are equal. Collective over the ranks that it is split over."""
    if named.parameter.is_meta or not named.parameter.numel():  # no values to compare
        return True
    low, high = named.parameter.detach().float().aminmax()
    extremes = torch.stack([-low, high])  # negated, so that one MAX reduction finds both
    if named.placement.shards > 1:
        extremes = extremes.cuda()  # the stages are still on the CPU, and NCCL needs GPU tensors
        group = get_tensor_group(named.parameter, pg_collection)
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group)
    return bool(-extremes[0] == extremes[1])


def _draw(named: NamedParameter, initialise: Initialiser, vocab_size: int | None) -> None:
    placement = named.placement
    drawn = torch.empty(placement.logical_shape(vocab_size), dtype=torch.float32, device="cpu")
    generator = torch.default_generator  # initialisers take no generator: seed the default one, then restore it
    state = generator.get_state()
    try:
        generator.manual_seed(_derive_seed(placement.full_name))
        initialise(drawn)
    finally:
        generator.set_state(state)
    set_values(named.parameter, lambda values: values.copy_(placement.take_shard(placement.pad(drawn))))


@torch.no_grad()
def set_values(tensor: torch.Tensor, fill: Callable[[torch.Tensor], object]) -> None:
    """Let a function fill a parameter or a buffer, part by part if it likes.

    Transformer Engine's parameters in FP8 and FP4 take values only as a whole. They keep those from before they were
    quantized, from which Megatron's optimizers start.
    """
    if type(tensor.detach()) is torch.Tensor:
        fill(tensor)
        return
    get_exact: Callable[[], torch.Tensor | None] = getattr(tensor, "get_high_precision_init_val", lambda: None)
    values = get_exact()
    if values is None:  # it was built without gradients
        values = torch.empty(tensor.shape, device=tensor.device)
    fill(values)
    tensor.copy_(values)


def _derive_seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1  # fits a signed 64-bit integer
