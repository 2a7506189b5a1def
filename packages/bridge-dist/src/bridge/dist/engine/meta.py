"""Initialise stages that were built on the meta device, where a tensor has a shape but no memory.

A module initialises itself again (``reset_parameters``) once its tensors have memory. Tensors that no module
initialises are filled with NaN instead of arbitrary memory, and a warning names them: they need a checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.moe.router import Router
from megatron.core.utils import get_model_config
from torch.distributed.tensor import DTensor, distribute_tensor

from bridge.dist.patch import Replacement, replace_attributes

logger = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
Share = Callable[[torch.nn.Parameter], None]


def materialize(module: ModuleT, device: torch.device, *, recurse: bool = True) -> ModuleT:
    """Allocate meta tensors on ``device``, uninitialised, and move other tensors there.

    Parameters keep their attributes, and a parameter that two modules share stays shared.

    Args:
        module: Changed in place and returned.
        device: The device of its parameters and buffers.
        recurse: Whether to include the children.
    """
    placed: dict[torch.Tensor, torch.nn.Parameter] = {}
    for owner in module.modules() if recurse else [module]:
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if parameter not in placed:
                placed[parameter] = _copy_parameter(parameter, _place(parameter.data, device))
            owner._parameters[name] = placed[parameter]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = _place(buffer, device)
    return module


def _place(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def _copy_parameter(parameter: torch.Tensor, data: torch.Tensor) -> torch.nn.Parameter:
    """Return a parameter with new data and the attributes of another, in which Megatron records how it is split."""
    copy = torch.nn.Parameter(data, parameter.requires_grad)
    vars(copy).update(vars(parameter))
    return copy


def initialise_stages(stages: Sequence[MegatronModule], pg_collection: ProcessGroupCollection) -> None:
    """Allocate and initialise stages from the meta device on this rank's device. They must not be sharded."""
    missing: list[str] = []
    for stage in stages:
        pending = _find_pending(stage)
        materialize(stage, torch.device("cuda"))
        for module in pending:
            missing += module.initialise()
        _share_tied_embedding(stage, pg_collection)
    _warn_uninitialised(missing)


def allocate_stages(stages: Sequence[MegatronModule], loaded: Collection[str]) -> None:
    """Allocate stages from the meta device on this rank's device, for weights that the caller will load.

    Args:
        stages: Changed in place. Stages that are not on the meta device are not changed.
        loaded: Names of the tensors, within their stages, that the caller loads. Modules with other tensors are
            initialised.
    """
    missing: list[str] = []
    for stage in stages:
        pending = _find_pending(stage)
        if pending:
            materialize(stage, torch.device("cuda"))
        for module in pending:
            names = {f"{module.name}.{tensor}".lstrip(".") for tensor in module.tensors}
            if not names <= set(loaded):
                missing += [name for name in module.initialise() if name not in loaded]
    _warn_uninitialised(missing)


@contextlib.contextmanager
def initialise_while_wrapping(stage: MegatronModule, share: Share | None) -> Iterator[None]:
    """Initialise a stage from the meta device while Megatron-FSDP wraps it, one module at a time.

    Megatron-FSDP allocates each module and calls its ``reset_parameters``. In megatron-core 0.19.2 this loses the
    attributes of parameters, and fails for a module without that method.

    Args:
        stage: Its modules' ``reset_parameters`` are replaced until the context is left.
        share: Called with each initialised parameter, before it is sharded.
    """
    missing: list[str] = []
    pending = _find_pending(stage)

    def reset(module: _Pending) -> None:
        missing.extend(module.initialise())
        module.share(share)

    for module in pending:
        if module.kept:  # Megatron-FSDP fails to reset a module that is on the meta device in part
            module.allocate()
            reset(module)
    resets = [Replacement(one.module, "reset_parameters", partial(reset, one)) for one in pending if not one.kept]
    with replace_attributes(*resets):
        yield
    _warn_uninitialised(missing)


def initialise_shards(stage: MegatronModule, share: Share | None) -> None:
    """Initialise a stage that torch FSDP2 sharded on the meta device. At most one module is unsharded at a time.

    Args:
        stage: Its sharded parameters are replaced by allocated ones, which FSDP2 expects before the first step.
        share: Called with each unsharded parameter, before it is sharded.
    """
    missing: list[str] = []
    for module in _find_pending(stage):
        owner = module.module
        sharded = {name: module.get_tensor(name) for name in module.tensors if name in owner._parameters}
        module.allocate()
        missing += module.initialise()
        module.share(share)
        for name, parameter in sharded.items():
            assert isinstance(parameter, DTensor)
            whole = module.get_tensor(name).data
            # No source rank: each rank cuts its shard out of its own whole tensor.
            shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            owner._parameters[name] = _copy_parameter(parameter, shard)
    _warn_uninitialised(missing)


class _Tensor(NamedTuple):
    """The properties of a meta tensor that must survive its allocation."""

    dtype: torch.dtype
    attributes: dict[str, Any]


