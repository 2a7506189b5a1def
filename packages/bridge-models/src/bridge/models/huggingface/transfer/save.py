"""Save the stages of all ranks as a folder of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.config import ModelConfig
from bridge.config.documents.hub_cache import resolve_repository
from bridge.config.errors import DocumentError, Problem
from bridge.dist.checkpoint.document import describe_model
from bridge.dist.checkpoint.partial import finish, name_partial
from bridge.dist.checkpoint.shards import find_divided, find_held_rows, show_whole
from bridge.dist.checkpoint.state import check_wrapper, gather_updated_parameters
from bridge.dist.checkpoint.together import gather, share_problems
from bridge.dist.checkpoint.tokenizer import carry_files
from bridge.dist.engine.placement import EMBEDDING, Placement, get_tensor_group, named_tensors
from bridge.dist.engine.stages import unwrap
from bridge.models.errors import WeightsError, raise_any
from bridge.models.huggingface.convert import to_hf
from bridge.models.huggingface.document_fields import read_fields
from bridge.models.huggingface.matching import find_architecture
from bridge.models.huggingface.transfer.layout import SHARD_BYTES, FileLayout, lay_out
from bridge.models.huggingface.transfer.names import canonicalize_name
from bridge.models.huggingface.transfer.output import (
    check_space,
    check_target,
    describe_failure,
    prepare,
    write_headers,
)
from bridge.models.huggingface.transfer.regions import (
    Region,
    check_row_order,
    cut_regions,
    find_regions,
    repeat_regions,
)
from bridge.models.huggingface.transfer.write import NAMES, TensorWriter
from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Repetition, Weight, list_written_tensors


def save_weights(
    stages: Sequence[MegatronModule],
    folder: str | Path,
    pg_collection: ProcessGroupCollection,
    *,
    model: ModelConfig,
    source: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model of all ranks as a folder of transformers: config.json and safetensors files.

    Collective over all ranks. Each rank writes the bytes that it holds into files of their final size. The folder gets
    its name when all bytes are written: a run that dies leaves ``FOLDER.partial``, which the next one replaces.

    Args:
        stages: The stages of this rank, wrapped or not.
        folder: Where to write; if it exists, it must be empty.
        pg_collection: The process groups of this rank.
        model: The configuration of the model, from which config.json is written.
        source: A folder whose tokenizer and generation settings are copied.
        shard_bytes: Most bytes of a file.

    Raises:
        DocumentError: transformers has no architecture for the model.
        WeightsError: The folder exists, ``source`` does not, the disk is too small, or transformers has no place for a
            weight.
        CheckpointError: Megatron-FSDP shards the stages otherwise than by default, or only an optimizer has their
            parameters.
    """
    check_wrapper(stages)
    gather_updated_parameters(stages)
    folder = Path(folder)
    table = _Table.of(model)
    is_first = torch.distributed.get_rank() == 0
    tokenizer = None
    with _raise_together(folder) as problems:
        listed = [one for stage in stages for one in _list_held(stage, table.weights, pg_collection)]
        held = [one for one in listed if isinstance(one, _Held)]
        problems += [one for one in listed if isinstance(one, Problem)] + check_row_order(stages[0].config)
        if is_first:
            if source is not None:
                tokenizer, found = _find_source(str(source))
                problems += found
            problems += check_target(folder) or prepare(folder)
    default = _get_default_dtype(stages[0])
    dtypes = _gather_dtypes(held, default=default)
    partial = name_partial(folder)
    with _raise_together(folder) as problems:
        layout = _lay_out_tensors(table, dtypes, default=default, shard_bytes=shard_bytes)
        problems += check_space(partial, sum(layout.sizes.values()))
    with _raise_together(folder):
        written = _write(held, table.repetitions, partial, layout)
    _check_whole(written, layout, partial)
    with _raise_together(folder):
        if is_first:
            write_headers(partial, layout, table.config)
            if tokenizer is not None:
                carry_files(tokenizer, partial)
            finish(folder)


def _raise_together(folder: Path) -> AbstractContextManager[list[Problem]]:
    """Yield a list for problems, and raise those of all ranks on every rank, with whatever went wrong on one of them.

    Collective over all ranks.
    """

    def describe(error: BaseException) -> list[Problem]:
        if isinstance(error, WeightsError):
            return error.problems
        if isinstance(error, OSError):
            return [describe_failure(folder, error)]
        return [Problem(str(folder), f"cannot be written: {type(error).__name__}: {error}")]

    return share_problems(describe, WeightsError)


@dataclass(frozen=True)
class _Table:
    """What the folder of a model has."""

    config: dict[str, Any]
    """The content of config.json."""

    weights: Mapping[str, Weight]
    repetitions: Sequence[Repetition]

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        document = describe_model(model).data
        config = to_hf(document).data
        entries = list(find_architecture(config).weights(Sizes(read_fields(document))))
        weights = {entry.name: entry for entry in entries if isinstance(entry, Weight)}
        return cls(config, weights, [one for one in entries if isinstance(one, Repetition) and one.is_written])


