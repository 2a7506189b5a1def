"""The parameters of stages that are wrapped by FSDP, as parts of a checkpoint.

megatron-core 0.19.2 saves Megatron-FSDP in a format of its own, and asks torch FSDP2 for shards of equal size. Here
each rank gives the rows that it holds as parts of the tensors that any other wrapper has.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import FullyShardedDataParallel, TorchFullyShardedDataParallel
from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import gather_and_compute_chunk_metadata
from megatron.core.transformer import MegatronModule
from torch.distributed.tensor import DTensor

from bridge.dist.engine.stages import strip_wrappers, unwrap


@dataclass(frozen=True)
class Part:
    """A part of a tensor-parallel rank's parameter, and its place in a tensor of the checkpoint."""

    place: ShardedTensor
    """Without data."""

    rows: range
    """Its rows in the parameter."""


@dataclass(frozen=True)
class Shard:
    """The rows of a parameter that FSDP left on this rank."""

    parameter: DTensor
    dtype: torch.dtype
    """That of the model, which computes in it."""

    rows: range
    parts: list[Part]
    """The parts of the parameter before FSDP divided it."""

    is_expert: bool

    @property
    def main(self) -> DTensor:
        """The tensor that the optimizer updates: the parameter, or its copy in fp32."""
        main: DTensor = getattr(self.parameter, "main_param", self.parameter)
        return main

    @property
    def has_own_main(self) -> bool:
        """Whether that is another tensor than the model computes with."""
        return self.main is not self.parameter or self.parameter.dtype != self.dtype

    def cut(self, rows: torch.Tensor, *, prefix: str = "") -> list[ShardedTensor]:
        """Return the rows, or their optimizer's state, as parts of a checkpoint that share their memory."""
        return list(self._cut(rows.detach(), prefix))

    def _cut(self, rows: torch.Tensor, prefix: str) -> Iterator[ShardedTensor]:
        for part in self.parts:
            first, last = max(part.rows.start, self.rows.start), min(part.rows.stop, self.rows.stop)
            if first >= last:
                continue
            place, axis = part.place, part.place.prepend_axis_num
            data = rows[first - self.rows.start : last - self.rows.start]
            data = data.reshape((1,) * axis + data.shape)
            offset = list(place.global_offset)
            offset[axis] += first - part.rows.start
            yield replace(
                place,
                key=prefix + place.key,
                data=data,
                dtype=data.dtype,
                local_shape=tuple(data.shape),
                global_offset=tuple(offset),
                axis_fragmentations=None,  # ranks have different numbers of rows
                replica_id=(*_get_replica(place)[:2], 0),  # the last is the data-parallel rank: each has other rows
                prepend_axis_num=0,
            )


class Divided(NamedTuple):
    """A parameter that FSDP divided."""

    value: DTensor
    whole: torch.nn.Parameter
    """Without memory, as the tensor-parallel rank had it before."""


def is_sharded(stages: Sequence[MegatronModule]) -> bool:
    """Return whether stages are wrapped by FSDP."""
    return isinstance(stages[0], FullyShardedDataParallel | TorchFullyShardedDataParallel)


def find_divided(stage: MegatronModule) -> dict[str, Divided]:
    """Return the parameters of a stage that FSDP divided, by name."""
    stage.state_dict()  # Megatron-FSDP keeps whole parameters after a forward pass: this brings the shards back
    wrapper = next((one for one in stage.modules() if isinstance(one, MegatronFSDP)), None)
    originals = {} if wrapper is None else {strip_wrappers(name): one for name, one in wrapper.raw_param.items()}
    return {
        name: Divided(value, _make_whole(value, originals.get(name, value)))
        for name, value in unwrap(stage).named_parameters()
        if isinstance(value, DTensor)
    }


def make_sharded_state_dict(stage: MegatronModule, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return megatron-core's description of a stage.

    In megatron-core 0.19.2 a checkpoint may have other rows that pad the vocabulary, except for T5's bias.
    """
    state: dict[str, Any] = unwrap(stage).sharded_state_dict(metadata=metadata)
    for part in nested_values(state):
        if isinstance(part, ShardedTensor) and part.key == "lm_head.output_layer.bias":
            part.allow_shape_mismatch = True
    return state


def list_shards(stage: MegatronModule, metadata: dict[str, Any]) -> tuple[list[Shard], dict[str, Any]]:
    """Return the shards of a stage's parameters, and the other entries of its sharded state dict.

    Collective over the ranks that share the parameters.
    """
    divided = find_divided(stage)
    with show_whole(stage, divided):
        state = make_sharded_state_dict(stage, metadata)
        apply_factories(state)
    by_storage = {identify(one.whole): one.whole for one in divided.values()}
    parts: dict[int, list[Part]] = {identity: [] for identity in by_storage}
    others = {}
    for name, entry in state.items():
        found = list(nested_values([entry]))
        if all(isinstance(one, ShardedTensor) and one.data is not None and one.data.is_meta for one in found):
            for one in found:
                parameter = by_storage[identify(one.data)]
                parts[identify(parameter)].append(Part(one.without_data(), find_rows(one.data, parameter)))
        else:
            others[name] = entry
    shards = []
    for value, tensor in divided.values():
        is_expert = not getattr(tensor, "allreduce", True)
        held = find_held_rows(value, len(tensor))
        shards.append(Shard(value, tensor.dtype, held, parts[identify(tensor)], is_expert))
    return shards, others


def _get_replica(place: ShardedTensor) -> tuple[int, ...]:
    replica = place.replica_id
    assert isinstance(replica, tuple), place  # megatron-core: pipeline, tensor and data-parallel rank
    return replica


def identify(tensor: torch.Tensor) -> int:
    """Return what a tensor and its views have in common, on the meta device too: their storage."""
    identity: int = tensor.untyped_storage()._cdata  # private; seen in torch 2.6 to 2.15
    return identity


def find_rows(view: torch.Tensor, parameter: torch.Tensor) -> range:
    """Return which rows of a parameter a part of a checkpoint is: megatron-core cuts parameters into views."""
    width = math.prod(parameter.shape[1:])
    first, remainder = divmod(int(view.storage_offset()), width)
    assert not remainder, view
    assert view.is_contiguous(), view
    assert view.shape[1:] == parameter.shape[1:], view
    return range(first, first + len(view))


def _make_whole(value: DTensor, original: torch.Tensor) -> torch.nn.Parameter:
    """Return a parameter without memory, as it was before FSDP divided it."""
    whole = torch.nn.Parameter(torch.empty(original.shape, dtype=original.dtype, device="meta"), value.requires_grad)
    for name, attribute in vars(original).items():  # those that megatron-core sets, such as the dimension that is split
        if isinstance(attribute, bool | int | str | tuple | list):
            setattr(whole, name, attribute)
    return whole


@contextlib.contextmanager
def show_whole(stage: MegatronModule, divided: Mapping[str, Divided]) -> Iterator[None]:
    """Let a stage have its parameters as they were before FSDP divided them."""
    replacements = {id(one.value): one.whole for one in divided.values()}
    replaced = []
    for module in unwrap(stage).modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in replacements:
                replaced.append((module, name, parameter))
    for module, name, parameter in replaced:
        module._parameters[name] = replacements[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def find_held_rows(value: DTensor, length: int) -> range:
    """Return which of a parameter's rows on this tensor-parallel rank FSDP left here. Collective."""
    chunk = gather_and_compute_chunk_metadata(value)
    first = chunk.offsets[0] % length  # the shards of Megatron-FSDP count the rows of all tensor-parallel ranks
    return range(first, first + chunk.sizes[0])
