"""Load a folder of transformers into the stages of this rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.config.errors import Problem
from bridge.dist.engine.meta import allocate_stages
from bridge.dist.engine.placement import Placement, named_buffers, named_parameters
from bridge.models.errors import WeightsError
from bridge.models.huggingface.folder.folder import Folder, open_folder
from bridge.models.huggingface.folder.stored import make_problem
from bridge.models.huggingface.transfer.names import canonicalize_name
from bridge.models.huggingface.transfer.regions import Region, find_regions
from bridge.models.huggingface.transfer.tensors import CHUNK, TensorReader
from bridge.models.huggingface.weights.language_model import OUTPUT
from bridge.models.huggingface.weights.weight import Part, Repetition, Weight


def load_weights(
    stages: Sequence[MegatronModule], folder: str | Path | Folder, pg_collection: ProcessGroupCollection
) -> None:
    """Load the weights of a folder into the stages of this rank, before they are wrapped.

    Each rank reads the rows that it holds from memory-mapped files; there is no collective. Stages on the meta device
    get memory on this rank's device, and nothing of theirs is drawn at random.

    Args:
        stages: The stages of this rank, as ``build_stages`` returns them or a pre-wrap hook receives them.
        folder: A folder with config.json and safetensors files, or what ``open_folder`` returned.
        pg_collection: The process groups of this rank.

    Raises:
        DocumentError: config.json is invalid, or describes a model that Megatron-Core does not have.
        WeightsError: The tensors are not those of the model: all problems, before the first byte is read.
    """
    opened = folder if isinstance(folder, Folder) else open_folder(folder)
    _check_layers(stages, opened)
    planned = [(stage, _plan(stage, opened, pg_collection)) for stage in stages]
    if problems := [problem for _, (_, found) in planned for problem in found]:
        raise WeightsError(list(dict.fromkeys(problems)))
    reader = TensorReader()
    check_repetitions(opened, reader)
    allocate_stages(stages, loaded={name for _, (known, _) in planned for name in known})
    for stage, (known, _) in planned:
        for placement, tensor in _list_tensors(stage, pg_collection):
            weight, parts = known[placement.name]
            fill(tensor, find_regions(parts, placement), weight, opened, reader)


Known = dict[str, tuple[Weight, tuple[Part, ...]]]


def _plan(stage: MegatronModule, folder: Folder, pg_collection: ProcessGroupCollection) -> tuple[Known, list[Problem]]:
    """Return what each parameter of a stage is made of, by its name in the stage."""
    known: Known = {}
    problems = []
    for placement, _ in _list_tensors(stage, pg_collection):
        name = canonicalize_name(placement.full_name)
        found = folder.match.weights.get(name)
        if found is None:
            problems.append(Problem(name, "the folder has no such parameter: it is of another model"))
            continue
        weight, _ = known[placement.name] = found
        if not weight.fits(placement.full_shape):
            built, stored = list(placement.full_shape), list(weight.shape)
            problems.append(Problem(name, f"the model has the shape {built}, the folder {stored}"))
    return known, problems


def _list_tensors(
    stage: MegatronModule, pg_collection: ProcessGroupCollection
) -> Iterator[tuple[Placement, torch.Tensor]]:
    for placement, parameter, _ in named_parameters(stage, pg_collection):
        yield placement, parameter
    for placement, buffer, _ in named_buffers(stage, pg_collection):
        yield placement, buffer


def _check_layers(stages: Sequence[MegatronModule], folder: Folder) -> None:
    """Check the sizes that decide how many parameters there are: no single stage would miss those of others."""
    problems = []
    for field in ("num_layers", "num_moe_experts", "mtp_num_layers"):
        built, expected = getattr(stages[0].config, field), folder.fields[f"transformer.{field}"]
        if (built or 0) != (expected or 0):
            problems.append(Problem(f"transformer.{field}", f"is {built} in the model, but {expected} in the folder"))
    if problems:
        raise WeightsError(problems)


def check_repetitions(folder: Folder, reader: TensorReader) -> None:
    """Check that tensors that repeat others equal them.

    Raises:
        WeightsError: They do not.
    """
    problems = []
    for one in folder.match.repeated:
        if not _are_equal(one, folder, reader):
            reason = (
                "config.json ties the two: set tie_word_embeddings to false in it"
                if one.tensor == OUTPUT
                else "Megatron-Core has one parameter for both"
            )
            problems.append(make_problem(folder.stored[one.tensor], f"differs from {one.of}, but {reason}"))
    if problems:
        raise WeightsError(problems)


def _are_equal(one: Repetition, folder: Folder, reader: TensorReader) -> bool:
    first, second = folder.stored[one.tensor], folder.stored[one.of]
    rows, width = first.shape[0], first.shape[1]
    step = max(1, CHUNK // (4 * width))
    for start in range(0, rows, step):
        taken = range(start, min(start + step, rows))
        parts = (Part(name, tensor.shape, taken) for name, tensor in ((one.tensor, first), (one.of, second)))
        mine, other = (
            reader.read(tensor, part, taken, slice(None)).clone()
            for part, tensor in zip(parts, (first, second), strict=True)
        )
        if not torch.equal(mine.float(), other.float()):
            return False
    return True


@torch.no_grad()
def fill(tensor: torch.Tensor, regions: Iterable[Region], weight: Weight, folder: Folder, reader: TensorReader) -> None:
    """Copy regions into rows of a parameter; rows that pad the vocabulary become zero."""
    filled = 0
    for region in regions:
        stored = folder.stored[region.part.tensor]
        target = tensor[region.local]
        step = max(1, CHUNK // (4 * max(1, target[0].numel())))
        for start in range(0, len(region.rows), step):
            rows = region.rows[start : start + step]
            read = reader.read(stored, region.part, rows, region.columns)
            if weight.factor != 1.0:
                read = read.float() * weight.factor
            target[start : start + len(rows)].copy_(read)
        filled += len(region.rows)
    if filled < len(tensor):
        assert weight.per_token  # the rows that pad the vocabulary come last
        tensor[filled:].zero_()