def _gather_dtypes(held: Sequence[_Held], *, default: str) -> dict[str, str]:
    """Return the precision in which some rank holds each weight, where it is not the default's. Collective."""
    found = gather({one.weight.name: one.dtype for one in held if one.dtype != default})
    return {name: dtype for each in found for name, dtype in each.items()}


def _lay_out_tensors(table: _Table, dtypes: Mapping[str, str], *, default: str, shard_bytes: int) -> FileLayout:
    """Return the place of each tensor."""
    tensors = (
        (tensor, dtypes.get(weight.name, default), part.shape)
        for tensor, part, weight in list_written_tensors(table.weights.values(), table.repetitions)
    )
    return lay_out(tensors, shard_bytes=shard_bytes)


def _check_whole(written: int, layout: FileLayout, partial: Path) -> None:
    """Check that the ranks together have written all bytes. Collective.

    Raises:
        WeightsError: They have not.
    """
    total = sum(gather(written))
    assert total <= layout.tensor_bytes, "ranks have written the same rows"  # the check below counts bytes
    if total < layout.tensor_bytes:
        raise_any([Problem(str(partial), "is not whole: no rank holds some of the weights that config.json describes")])


@dataclass(frozen=True)
class _Held:
    """Rows of a parameter that this rank writes."""

    weight: Weight
    placement: Placement
    first: int
    """The first of the rows, counted within the parameter of the stage."""

    rows: torch.Tensor
    dtype: str

    def list_regions(self, repetitions: Sequence[Repetition]) -> list[Region]:
        """Return where the rows go, with their places within ``rows``; into tensors that repeat others, too."""
        whole = find_regions(self.weight.forms[0], self.placement)
        return repeat_regions(cut_regions(whole, self.first, self.first + len(self.rows)), repetitions)


def _list_held(
    stage: MegatronModule, weights: Mapping[str, Weight], pg_collection: ProcessGroupCollection
) -> Iterator[_Held | Problem]:
    """Yield the parameters and buffers of a stage that this rank writes, and what is wrong with them."""
    divided = find_divided(stage)
    with show_whole(stage, divided):
        named = list(named_tensors(stage, pg_collection))
    for placement, tensor in named:
        name = canonicalize_name(placement.full_name)
        weight = weights.get(name)
        if weight is None:
            yield Problem(name, "config.json describes a model without this parameter")
            continue
        if not weight.fits(placement.full_shape):
            shape = list(placement.full_shape)
            yield Problem(name, f"expected the shape {list(weight.shape)} of config.json, got {shape}")
            continue
        if tensor.dtype not in NAMES:
            yield Problem(name, f"is of {tensor.dtype}: expected {', '.join(map(str, NAMES))}")
            continue
        rows, first = tensor.detach(), 0
        if (found := divided.get(placement.name)) is not None:
            rows, first = found.value.to_local().detach(), find_held_rows(found.value, len(tensor)).start
        if not weight.forms[0]:
            if rows.count_nonzero():
                yield Problem(name, "is not zero, but transformers has no such parameter")
        elif _is_owner(stage, placement, tensor, pg_collection, is_divided=found is not None):
            yield _Held(weight, placement, first, rows, NAMES[tensor.dtype])


def _is_owner(
    stage: MegatronModule,
    placement: Placement,
    tensor: torch.Tensor,
    pg_collection: ProcessGroupCollection,
    *,
    is_divided: bool,
) -> bool:
    """Return whether this rank is the one to write its rows of a parameter, of all that hold the same ones."""
    is_expert = not getattr(tensor, "allreduce", True)
    tensor_parallel = get_tensor_group(tensor, pg_collection)
    replicas = pg_collection.expt_dp if is_expert else pg_collection.dp_cp
    if placement.full_name == EMBEDDING and not getattr(unwrap(stage), "pre_process", True):
        return False  # a copy on the last pipeline stage
    # Of a parameter that FSDP divided, each data-parallel rank holds other rows.
    return (is_divided or replicas.rank() == 0) and (placement.shards > 1 or tensor_parallel.rank() == 0)


def _get_default_dtype(stage: MegatronModule) -> str:
    config = stage.config
    return "BF16" if config.bf16 else "F16" if config.fp16 else NAMES[config.params_dtype]


def _write(held: Sequence[_Held], repetitions: Sequence[Repetition], folder: Path, layout: FileLayout) -> int:
    """Write this rank's rows, and wait until they are on the disk; return the number of bytes."""
    with TensorWriter(folder, layout) as writer:
        for one in held:
            rows = one.rows
            if type(rows) is not torch.Tensor or one.weight.factor != 1.0:  # of a class: FP8 with scales, for example
                rows = rows.float() / one.weight.factor
            writer.write(one.list_regions(repetitions), rows)
    return writer.written


def _find_source(source: str) -> tuple[Path | None, list[Problem]]:
    """Return the folder of a tokenizer, and what is wrong with it."""
    try:
        folder = Path(resolve_repository(source))
    except DocumentError as error:
        return None, error.problems
    return folder, [] if folder.is_dir() else [Problem(source, "no such folder: pass one with a tokenizer, or None")]