class _Pending(NamedTuple):
    """A module with meta tensors of its own, the properties to keep of each, and its other tensors (``kept``).

    ``draws_in_fp32`` marks modules that Megatron draws in fp32 before it casts them. On a CPU the values differ
    otherwise: torch 2.11 draws bf16 from coarser random numbers, 2.15 no longer does.
    """

    name: str
    module: torch.nn.Module
    tensors: dict[str, _Tensor]
    kept: dict[str, torch.Tensor]
    initialise_embedding: Callable[[torch.Tensor], object] | None
    draws_in_fp32: bool

    def allocate(self) -> None:
        """Allocate the tensors on this rank's device, unsharded."""
        for name in self.tensors:
            meta = self.get_tensor(name)
            whole = torch.empty(meta.shape, dtype=meta.dtype, device=torch.device("cuda"))
            if isinstance(meta, torch.nn.Parameter):
                self.module._parameters[name] = _copy_parameter(meta, whole)
            else:
                self.module._buffers[name] = whole

    def initialise(self) -> list[str]:
        """Initialise the allocated tensors; return the names of those that nothing initialised."""
        kind = type(self.module)
        reset = getattr(kind, "reset_parameters", None) or getattr(kind, "_reset_parameters", None)
        with torch.no_grad():
            for name in self.tensors:
                tensor = self.get_tensor(name)
                if self.draws_in_fp32:
                    tensor.data = tensor.data.float()
                # A value that an initialiser replaces: what is still NaN afterwards was not initialised.
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
            if reset is not None:
                reset(self.module)
            if self.initialise_embedding is not None:
                self.initialise_embedding(self.get_tensor("weight"))
            for name, tensor in self.kept.items():  # reset_parameters has overwritten them too
                self.get_tensor(name).copy_(tensor)
        for name, (dtype, attributes) in self.tensors.items():
            tensor = self.get_tensor(name)
            tensor.data = tensor.data.to(dtype)  # of the mixed-precision wrapper, which ran on the meta device
            for attribute, value in attributes.items():
                vars(tensor).setdefault(attribute, value)
        return [f"{self.name}.{name}".lstrip(".") for name in self.tensors if self._is_missing(name, reset)]

    def share(self, share: Share | None) -> None:
        """Call a function with each parameter that was on the meta device."""
        if share is not None:
            for name in self.tensors:
                tensor = self.get_tensor(name)
                if isinstance(tensor, torch.nn.Parameter):
                    share(tensor)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return the current tensor of this name. Allocation and wrappers replace tensors, so none is kept."""
        tensor = (self.module._parameters | self.module._buffers)[name]
        assert tensor is not None
        return tensor

    def _is_missing(self, name: str, reset: object) -> bool:
        tensor = self.get_tensor(name)
        if tensor.is_meta:  # in a plan, which computes no values
            return False
        return bool(tensor.isnan().any()) if tensor.is_floating_point() else reset is None


def _find_pending(stage: torch.nn.Module) -> list[_Pending]:
    """List the modules that hold meta tensors, in construction order, so that random draws keep their order."""
    config = get_model_config(stage)
    embeddings = {
        child: config.embedding_init_method if isinstance(module, LanguageModelEmbedding) else config.init_method
        for module in stage.modules()
        if isinstance(module, LanguageModelEmbedding | RelativePositionEmbedding)
        for child in module.children()
        if isinstance(child, torch.nn.Embedding)  # positions and token types, which Megatron initialises itself
    }
    pending = []
    for name, module in stage.named_modules():
        own = {n: t for n, t in (module._parameters | module._buffers).items() if t is not None}
        meta = {n: _Tensor(t.dtype, dict(vars(t))) for n, t in own.items() if t.is_meta}
        if meta:
            kept = {n: t.detach().clone() for n, t in own.items() if n not in meta}
            in_fp32 = module in embeddings or isinstance(module, Router)
            pending.append(_Pending(name, module, meta, kept, embeddings.get(module), in_fp32))
    return pending


def _share_tied_embedding(stage: MegatronModule, pg_collection: ProcessGroupCollection) -> None:
    """Copy a tied embedding from the first pipeline stage to the other stages that hold it.

    On the meta device megatron-core 0.19.2 leaves this to the caller (``setup_embeddings_and_output_layer``).
    """
    if pg_collection.pp.size() == 1:
        return
    for model in stage.modules():
        if isinstance(model, LanguageModule) and model._is_in_embd_group() and _has_tied_embedding(model):
            weight = model.shared_embedding_or_output_weight()
            if not model.pre_process:
                weight.data.zero_()  # the sum over the group is then the embedding of the first stage
            torch.distributed.all_reduce(weight.data, group=model.embd_group)


def _has_tied_embedding(model: LanguageModule) -> bool:
    return bool(model.share_embeddings_and_output_weights or getattr(model, "mtp_process", False))


def _warn_uninitialised(missing: Sequence[str]) -> None:
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        logger.warning(
            "init_model_with_meta_device: no module initialises %s, which are NaN: load a checkpoint before use", names
        )
