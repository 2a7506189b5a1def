"""Checks of parameters that several ranks hold copies of: their values after hooks, and their gradients.

Tensor-parallel ranks hold copies of every parameter that is not split. The first and the last pipeline stage hold a
tied embedding, each under a name of its own.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from bridge.builders.hooks import Hook, get_hook_name
from bridge.dist.checks.agreement import is_alone
from bridge.dist.engine.placement import get_tensor_group, named_parameters
from bridge.dist.errors import CopyError

ItemT = TypeVar("ItemT")

# Gradients of true copies differ only by rounding. Below this fraction of the largest norm, rounding may dominate.
_GRADIENT_TOLERANCE = 0.05
_SMALLEST_GRADIENT = 1e-4
_MOST_PROBLEMS = 20
_MOST_GRADIENTS = 5  # a wrong gradient makes those of all earlier layers wrong
_EMBEDDING, _OUTPUT = "embedding.word_embeddings", "output_layer"
_MARK_A_SHARD = """\
If each rank holds a part of it, mark it when it is created:
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=DIM, stride=1)
    parameter.allreduce = False  # only for parameters of experts that have process groups of their own"""
_MAKE_COPIES = """\
If each rank holds a copy, all must start from the same values: set the same seed on all ranks before drawing it."""
_SYNCHRONISE = """\
If each rank holds a copy, each must get the whole gradient: pass the input of split layers through
copy_to_tensor_model_parallel_region of megatron.core.tensor_parallel, or let Megatron average the copies' gradients:
    parameter.average_gradients_across_tp_domain = True"""


class _State(NamedTuple):
    """The properties that all copies of a parameter must share."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    values: str | None = None
    """A fingerprint; None if ranks hold different shards, or no values yet (the meta device)."""


class _Copy(NamedTuple):
    """A copy of a tied embedding: its name on a stage of a rank, and its state, None if the copy is missing."""

    name: str
    rank: int
    state: _State | None


def is_tied(stages: Sequence[MegatronModule]) -> bool:
    """Return whether the output layer of these stages uses the weight of the embedding."""
    return any(model.share_embeddings_and_output_weights for model in _iter_language_models(stages))


def list_user_hooks(hooks: Iterable[Hook]) -> list[str]:
    """Return the names of the hooks that are not Bridge's own. Bridge's hooks keep copies equal."""
    each = [one for hook in hooks for one in getattr(hook, "hooks", (hook,))]  # some are composed
    return [get_hook_name(hook) for hook in each if not getattr(hook, "__module__", "").startswith("bridge.")]


def check_copies(
    stages: Sequence[MegatronModule], pg_collection: ProcessGroupCollection, *, tied: bool, hooks: Sequence[str]
) -> None:
    """Check that the pre-wrap hooks kept copies of parameters equal. Collective.

    Args:
        stages: The stages of this rank, as returned by the hooks.
        pg_collection: The process groups of this rank.
        tied: Whether the embedding was tied before the hooks.
        hooks: The names of the hooks, for the error.

    Raises:
        CopyError: On every rank, naming the parameters.
    """
    problems = list(_find_lost_ties(stages, tied=tied))
    if not is_alone():
        problems += _compare_embeddings(_gather(_list_embeddings(stages, tied=tied), pg_collection.pp))
        problems += _compare_parameters(stages, pg_collection)
    _raise_if_any(problems, pg_collection, f"after the pre-wrap hooks ({', '.join(hooks)})")


def check_gradients(stages: Sequence[MegatronModule], pg_collection: ProcessGroupCollection) -> None:
    """Check after a backward pass that the gradients of copies agree on tensor-parallel ranks. Collective.

    Raises:
        CopyError: On every rank, naming the parameters whose copies would diverge.
    """
    if is_alone() or pg_collection.tp.size() == 1:
        return
    gradients = {
        named.placement.full_name: gradient
        for stage in stages
        for named in named_parameters(stage, pg_collection)
        if not _is_split(named.parameter)
        and get_tensor_group(named.parameter, pg_collection) is pg_collection.tp
        and (gradient := _get_gradient(named.parameter)) is not None
    }
    differences = _compare_gradients(gradients, pg_collection.tp)
    # The backward pass goes from the last layer to the first, so the last difference is nearest to the cause.
    problems = [*differences[-_MOST_GRADIENTS:], _MARK_A_SHARD, _SYNCHRONISE] if differences else []
    where = "in their gradients, so that their values would diverge between tensor-parallel ranks"
    _raise_if_any(problems, pg_collection, f"{where}; the last differences in model order")


def _compare_gradients(gradients: dict[str, torch.Tensor], group: ProcessGroup) -> list[str]:
    """Compare this rank's gradients with those of the first rank of its group; return a problem for each difference."""
    shapes = {name: tuple(gradient.shape) for name, gradient in gradients.items()}
    everyone = _gather([shapes], group)
    rank = torch.distributed.get_rank()
    problems = [
        f"{name}: no gradient of the same shape on all tensor-parallel ranks"
        for name in dict.fromkeys(name for shapes_of in everyone for name in shapes_of)
        if len({shapes_of.get(name) for shapes_of in everyone}) > 1
    ]
    if problems or not gradients:  # the same on every rank, so all skip the broadcast below
        return problems
    mine = [gradient.detach().float().flatten() for gradient in gradients.values()]
    first = torch.cat(mine)
    torch.distributed.broadcast(first, group_src=0, group=group)
    theirs = first.split([part.numel() for part in mine])
    norms = [part.norm().item() for part in theirs]
    floor = _SMALLEST_GRADIENT * max(norms)
    for name, part, other, norm in zip(gradients, mine, theirs, norms, strict=True):
        difference = (part - other).norm().item()
        if difference > max(_GRADIENT_TOLERANCE * norm, floor):
            problems.append(f"{name}: the gradient on rank {rank} differs by {difference:.3g}, its norm is {norm:.3g}")
    return problems


