"""Memory of a rank in bytes: weights, gradients, optimizer, and tensors that autograd saves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from megatron.core.distributed import DistributedDataParallel, FullyShardedDataParallel
from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import ParameterGroup
from megatron.core.transformer import MegatronModule
from torch.distributed.tensor import DTensor

from bridge.dist.engine.stages import unwrap
from bridge.dist.train.optimizer import set_up_optimizer
from bridge.dist.wrapper import ShardingStrategy


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local shard of a DTensor; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _parameter_groups(stage: FullyShardedDataParallel) -> list[ParameterGroup]:
    buffer: Any = stage.param_and_grad_buffer
    groups: list[ParameterGroup] = buffer.parameter_groups
    return groups


def count_parameters(stage: MegatronModule) -> int:
    """Return the number of elements of the parameters that a rank holds between steps."""
    parameters: Iterable[torch.Tensor] = stage.parameters()
    if isinstance(stage, FullyShardedDataParallel) and not _shards_weights(stage):
        # Its parameters are this rank's part of the optimizer's.
        parameters = [parameter for group in _parameter_groups(stage) for parameter in group.params]
    return sum(to_local(parameter).numel() for parameter in parameters)


def _shards_weights(stage: FullyShardedDataParallel) -> bool:
    return bool(stage.ddp_config.data_parallel_sharding_strategy == ShardingStrategy.OPTIM_GRADS_PARAMS)


def weight_tensors(stage: MegatronModule) -> Iterator[torch.Tensor]:
    """Yield the tensors that hold the weights of a stage between steps."""
    if isinstance(stage, FullyShardedDataParallel):
        # Its parameters may be the optimizer's full-precision copies, which Megatron-FSDP makes itself.
        for group in _parameter_groups(stage):
            if group.model_weight_buffer is not None:
                yield group.model_weight_buffer.data
            else:  # the strategy that shards nothing
                yield from map(to_local, group.params)
    else:
        yield from map(to_local, stage.parameters())


def sharded_gradients(stage: MegatronModule) -> Iterator[torch.Tensor]:
    """Yield the tensors that hold the gradients of an FSDP-wrapped stage at the end of a step."""
    if isinstance(stage, FullyShardedDataParallel):
        for group in _parameter_groups(stage):
            if group.main_grad_buffer is not None:
                yield group.main_grad_buffer.data
    for parameter in stage.parameters():
        if parameter.grad is not None:
            yield to_local(parameter.grad)


def held_tensors(stages: Sequence[MegatronModule]) -> Iterator[torch.Tensor]:
    """Yield the tensors that hold the weights and buffers of stages."""
    for stage in stages:
        yield from weight_tensors(stage)
        yield from (to_local(buffer) for buffer in unwrap(stage).buffers())


def list_weight_workspaces(stage: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the 8-bit copies of weights that layers made in their first forward pass and keep from step to step."""
    for module in stage.modules():
        # A name of Transformer Engine 2.17 and its stand-in.
        for parts in getattr(module, "_fp8_workspaces", {}).values():
            yield from parts


def count_saved_buffer_elements(stage: MegatronModule) -> int:
    """Return the number of elements in the buffers of a stage that checkpoints contain."""
    model = unwrap(stage)
    saved = model.state_dict()
    return sum(buffer.numel() for name, buffer in model.named_buffers() if name in saved)


def count_storage_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Return the bytes of the storages of tensors, each storage once; a view counts as its whole storage."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def gradient_buckets(stage: MegatronModule) -> list[Any]:
    """Return the gradient buckets of a stage wrapped in Megatron's DDP; an empty list for other stages."""
    if not isinstance(stage, DistributedDataParallel):
        return []
    # `vars`, because `torch.nn.Module` has a method `buffers`.
    buffers: list[Any] = vars(stage)["buffers"] + stage.expert_parallel_buffers
    return [bucket for buffer in buffers for bucket in buffer.buckets]


def count_gradient_bytes(stages: Sequence[MegatronModule]) -> int:
    """Return the gradient bytes of stages with unsharded weights."""
    buffered = count_storage_bytes(bucket.grad_data for stage in stages for bucket in gradient_buckets(stage))
    if buffered:
        return buffered
    parameters = [
        to_local(parameter) for stage in stages for parameter in stage.parameters() if parameter.requires_grad
    ]
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def count_optimizer_bytes(stages: Sequence[MegatronModule]) -> tuple[int, int]:
    """Return the bytes of full-precision weights and of Adam's two moments in Megatron's optimizer."""
    held = {tensor.untyped_storage()._cdata for tensor in held_tensors(stages)}
    with set_up_optimizer(list(stages), use_gloo_process_groups=False) as optimizer:
        updated = [
            to_local(parameter)
            for one in getattr(optimizer, "chained_optimizers", [optimizer])
            for group in one.param_groups
            for parameter in group["params"]
        ]
    # What the optimizer updates and no stage holds is its full-precision copy. The two moments of an element have the
    # data type of what is updated.
    copies = (tensor for tensor in updated if tensor.untyped_storage()._cdata not in held)
    return count_storage_bytes(copies), sum(2 * tensor.numel() * tensor.element_size() for tensor in updated)


class SavedMemory(torch.autograd.graph.saved_tensors_hooks):
    """Counts the memory that autograd has saved and not yet freed, except parameters, buffers and gradients."""

    def __init__(self, stage: MegatronModule) -> None:
        self._stage = stage
        self._saved: WeakSet[_Saved] = WeakSet()
        super().__init__(self._save, lambda saved: saved.tensor)

    def _save(self, tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._saved.add(saved)
        return saved

    def count(self, shared: Sequence[torch.Tensor] = ()) -> tuple[int, int]:
        """Return the bytes saved now, each storage once: those of this microbatch, and those of ``shared`` tensors.

        Unsharded weights that a wrapper has not freed yet count as parameters.
        """
        weights = map(to_local, self._stage.parameters())
        others = (*held_tensors([self._stage]), *weights, *list_weight_workspaces(self._stage))
        cdata = {tensor.untyped_storage()._cdata for tensor in others}
        storages = (saved.tensor.untyped_storage() for saved in self._saved)
        sizes = {storage._cdata: storage.nbytes() for storage in storages if storage._cdata not in cdata}
        of_all = {tensor.untyped_storage()._cdata for tensor in shared} & sizes.keys()
        return sum(sizes.values()) - sum(sizes[key] for key in of_all), sum(sizes[key] for key in of_all)


class _Saved:
    """A saved tensor, which exists until autograd frees it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
