"""What megatron-core writes into a checkpoint of a model, found out on the meta device in a world of one rank."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from bridge.config import Document, ModelConfig
from bridge.dist.checkpoint.shards import find_rows, identify
from bridge.dist.cpu import on_meta
from bridge.dist.document_layout import replace_layout
from bridge.dist.engine.placement import named_tensors
from bridge.dist.job import BuildJob
from bridge.dist.layout import Layout
from bridge.dist.plan.virtual_rank.groups import act_as_rank
from bridge.dist.wrapper import Wrapper
from bridge.models.huggingface.transfer.names import canonicalize_name

Shape = tuple[int, ...]

CONTENT = {"singleton_local_shards": False}
"""How megatron.training has its models written."""

PRECISIONS = "huggingface_dtypes.json"
"""A file of an iteration: the tensors whose precision in the folder is not that of the checkpoint."""

WINDOW = 32 * 2**20
"""Bytes of a parameter that are held at a time."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a parameter, and their place in a tensor of the checkpoint, which may stack layers or experts."""

    key: str
    full_shape: Shape
    """The shape of the whole tensor."""

    offset: Shape
    shape: Shape
    """The shape of the piece, with an axis of size 1 for each one that is stacked along."""

    rows: range
    """The rows of the parameter."""

    axis: int
    """The axis of the rows."""

    def cut(self, rows: range) -> Piece:
        """Return the piece with some of its rows."""
        offset, shape = list(self.offset), list(self.shape)
        offset[self.axis] += rows.start - self.rows.start
        shape[self.axis] = len(rows)
        return replace(self, offset=tuple(offset), shape=tuple(shape), rows=rows)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint of a model has, under any layout."""

    shapes: dict[str, Shape]
    """Parameters and buffers of the whole model, by the names of the weight table."""

    pieces: dict[str, list[Piece]]
    """The tensors of the checkpoint that make up each parameter, in the order of its rows."""

    extra_states: list[str]
    """Keys of the layers' extra states, which are empty."""

    model: ModelConfig
    config: TransformerConfig


def list_contents(document: Mapping[str, Any], metadata: Mapping[str, Any]) -> Contents:
    """Build a model without memory, and list what its checkpoints have.

    Args:
        document: The model, with any layout.
        metadata: The content metadata of the checkpoint, which select among megatron-core's ways to write it.
    """
    unsharded = Document(deepcopy(dict(document)))
    replace_layout(unsharded, {}, sequence_parallel=False)
    job = BuildJob(document=unsharded.data, wrapper=Wrapper.NONE)
    with on_meta(), act_as_rank(Layout(), 0) as groups:
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = ModelConfig.from_dict(job.document)
        job.finalize(config, 1)
        builder = job.make_builder(config)
        builder.transformer_config.perform_initialization = False
        stage = builder.build_model(groups)
        state = stage.sharded_state_dict(metadata={**metadata, "dp_cp_group": groups.dp_cp})
        apply_factories(state)
        names: dict[int, tuple[str, torch.Tensor]] = {}
        shapes: dict[str, Shape] = {}
        for placement, tensor in named_tensors(stage, groups):
            name = canonicalize_name(placement.full_name)
            names[identify(tensor)] = name, tensor
            shapes[name] = tuple(tensor.shape)
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    extra_states = []
    for part in nested_values(state):
        if isinstance(part, ShardedObject):
            extra_states.append(part.unique_key)
        elif isinstance(part, ShardedTensor) and is_main_replica(part.replica_id):
            assert part.data is not None  # it is of the model that was just built
            name, tensor = names[identify(part.data)]
            pieces[name].append(_make_piece(part, part.data, tensor))
    for found_pieces in pieces.values():
        found_pieces.sort(key=lambda piece: piece.rows.start)
    return Contents(shapes, pieces, sorted(set(extra_states)), config, builder.transformer_config)


def _make_piece(part: ShardedTensor, view: torch.Tensor, parameter: torch.Tensor) -> Piece:
    """Return a part of the checkpoint as rows of a parameter."""
    rows = find_rows(view, parameter)
    shape = (1,) * part.prepend_axis_num + tuple(view.shape)
    return Piece(part.key, tuple(part.global_shape), tuple(part.global_offset), shape, rows, part.prepend_axis_num)
