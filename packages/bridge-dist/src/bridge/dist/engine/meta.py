"""Weights of stages that were built on the meta device, where a tensor has a shape and no memory.

A module initialises itself again (``reset_parameters``) once its tensors have memory. What no module initialises is
filled with NaN, never left as whatever the memory held, and a warning names it: a checkpoint has to be loaded.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
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
    """Give meta tensors uninitialised memory on ``device`` and move the others there, values kept.

    Parameters keep their attributes, and a parameter that two modules share stays shared.

    Args:
        module: Changed in place and returned.
        device: Where its parameters and buffers shall be.
        recurse: False leaves the children as they are.
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
    """A parameter of other data; Megatron keeps what it knows of one, such as how it is split, in attributes."""
    made = torch.nn.Parameter(data, parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def initialise_stages(stages: Sequence[MegatronModule], pg_collection: ProcessGroupCollection) -> None:
    """Give whole stages that were built on the meta device memory on this rank's device, and weights."""
    missing: list[str] = []
    for stage in stages:
        pending = _find_pending(stage)
        materialize(stage, torch.device("cuda"))
        for module in pending:
            missing += module.initialise()
        _share_tied_embedding(stage, pg_collection)
    _warn_uninitialised(missing)


@contextlib.contextmanager
def initialise_while_wrapping(stage: MegatronModule, share: Share | None) -> Iterator[None]:
    """While Megatron-FSDP wraps a stage on the meta device: it empties module after module and resets each.

    megatron-core 0.19.2 loses the attributes of parameters on the way, and fails for a module that cannot reset itself.

    Args:
        stage: Has its modules' ``reset_parameters`` replaced until the context is left.
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
    """Give a stage that torch FSDP2 sharded on the meta device weights: no more than one module is whole at a time.

    Args:
        stage: Its sharded parameters are replaced by ones with memory, which FSDP2 expects before the first step.
        share: Called with each whole parameter, before this rank's shard is cut out of it.
    """
    missing: list[str] = []
    for module in _find_pending(stage):
        owner = module.module
        sharded = {name: module.own(name) for name in module.tensors if name in owner._parameters}
        module.allocate()
        missing += module.initialise()
        module.share(share)
        for name, parameter in sharded.items():
            assert isinstance(parameter, DTensor)
            whole = module.own(name).data
            # No source rank: each rank cuts its shard out of its own whole tensor.
            shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            owner._parameters[name] = _copy_parameter(parameter, shard)
    _warn_uninitialised(missing)


class _Tensor(NamedTuple):
    """What is to be kept of a meta tensor when it gets memory."""

    dtype: torch.dtype
    attributes: dict[str, Any]


class _Pending(NamedTuple):
    """A module that holds meta tensors of its own, and what to keep of each; ``kept`` are its other tensors.

    ``draws_in_fp32`` is for modules that Megatron draws in fp32, whatever it casts them to. On a CPU it makes a
    difference: torch 2.11 draws bf16 from coarser random numbers, 2.15 no longer does.
    """

    name: str
    module: torch.nn.Module
    tensors: dict[str, _Tensor]
    kept: dict[str, torch.Tensor]
    initialise_embedding: Callable[[torch.Tensor], object] | None
    draws_in_fp32: bool

    def allocate(self) -> None:
        """Give the tensors memory on this rank's device, each as a whole."""
        for name in self.tensors:
            meta = self.own(name)
            whole = torch.empty(meta.shape, dtype=meta.dtype, device=torch.device("cuda"))
            if isinstance(meta, torch.nn.Parameter):
                self.module._parameters[name] = _copy_parameter(meta, whole)
            else:
                self.module._buffers[name] = whole

    def initialise(self) -> list[str]:
        """Initialise the tensors, which have memory by now; return the names of those that nothing initialised."""
        kind = type(self.module)
        reset = getattr(kind, "reset_parameters", None) or getattr(kind, "_reset_parameters", None)
        with torch.no_grad():
            for name in self.tensors:
                tensor = self.own(name)
                if self.draws_in_fp32:
                    tensor.data = tensor.data.float()
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
            if reset is not None:
                reset(self.module)
            if self.initialise_embedding is not None:
                self.initialise_embedding(self.own("weight"))
            for name, tensor in self.kept.items():
                self.own(name).copy_(tensor)
        for name, (dtype, attributes) in self.tensors.items():
            tensor = self.own(name)
            tensor.data = tensor.data.to(dtype)  # the wrapper's
            for attribute, value in attributes.items():
                vars(tensor).setdefault(attribute, value)
        return [f"{self.name}.{name}".lstrip(".") for name in self.tensors if self._is_missing(name, reset)]

    def share(self, share: Share | None) -> None:
        """Call a function with each parameter that was on the meta device."""
        if share is not None:
            for name in self.tensors:
                tensor = self.own(name)
                if isinstance(tensor, torch.nn.Parameter):
                    share(tensor)

    def own(self, name: str) -> torch.Tensor:
        """Return a tensor of the module as it is now."""
        tensor = (self.module._parameters | self.module._buffers)[name]
        assert tensor is not None
        return tensor

    def _is_missing(self, name: str, reset: object) -> bool:
        tensor = self.own(name)
        if tensor.is_meta:  # a plan has no values
            return False
        return bool(tensor.isnan().any()) if tensor.is_floating_point() else reset is None


def _find_pending(stage: torch.nn.Module) -> list[_Pending]:
    """List the modules that hold meta tensors, in the order in which modules are made."""
    config = get_model_config(stage)
    embeddings = {
        child: config.embedding_init_method if isinstance(module, LanguageModelEmbedding) else config.init_method
        for module in stage.modules()
        if isinstance(module, LanguageModelEmbedding | RelativePositionEmbedding)
        for child in module.children()
        if isinstance(child, torch.nn.Embedding)  # of positions and token types: Megatron initialises them anew
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
    """Give the last pipeline stage the first one's embedding where they are tied, as Megatron does off the meta device.

    megatron-core 0.19.2 leaves it to whoever loads the weights (``setup_embeddings_and_output_layer``).
    """
    if pg_collection.pp.size() == 1:
        return
    for model in stage.modules():
        if isinstance(model, LanguageModule) and model._is_in_embd_group() and _has_tied_embedding(model):
            weight = model.shared_embedding_or_output_weight()
            if not model.pre_process:
                weight.data.zero_()
            torch.distributed.all_reduce(weight.data, group=model.embd_group)


def _has_tied_embedding(model: LanguageModule) -> bool:
    return bool(model.share_embeddings_and_output_weights or getattr(model, "mtp_process", False))


def _warn_uninitialised(missing: Sequence[str]) -> None:
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        logger.warning(
            "init_model_with_meta_device: nothing initialises %s, they are NaN; load a checkpoint before use", shown
        )
