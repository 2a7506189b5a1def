"""Initialise stages that were built on the meta device, where a tensor has a shape but no memory.

A module initialises itself again (``reset_parameters``) once its tensors have memory. Tensors that no module
initialises are filled with NaN instead of arbitrary memory, and a warning names them: they need a checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.moe.router import Router
from megatron.core.utils import get_model_config
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.overrides import TorchFunctionMode

from bridge.dist.patch import Replacement, replace_attributes

logger = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
Share = Callable[[torch.nn.Parameter], None]
Load = Callable[[torch.Tensor], None]


class NothingInitialised(TorchFunctionMode):
    """Puts the weights of a stage on the meta device whose layers do not initialise them.

    megatron-core 0.19.2 allocates the weights of its own layers on the GPU, also under ``torch.device("meta")``, by
    ``torch.empty``.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.empty:
            kwargs = {**(kwargs or {}), "device": torch.device("meta")}
        return func(*args, **(kwargs or {}))


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


def load_stage(stage: MegatronModule, loads: Mapping[str, Load]) -> None:
    """Fill tensors of a stage. Those on the meta device are allocated on this rank's device first.

    Under ``load_while_wrapping`` they stay on the meta device: the tensors of a module are filled when the wrapper
    allocates it.

    Args:
        stage: Changed in place.
        loads: What fills each tensor, by its name in the stage. Modules on the meta device that have other tensors are
            initialised.
    """
    pending = _find_pending(stage)
    now = dict(loads)
    if pending and _loads_while_wrapping.get():
        for module in pending:
            _loads[module.module] = {tensor: now.pop(name) for tensor, name in module.names.items() if name in now}
    elif pending:
        materialize(stage, torch.device("cuda"))
        others = [module for module in pending if not loads.keys() >= set(module.names.values())]
        _warn_uninitialised([name for module in others for name in module.initialise() if name not in loads])
    tensors = dict((*stage.named_parameters(), *stage.named_buffers()))
    for name, load in now.items():
        load(tensors[name])


@contextlib.contextmanager
def load_while_wrapping() -> Iterator[None]:
    """Let ``load_stage`` leave stages on the meta device, for a wrapper that allocates one module at a time."""
    token = _loads_while_wrapping.set(True)
    try:
        yield
    finally:
        _loads_while_wrapping.reset(token)


_loads_while_wrapping: ContextVar[bool] = ContextVar("loads_while_wrapping", default=False)
_loads: WeakKeyDictionary[torch.nn.Module, dict[str, Load]] = WeakKeyDictionary()
"""What fills the tensors of modules on the meta device, by their names in the module."""


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

    @property
    def names(self) -> dict[str, str]:
        """The names of the tensors in the stage, by those in the module."""
        return {name: f"{self.name}.{name}".lstrip(".") for name in self.tensors}

    def initialise(self) -> list[str]:
        """Load or initialise the allocated tensors; return the names of those that nothing initialised."""
        kind = type(self.module)
        reset = getattr(kind, "reset_parameters", None) or getattr(kind, "_reset_parameters", None)
        loads = _loads.pop(self.module, {})
        if not loads.keys() >= self.tensors.keys():
            self._reset(reset)
        for name, (dtype, attributes) in self.tensors.items():
            tensor = self.get_tensor(name)
            tensor.data = tensor.data.to(dtype)  # of the mixed-precision wrapper, which ran on the meta device
            for attribute, value in attributes.items():
                vars(tensor).setdefault(attribute, value)
        for name, load in loads.items():
            load(self.get_tensor(name))
        return [full for name, full in self.names.items() if name not in loads and self._is_missing(name, reset)]

    def _reset(self, reset: Callable[[torch.nn.Module], object] | None) -> None:
        """Initialise the tensors by a method of the module's class, if it has one."""
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
