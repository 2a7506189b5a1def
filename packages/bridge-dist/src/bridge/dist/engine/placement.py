"""Parameters by their name in the whole model: what a layout must not change.

A pipeline stage counts its layers from zero and a rank its experts; the whole model has one name for each parameter.
Weights drawn by that name, and totals counted by it, are the same under every layout.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.moe.router import Router
from megatron.core.utils import get_model_config
from torch.distributed import ProcessGroup

from bridge.dist.engine.stages import unwrapped

Initialiser = Callable[[torch.Tensor], object]

_LAYER = re.compile(r"(.*\blayers)\.\d+")
_EXPERT = re.compile(r"(.*\blocal_experts)\.(\d+)")
_GROUPED = re.compile(r"(weight|bias)(\d+)")
_EMBEDDING = "embedding.word_embeddings.weight"
# Their biases are random, unlike those of Megatron's layers.
_TORCH_LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
_VOCABULARY = re.compile(r"(.*\.)?(word_embeddings|output_layer)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a parameter of one stage stands in the whole model: its name there, and which part of it the rank holds.

    A parameter of several parts that are split over the ranks one by one has ``stride`` of them, all equal (gated
    layers), or ``blocks``, the size of each on this rank (Mamba's projections).
    """

    name: str
    full_name: str
    shape: torch.Size
    shards: int = 1
    shard: int = 0
    dim: int = 0
    stride: int = 1
    blocks: tuple[int, ...] | None = None

    @property
    def full_shape(self) -> torch.Size:
        """The shape of the whole, unsharded parameter."""
        shape = list(self.shape)
        if self.shards > 1:
            shape[self.dim] *= self.shards
        return torch.Size(shape)

    def logical_shape(self, vocab_size: int | None) -> torch.Size:
        """The shape of the whole parameter, without the rows that pad the vocabulary beyond ``vocab_size``."""
        shape = self.full_shape
        if vocab_size is not None and _VOCABULARY.fullmatch(self.full_name):
            return torch.Size((min(shape[0], vocab_size), *shape[1:]))
        return shape

    def pad(self, logical: torch.Tensor) -> torch.Tensor:
        """Add the rows of zeros that pad the vocabulary to a parameter of the logical shape."""
        padding = self.full_shape[0] - logical.shape[0]
        return torch.cat([logical, logical.new_zeros(padding, *logical.shape[1:])]) if padding else logical

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Cut this rank's part out of a whole parameter, as Megatron does."""
        if self.shards == 1:
            return whole
        if self.blocks is not None:
            parts = whole.split([size * self.shards for size in self.blocks], dim=self.dim)
            return torch.cat([part.chunk(self.shards, dim=self.dim)[self.shard] for part in parts], dim=self.dim)
        pieces = whole.chunk(self.shards * self.stride, dim=self.dim)
        return torch.cat(pieces[self.shard :: self.shards], dim=self.dim)


class NamedParameter(NamedTuple):
    """A parameter of one stage, the module that holds it, and its place in the whole model."""

    placement: Placement
    parameter: torch.nn.Parameter
    owner: torch.nn.Module


def named_parameters(stage: MegatronModule, pg_collection: ProcessGroupCollection) -> Iterator[NamedParameter]:
    """Yield the parameters of a built (not yet sharded by FSDP) stage with their full-model names."""
    model: torch.nn.Module = unwrapped(stage)
    modules = dict(model.named_modules())
    renamed = _full_module_names(modules, pg_collection)
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        leaf = _full_leaf(leaf, modules[path], pg_collection)
        full_name = f"{renamed[path]}.{leaf}".lstrip(".")
        if tied and full_name == "output_layer.weight":
            # The last pipeline stage holds a copy of the embedding of the first.
            full_name = _EMBEDDING
        yield NamedParameter(_placement(name, full_name, parameter, pg_collection), parameter, modules[path])


def _placement(
    name: str, full_name: str, parameter: torch.nn.Parameter, pg_collection: ProcessGroupCollection
) -> Placement:
    if not getattr(parameter, "tensor_model_parallel", False):
        return Placement(name=name, full_name=full_name, shape=parameter.shape)
    blocks: Sequence[int] | None = getattr(parameter, "partition_sizes", None)
    group = tensor_group(parameter, pg_collection)
    return Placement(
        name=name,
        full_name=full_name,
        shape=parameter.shape,
        shards=group.size(),
        shard=group.rank(),
        dim=parameter.partition_dim,  # type: ignore[attr-defined]
        stride=getattr(parameter, "partition_stride", 1),
        blocks=None if blocks is None else tuple(blocks),
    )


def tensor_group(parameter: torch.Tensor, pg_collection: ProcessGroupCollection) -> ProcessGroup:
    """Return the ranks that a parameter is split over, or that hold copies of it: for an expert's, its own group."""
    group: ProcessGroup = pg_collection.tp if getattr(parameter, "allreduce", True) else pg_collection.expt_tp
    return group


def layer_indices(stage: MegatronModule) -> list[int]:
    """Return the layers that a stage holds, counted from zero over the whole model, those of an encoder first."""
    stacks: dict[str, list[int]] = {}
    for name, module in unwrapped(stage).named_modules():
        stack = re.fullmatch(r"(\w+)\.layers\.\d+", name)
        if stack and stack[1] != "mtp" and hasattr(module, "layer_number"):
            before = sum(len(others) for other, others in stacks.items() if other != stack[1])
            stacks.setdefault(stack[1], []).append(before + _layer_index(module))
    return sorted(index for stack in stacks.values() for index in stack)


def _full_module_names(modules: dict[str, torch.nn.Module], pg_collection: ProcessGroupCollection) -> dict[str, str]:
    """Map the name of each module in a stage to its name in the whole model. Parents come before children."""
    experts = {
        name: sum(1 for other in modules if re.fullmatch(re.escape(name) + r"\.\d+", other))
        for name in modules
        if name.endswith("local_experts")
    }
    full: dict[str, str] = {"": ""}
    for name, module in modules.items():
        if not name:
            continue
        parent, _, leaf = name.rpartition(".")
        if _LAYER.fullmatch(name) and hasattr(module, "layer_number"):
            leaf = str(_layer_index(module))
        elif _EXPERT.fullmatch(name):
            leaf = str(int(leaf) + pg_collection.ep.rank() * experts[parent])
        full[name] = f"{full[parent]}.{leaf}".lstrip(".")
    return full


def _full_leaf(leaf: str, owner: torch.nn.Module, pg_collection: ProcessGroupCollection) -> str:
    """The name of a parameter within its module: grouped experts are numbered from zero on each rank, too."""
    experts: int | None = getattr(owner, "num_gemms", None)
    grouped = _GROUPED.fullmatch(leaf)
    if experts is None or grouped is None:
        return leaf
    return f"{grouped[1]}{int(grouped[2]) + pg_collection.ep.rank() * experts}"


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


def _layer_index(layer: torch.nn.Module) -> int:
    """Megatron numbers layers from one."""
    number = layer.layer_number
    assert isinstance(number, int)
    return number - 1


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
    if named.placement.full_name == _EMBEDDING or isinstance(named.owner, VocabParallelEmbedding | torch.nn.Embedding):
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