def _get_gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    gradient: Any = getattr(parameter, "main_grad", None)
    if gradient is None:
        gradient = parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _iter_language_models(stages: Iterable[torch.nn.Module]) -> Iterator[LanguageModule]:
    for stage in stages:
        yield from (module for module in stage.modules() if isinstance(module, LanguageModule))


def _find_lost_ties(stages: Sequence[MegatronModule], *, tied: bool) -> Iterator[str]:
    """Yield a problem for each way in which hooks broke the tie on this rank."""
    for model in _iter_language_models(stages):
        if model.share_embeddings_and_output_weights != tied:
            yield (
                f"share_embeddings_and_output_weights was {tied} and is {not tied}, but the stages were built for "
                f"{tied}: set it in the configuration, not in a hook"
            )
        embedding, output = _get_weight(model, _EMBEDDING), _get_weight(model, _OUTPUT)
        if tied and model.pre_process and model.post_process and output is not None and output is not embedding:
            yield (
                f"{_OUTPUT}.weight is new but unused, because the output layer uses the weight of {_EMBEDDING}: for "
                "separate weights, set share_embeddings_and_output_weights to False in the configuration"
            )
        path = _find_embedding_copy(model, tied=tied)
        copy = None if path is None else _get_weight(model, path)
        if copy is not None and _get_copy_attributes(model) - vars(copy).keys():
            yield (
                f"{path}.weight was replaced by a parameter without Megatron's attributes for tied embeddings: "
                "keep the parameter and change its data (weight.data.copy_)"
            )


def _find_embedding_copy(model: LanguageModule, *, tied: bool) -> str | None:
    """Return the layer that holds the copy of a shared embedding, following megatron-core 0.19.2.

    Multi-token prediction has its own copy unless it is on the first stage.
    """
    if model.pre_process or getattr(model, "mtp_process", False):
        return _EMBEDDING if tied or model.config.mtp_num_layers else None
    return _OUTPUT if tied and model.post_process else None


def _get_copy_attributes(model: LanguageModule) -> set[str]:
    """Return the attributes by which Megatron's gradient norm and optimizer recognise a copy."""
    if model.config.pipeline_model_parallel_size == 1:
        return set()
    return {"shared_embedding"} if model.pre_process else {"shared_embedding", "shared"}


def _list_embeddings(stages: Sequence[MegatronModule], *, tied: bool) -> list[_Copy]:
    """Return this rank's copies of a shared embedding."""
    copies = []
    for model in _iter_language_models(stages):
        path = _find_embedding_copy(model, tied=tied)
        if path is not None:
            weight = _get_weight(model, path)
            # On the meta device the copy has no values yet.
            values = not model.config.init_model_with_meta_device
            state = None if weight is None else _make_state(weight, values=values)
            copies.append(_Copy(f"{path}.weight", torch.distributed.get_rank(), state))
    return copies


def _compare_embeddings(copies: Sequence[_Copy]) -> Iterator[str]:
    if len({copy.state for copy in copies}) <= 1:
        return
    states = {f"{copy.name} (rank {copy.rank})": copy.state for copy in copies}
    yield (
        f"the copies of the tied embedding differ: {_describe(states)}. "
        "They train as one: change all of them in the same way (on the last pipeline stage it is output_layer.weight)"
    )


