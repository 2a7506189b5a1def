"""Drawing weights by the name of each parameter in the whole model, so that they are the same under every layout."""

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

from bridge.dist.engine.placement import EMBEDDING, NamedParameter, named_parameters, tensor_group

Initialiser = Callable[[torch.Tensor], object]

# Their biases are random, unlike those of Megatron's layers.
_TORCH_LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def draw_weights(
    stages: Sequence[MegatronModule], pg_collection: ProcessGroupCollection, *, vocab_size: int | None
) -> None:
    """Draw every random parameter anew, by the configuration's own initialisers, seeded by its full-model name.

    The whole parameter is drawn on the CPU and each rank keeps its shard, so that a model starts from the same weights
    under every layout and on every device. Rows that pad the vocabulary beyond ``vocab_size`` are zero. Matrices are
    random. So are vectors whose elements differ; those of equal elements (norm weights, most biases) stay as they were
    built. A module may have initialisers of its own: a mapping ``initialisers`` from a parameter's name to a function
    that fills a tensor.
    """
    for stage in stages:
        config = get_model_config(stage)
        for named in named_parameters(stage, pg_collection):
            initialise = _initialiser(named, config, pg_collection)
            if initialise is not None:
                _draw(named, initialise, vocab_size)


def _initialiser(
    named: NamedParameter, config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> Initialiser | None:
    """Return what draws a parameter; None if it is a constant."""
    leaf = named.placement.name.rpartition(".")[2]
    own: Initialiser | None = getattr(named.owner, "initialisers", {}).get(leaf)
    if own is not None:
        return own
    if named.parameter.dim() < 2:
        return _vector_initialiser(named, leaf, config, pg_collection)
    if named.placement.full_name == EMBEDDING or isinstance(named.owner, VocabParallelEmbedding | torch.nn.Embedding):
        initialiser = config.embedding_init_method
    elif getattr(named.parameter, "partition_dim", None) == 1:  # a row-parallel layer, the last of attention or MLP
        initialiser = config.output_layer_init_method
    else:
        initialiser = config.init_method
    assert initialiser is not None  # TransformerConfig fills them in
    return initialiser


def _vector_initialiser(
    named: NamedParameter, leaf: str, config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> Initialiser | None:
    owner = named.owner
    if isinstance(owner, _TORCH_LAYERS) and leaf == "bias":
        return partial(_draw_bias, bound=owner.weight[0].numel() ** -0.5)
    # Megatron draws attention sinks and the biases of routers as it draws matrices.
    if leaf == "softmax_offset" or isinstance(owner, Router) or not _is_constant(named, pg_collection):
        assert config.init_method is not None
        return config.init_method
    return None


def _draw_bias(bias: torch.Tensor, *, bound: float) -> None:
    """Draw the bias of a layer of torch's as torch does: ``bound`` is the root of one over the inputs of an output."""
    bias.uniform_(-bound, bound)


def _is_constant(named: NamedParameter, pg_collection: ProcessGroupCollection) -> bool:
    """Whether all elements of a whole vector are equal. Collective over the ranks that it is split over."""
    if named.parameter.is_meta or not named.parameter.numel():  # without elements
        return True
    low, high = named.parameter.detach().float().aminmax()
    extremes = torch.stack([-low, high])
    if named.placement.shards > 1:
        extremes = extremes.cuda()  # stages are not moved to the device yet
        group = tensor_group(named.parameter, pg_collection)
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group)
    return bool(-extremes[0] == extremes[1])


def _draw(named: NamedParameter, initialise: Initialiser, vocab_size: int | None) -> None:
    placement = named.placement
    drawn = torch.empty(placement.logical_shape(vocab_size), dtype=torch.float32, device="cpu")
    generator = torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(_seed(placement.full_name))
        initialise(drawn)
    finally:
        generator.set_state(state)
    with torch.no_grad():
        named.parameter.copy_(placement.cut(placement.pad(drawn)))


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
