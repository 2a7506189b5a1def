"""Load a folder of transformers into the stages of this rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.config.errors import Problem
from bridge.dist.engine.meta import load_stage
from bridge.dist.engine.placement import named_tensors
from bridge.dist.engine.stages import unwrap
from bridge.dist.engine.weights import set_values
from bridge.models.errors import WeightsError, raise_any
from bridge.models.huggingface.folder.folder import Folder, open_folder
from bridge.models.huggingface.folder.stored import make_problem
from bridge.models.huggingface.transfer.names import canonicalize_name
from bridge.models.huggingface.transfer.regions import Region, check_row_order, find_regions
from bridge.models.huggingface.transfer.tensors import CHUNK, TensorReader
from bridge.models.huggingface.weights.language_model import OUTPUT
from bridge.models.huggingface.weights.weight import Part, Repetition, Weight


def load_weights(
    stages: Sequence[MegatronModule], folder: str | Path | Folder, pg_collection: ProcessGroupCollection
) -> None:
    """Load the weights of a folder into the stages of this rank, before they are wrapped.

    Each rank reads the rows that it holds from memory-mapped files; there is no collective. Tensors that must equal
    others are compared by all ranks together, each a share of the rows: only the rank that finds a difference fails.
    Stages on the meta device get memory on this rank's device, and nothing of theirs is drawn at random. In a pre-wrap
    hook of a model that FSDP will shard they stay there: the wrapper then loads one module after the other.

    Args:
        stages: The stages of this rank, as ``build_stages`` returns them or a pre-wrap hook receives them.
        folder: A folder with config.json and safetensors files, or what ``open_folder`` returned.
        pg_collection: The process groups of this rank.

    Raises:
        DocumentError: config.json is invalid, or describes a model that Megatron-Core does not have.
        WeightsError: The tensors are not those of the model: all problems, before the first byte is read.
    """
    opened = folder if isinstance(folder, Folder) else open_folder(folder)
    raise_any([problem for stage in stages for problem in _find_unquantized(stage)])
    known = match_stages(stages, opened, pg_collection)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with TensorReader() as reader:
        check_repetitions(opened, reader, rank=rank, ranks=ranks)
        for stage, names in zip(stages, known, strict=True):
            loads = {}
            for placement, _ in named_tensors(stage, pg_collection):
                weight, parts = names[placement.name]
                regions = find_regions(parts, placement)
                copy = partial(fill, regions=regions, weight=weight, folder=opened, reader=reader)
                loads[placement.name] = partial(set_values, fill=copy)
            load_stage(unwrap(stage), loads)


def _find_unquantized(stage: MegatronModule) -> Iterator[Problem]:
    """Yield the settings that want weights in 8 or 4 bits, if the stage has weights on the meta device."""
    if any(parameter.is_meta for parameter in stage.parameters()):
        for name in ("fp8_param", "fp4_param"):
            if getattr(stage.config, name):
                reason = "Transformer Engine quantizes weights when it initialises them, and these are loaded"
                advice = "set transformer.init_model_with_meta_device, or this, to false"
                yield Problem(f"transformer.{name}", f"{reason} from the meta device: {advice}")


Known = dict[str, tuple[Weight, tuple[Part, ...]]]
"""What each parameter of a stage is made of, by its name in the stage."""


def match_stages(
    stages: Sequence[MegatronModule], folder: Folder, pg_collection: ProcessGroupCollection
) -> list[Known]:
    """Return what the parameters of each stage are made of.

    Raises:
        WeightsError: The stages are of another model.
    """
    _check_layers(stages, folder)
    expected = _group_by_place(folder.match.weights)
    matched = [_match_stage(stage, folder, expected, pg_collection) for stage in stages]
    raise_any([problem for _, found in matched for problem in found])
    return [known for known, _ in matched]


def _match_stage(
    stage: MegatronModule, folder: Folder, expected: Mapping[str, Set[str]], pg_collection: ProcessGroupCollection
) -> tuple[Known, list[Problem]]:
    known: Known = {}
    problems = []
    for placement, _ in named_tensors(stage, pg_collection):
        name = canonicalize_name(placement.full_name)
        found = folder.match.weights.get(name)
        if found is None:
            problems.append(Problem(name, "the folder has no such parameter: it is of another model"))
            continue
        weight, _ = known[placement.name] = found
        if not weight.fits(placement.full_shape):
            built, stored = list(placement.full_shape), list(weight.shape)
            problems.append(Problem(name, f"the model has the shape {built}, the folder {stored}"))
    return known, [*problems, *_find_left_out(stage, {weight.name for weight, _ in known.values()}, expected)]


def _find_left_out(stage: MegatronModule, names: Set[str], expected: Mapping[str, Set[str]]) -> Iterator[Problem]:
    """Yield the weights that a stage should have, since it has others of the same place.

    Args:
        stage: The stage.
        names: Its parameters and buffers. Other ranks may have other experts of its layers.
        expected: The weights of the folder, from ``_group_by_place``.
    """
    found = _group_by_place(names)
    model: Any = unwrap(stage)
    if not model.pre_process:
        found.pop(_FIRST, None)  # the output layer and multi-token prediction share the word embedding
    ends = ((_FIRST, model.pre_process), (_LAST, model.post_process))
    for place in (*found, *(place for place, is_here in ends if is_here and place not in found)):
        for name in sorted(expected.get(place, set()) - found.get(place, set())):
            yield Problem(name, "the model has no such parameter, but the folder has: it is of another model")


_FIRST, _LAST = "embedding", "output_layer"


def _group_by_place(names: Iterable[str]) -> dict[str, set[str]]:
    """Return parameters by their layer, or the part of the model outside layers: a stage has all of a place, or none.

    The experts of a layer, which ranks share, have one name.
    """
    places: dict[str, set[str]] = {}
    for name in names:
        layer = _LAYER.match(name)
        place = layer[0] if layer else name.partition(".")[0]
        places.setdefault(place, set()).add(_EXPERT.sub(r"\1", name))
    return places


_LAYER = re.compile(r".*?\blayers\.\d+")
_EXPERT = re.compile(r"(\.experts\.linear_fc[12]\.(?:weight|bias))\d+$")


def _check_layers(stages: Sequence[MegatronModule], folder: Folder) -> None:
    """Check the sizes that decide how many parameters there are: no single stage would miss those of others.

    Raises:
        WeightsError: They differ, or the model has rows in another order.
    """
    sizes = {
        f"transformer.{field}": (getattr(stages[0].config, field), folder.fields[f"transformer.{field}"])
        for field in ("num_layers", "num_moe_experts", "mtp_num_layers")
    }
    if (encoder := getattr(unwrap(stages[0]), "encoder_config", None)) is not None:
        layers = folder.fields.get("encoder_num_layers") or folder.fields["transformer.num_layers"]
        sizes["encoder_num_layers"] = encoder.num_layers, layers
    problems = [
        Problem(field, f"is {built} in the model, but {expected} in the folder")
        for field, (built, expected) in sizes.items()
        if (built or 0) != (expected or 0)
    ]
    raise_any([*problems, *check_row_order(stages[0].config)])


def check_repetitions(folder: Folder, reader: TensorReader, *, rank: int = 0, ranks: int = 1) -> None:
    """Check that tensors that repeat others equal them, in the share of their rows of one rank of many.

    Raises:
        WeightsError: They do not.
    """
    problems = []
    for one in folder.match.repeated:
        if not _are_equal(one, folder, reader, rank=rank, ranks=ranks):
            reason = (
                "config.json ties the two: set tie_word_embeddings to false in it"
                if one.tensor == OUTPUT
                else "Megatron-Core has one parameter for both"
            )
            problems.append(make_problem(folder.stored[one.tensor], f"differs from {one.of}, but {reason}"))
    if problems:
        raise WeightsError(problems)


def share_rows(rows: int, *, rank: int, ranks: int) -> range:
    """Return the rows of a repeated tensor that a rank compares."""
    return range(rows * rank // ranks, rows * (rank + 1) // ranks)


def _are_equal(one: Repetition, folder: Folder, reader: TensorReader, *, rank: int, ranks: int) -> bool:
    first, second = folder.stored[one.tensor], folder.stored[one.of]
    rows = share_rows(first.shape[0], rank=rank, ranks=ranks)
    step = max(1, CHUNK // (4 * first.shape[1]))
    for start in range(0, len(rows), step):
        taken = rows[start : start + step]
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