def _compare_parameters(stages: Sequence[MegatronModule], pg_collection: ProcessGroupCollection) -> Iterator[str]:
    """Yield the differences between this rank's tensor-parallel ranks, and how to fix them."""
    groups = [pg_collection.tp]
    if getattr(pg_collection, "expt_tp", None) is not None:
        groups.append(pg_collection.expt_tp)
    mine: list[dict[str, _State]] = [{} for _ in groups]
    for stage in stages:
        for named in named_parameters(stage, pg_collection):
            group = groups.index(get_tensor_group(named.parameter, pg_collection))
            values = not (_is_split(named.parameter) or named.parameter.is_meta)
            mine[group][named.placement.full_name] = _make_state(named.parameter, values=values)
    differing = {
        name: states
        for group, states_of in zip(groups, mine, strict=True)
        for name, states in _gather_by_name(states_of, group).items()
        if len(set(states.values())) > 1
    }
    for name, states in list(differing.items())[:_MOST_PROBLEMS]:
        yield f"{name} differs between tensor-parallel ranks: {_describe(states)}"
    if len(differing) > _MOST_PROBLEMS:
        yield f"and {len(differing) - _MOST_PROBLEMS} more parameters"
    if any(state is not None and state.values for states in differing.values() for state in states.values()):
        yield from (_MARK_A_SHARD, _MAKE_COPIES)
    elif differing:
        yield "A hook must do the same on every tensor-parallel rank"


def _gather_by_name(mine: dict[str, _State], group: ProcessGroup) -> dict[str, dict[str, _State | None]]:
    """Gather states over a group, keyed by parameter name and rank."""
    ranks = torch.distributed.get_process_group_ranks(group)
    everyone = dict(zip(ranks, _gather([mine], group), strict=True))
    names = dict.fromkeys(name for states in everyone.values() for name in states)
    return {name: {f"rank {rank}": states.get(name) for rank, states in everyone.items()} for name in names}


def _describe(states: Mapping[str, _State | None]) -> str:
    """Describe the first difference: ``requires_grad is False on rank 0, True on rank 1``."""
    if missing := [place for place, state in states.items() if state is None]:
        return f"missing on {', '.join(missing)}"
    present = {place: state for place, state in states.items() if state is not None}
    field = next(field for field in _State._fields if len({getattr(state, field) for state in present.values()}) > 1)
    if field == "values":  # fingerprints mean nothing to a reader
        return f"different values on {', '.join(present)}"
    return f"{field} is " + ", ".join(f"{getattr(state, field)} on {place}" for place, state in present.items())


def _get_weight(model: torch.nn.Module, path: str) -> torch.nn.Parameter | None:
    layer: Any = model
    for name in path.split("."):
        layer = getattr(layer, name, None)
    weight: torch.nn.Parameter | None = getattr(layer, "weight", None)
    return weight


def _is_split(parameter: torch.nn.Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _make_state(parameter: torch.nn.Parameter, *, values: bool) -> _State:
    return _State(
        shape=tuple(parameter.shape),
        dtype=str(parameter.dtype),
        requires_grad=parameter.requires_grad,
        values=_fingerprint(parameter) if values else None,
    )


def _fingerprint(parameter: torch.nn.Parameter) -> str:
    data = parameter.detach()
    if type(data) is not torch.Tensor:  # a tensor subclass, for example FP8 with separate scales
        data = data.float()
    return hashlib.blake2b(data.cpu().reshape(-1).view(torch.uint8).numpy(), digest_size=8).hexdigest()


def _gather(mine: list[ItemT], group: ProcessGroup) -> list[ItemT]:
    """Collect the items of all ranks of a group, in their order."""
    if group.size() == 1:
        return mine
    everyone: list[list[ItemT]] = [[] for _ in range(group.size())]
    torch.distributed.all_gather_object(everyone, mine, group=group)
    return [item for items in everyone for item in items]


def _raise_if_any(problems: Sequence[str], pg_collection: ProcessGroupCollection, where: str) -> None:
    """Raise the problems of all ranks that build this model, on each of them."""
    known = list(dict.fromkeys(problems))
    if not is_alone():
        # Together these groups connect all ranks of the model, so passing problems on along each reaches every rank.
        for group in (pg_collection.tp, pg_collection.dp_cp, pg_collection.pp):
            known = list(dict.fromkeys(_gather(known, group)))
    if known:
        lines = textwrap.indent("\n".join(known), "  ")
        raise CopyError(f"parameters that are copies of each other differ {where}:\n{lines}")
