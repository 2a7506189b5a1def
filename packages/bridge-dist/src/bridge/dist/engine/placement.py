"""Map the parameters of a stage to the whole model: their full-model names and the part that a rank holds.

A pipeline stage numbers its layers from zero, and so does a rank its experts. The whole model has one name for each
parameter. Weights drawn by that name, and totals counted by it, are the same under every layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from torch.distributed import ProcessGroup

from bridge.dist.engine.stages import unwrap

EMBEDDING = "embedding.word_embeddings.weight"
"""The full-model name of the word embedding."""

_LAYER = re.compile(r"(.*\blayers)\.\d+")
_EXPERT = re.compile(r"(.*\blocal_experts)\.(\d+)")
_GROUPED = re.compile(r"(weight|bias)(\d+)")
_VOCABULARY = re.compile(r"(.*\.)?(word_embeddings|output_layer)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The name of a stage's parameter in the whole model, and the part of it that this rank holds.

    Some parameters are a concatenation of parts that are split over the ranks one by one: ``stride`` equal parts (gated
    layers), or ``blocks`` with the size of each part on this rank (Mamba's projections).
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
        """Return the shape of the whole parameter without rows that pad the vocabulary beyond ``vocab_size``."""
        shape = self.full_shape
        if vocab_size is not None and _VOCABULARY.fullmatch(self.full_name):
            return torch.Size((min(shape[0], vocab_size), *shape[1:]))
        return shape

    def pad(self, logical: torch.Tensor) -> torch.Tensor:
        """Pad a parameter of the logical shape with rows of zeros, up to the padded vocabulary."""
        padding = self.full_shape[0] - logical.shape[0]
        return torch.cat([logical, logical.new_zeros(padding, *logical.shape[1:])]) if padding else logical

    def take_shard(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard of a whole parameter, split as Megatron splits it."""
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


class NamedBuffer(NamedTuple):
    """A buffer of one stage that checkpoints keep, and its place in the whole model."""

    placement: Placement
    buffer: torch.Tensor
    owner: torch.nn.Module


def named_parameters(stage: MegatronModule, pg_collection: ProcessGroupCollection) -> Iterator[NamedParameter]:
    """Yield the parameters of a stage with their placement. FSDP must not have sharded it yet."""
    model: torch.nn.Module = unwrap(stage)
    modules = dict(model.named_modules())
    renamed = _map_module_names(modules, pg_collection)
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        leaf = _make_full_leaf(leaf, modules[path], pg_collection)
        full_name = f"{renamed[path]}.{leaf}".lstrip(".")
        if tied and full_name == "output_layer.weight":
            # On the last pipeline stage it is a copy of the first stage's embedding.
            full_name = EMBEDDING
        yield NamedParameter(_make_placement(name, full_name, parameter, pg_collection), parameter, modules[path])


def named_buffers(stage: MegatronModule, pg_collection: ProcessGroupCollection) -> Iterator[NamedBuffer]:
    """Yield the persistent buffers of a stage, such as router biases, with their placement. None of them is split."""
    modules = dict(unwrap(stage).named_modules())
    renamed = _map_module_names(modules, pg_collection)
    for path, module in modules.items():
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                full_name = f"{renamed[path]}.{leaf}".lstrip(".")
                name = f"{path}.{leaf}".lstrip(".")
                yield NamedBuffer(Placement(name=name, full_name=full_name, shape=buffer.shape), buffer, module)


def named_tensors(
    stage: MegatronModule, pg_collection: ProcessGroupCollection
) -> Iterator[tuple[Placement, torch.Tensor]]:
    """Yield all that checkpoints keep of a stage: its parameters and persistent buffers, with their placement."""
    for placement, parameter, _ in named_parameters(stage, pg_collection):
        yield placement, parameter
    for placement, buffer, _ in named_buffers(stage, pg_collection):
        yield placement, buffer


def _make_placement(
    name: str, full_name: str, parameter: torch.nn.Parameter, pg_collection: ProcessGroupCollection
) -> Placement:
    if not getattr(parameter, "tensor_model_parallel", False):
        return Placement(name=name, full_name=full_name, shape=parameter.shape)
    blocks: Sequence[int] | None = getattr(parameter, "partition_sizes", None)
    group = get_tensor_group(parameter, pg_collection)
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


def get_tensor_group(parameter: torch.Tensor, pg_collection: ProcessGroupCollection) -> ProcessGroup:
    """Return the group that a parameter is split over or copied in: expt_tp for parameters of experts, otherwise tp."""
    group: ProcessGroup = pg_collection.tp if getattr(parameter, "allreduce", True) else pg_collection.expt_tp
    return group


def list_layer_indices(stage: MegatronModule) -> list[int]:
    """Return the zero-based indices of a stage's layers in the whole model. An encoder's layers come first."""
    stacks: dict[str, list[int]] = {}
    for name, module in unwrap(stage).named_modules():
        stack = re.fullmatch(r"(\w+)\.layers\.\d+", name)
        if stack and stack[1] != "mtp" and hasattr(module, "layer_number"):
            before = sum(len(others) for other, others in stacks.items() if other != stack[1])
            stacks.setdefault(stack[1], []).append(before + _get_layer_index(module))
    return sorted(index for stack in stacks.values() for index in stack)


def _map_module_names(modules: dict[str, torch.nn.Module], pg_collection: ProcessGroupCollection) -> dict[str, str]:
    """Map the name of each module of a stage to its full-model name.

    ``modules`` must list parents before children, as ``named_modules`` does.
    """
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
            leaf = str(_get_layer_index(module))
        elif _EXPERT.fullmatch(name):
            leaf = str(int(leaf) + pg_collection.ep.rank() * experts[parent])
        full[name] = f"{full[parent]}.{leaf}".lstrip(".")
    return full


def _make_full_leaf(leaf: str, owner: torch.nn.Module, pg_collection: ProcessGroupCollection) -> str:
    """Return the full-model name of a parameter within its module. Grouped experts restart from zero on each rank."""
    experts: int | None = getattr(owner, "num_gemms", None)
    grouped = _GROUPED.fullmatch(leaf)
    if experts is None or grouped is None:
        return leaf
    return f"{grouped[1]}{int(grouped[2]) + pg_collection.ep.rank() * experts}"


def _get_layer_index(layer: torch.nn.Module) -> int:
    number = layer.layer_number
    assert isinstance(number, int)
    return number - 1  # Megatron counts from one
