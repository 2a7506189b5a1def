"""Save the stages of all ranks as a folder of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import gather_and_compute_chunk_metadata
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from torch.distributed.tensor import DTensor

from bridge.config import ModelConfig
from bridge.config.errors import Problem
from bridge.dist.checkpoint.together import gather
from bridge.dist.engine.placement import EMBEDDING, Placement, named_buffers, named_parameters
from bridge.dist.engine.stages import strip_wrappers, unwrap
from bridge.models.errors import raise_any
from bridge.models.huggingface.convert import to_hf
from bridge.models.huggingface.document_fields import read_fields
from bridge.models.huggingface.matching import find_architecture
from bridge.models.huggingface.transfer.layout import SHARD_BYTES, FileLayout, lay_out
from bridge.models.huggingface.transfer.names import canonicalize_name
from bridge.models.huggingface.transfer.output import (
    carry_files,
    check_space,
    describe_failure,
    finish,
    name_partial,
    prepare,
    write_headers,
)
from bridge.models.huggingface.transfer.regions import Region, cut_regions, find_regions, repeat_regions
from bridge.models.huggingface.transfer.write import NAMES, TensorWriter
from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Repetition, Weight, list_tensors


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
        folder: Where to write; it must not exist.
        pg_collection: The process groups of this rank.
        model: The configuration of the model, from which config.json is written.
        source: A folder whose tokenizer and generation settings are copied.
        shard_bytes: Most bytes of a file.

    Raises:
        DocumentError: transformers has no architecture for the model.
        WeightsError: The folder exists, the disk is too small, or transformers has no place for a weight.
    """
    folder = Path(folder)
    partial = name_partial(folder)
    document = model.as_dict()
    config = to_hf(document).data
    entries = list(find_architecture(config).weights(Sizes(read_fields(document))))
    weights = {entry.name: entry for entry in entries if isinstance(entry, Weight)}
    repetitions = [entry for entry in entries if isinstance(entry, Repetition) and entry.is_written]
    listed = [one for stage in stages for one in _list_held(stage, weights, pg_collection)]
    held = [one for one in listed if isinstance(one, _Held)]
    problems = [one for one in listed if isinstance(one, Problem)]
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        problems += prepare(folder)
    default = _get_default_dtype(stages[0])
    gathered = gather((problems, {one.weight.name: one.dtype for one in held if one.dtype != default}))
    raise_any([problem for found, _ in gathered for problem in found])
    dtypes = {name: dtype for _, found in gathered for name, dtype in found.items()}
    tensors = (
        (tensor, dtypes.get(weight.name, default), part.shape)
        for tensor, part, weight in list_tensors(weights.values(), repetitions)
    )
    layout = lay_out(tensors, shard_bytes=shard_bytes)
    raise_any([problem for found in gather(check_space(partial, sum(layout.sizes.values()))) for problem in found])
    results = gather(_write(held, repetitions, partial, layout))
    raise_any([problem for found, _ in results for problem in found])
    if sum(written for _, written in results) < layout.tensor_bytes:
        raise_any([Problem(str(partial), "is not whole: no rank holds some of the weights that config.json describes")])
    raise_any([one for found in gather(_finish(folder, layout, config, source) if is_first else []) for one in found])


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
    # The parameters of Megatron-FSDP are those of the last forward pass: its state dict has the last update.
    state = {strip_wrappers(name): value for name, value in stage.state_dict().items()}
    named = (*named_parameters(stage, pg_collection), *named_buffers(stage, pg_collection))
    for placement, tensor, _ in named:
        name = canonicalize_name(placement.full_name)
        weight = weights.get(name)
        if weight is None:
            yield Problem(name, "config.json describes a model without this parameter")
            continue
        if not weight.fits(placement.full_shape):
            shape = list(placement.full_shape)
            yield Problem(name, f"expected the shape {list(weight.shape)} of config.json, got {shape}")
            continue
        value = state.get(placement.name)
        rows, first = _take_chunk(value, placement) if isinstance(value, DTensor) else (tensor.detach(), 0)
        if not weight.forms[0]:
            if rows.count_nonzero():
                yield Problem(name, "is not zero, but transformers has no such parameter")
        elif isinstance(value, DTensor) or _is_owner(stage, placement, tensor, pg_collection):
            yield _Held(weight, placement, first, rows, NAMES[tensor.dtype])


def _take_chunk(value: DTensor, placement: Placement) -> tuple[torch.Tensor, int]:
    """Return the rows of a parameter that FSDP left on this rank, and the first one's number. Collective."""
    chunk = gather_and_compute_chunk_metadata(value)
    spans_shards = value.shape != placement.shape and placement.dim == 0  # Megatron-FSDP's spans tensor-parallel ranks
    before = placement.shard * placement.shape[0] if spans_shards else 0
    return value.to_local().detach(), chunk.offsets[0] - before


def _is_owner(
    stage: MegatronModule, placement: Placement, tensor: torch.Tensor, pg_collection: ProcessGroupCollection
) -> bool:
    """Return whether this rank is the one to write a parameter, of all that hold the same rows."""
    is_expert = not getattr(tensor, "allreduce", True)
    tensor_parallel = pg_collection.expt_tp if is_expert else pg_collection.tp
    replicas = pg_collection.expt_dp if is_expert else pg_collection.dp_cp
    if placement.full_name == EMBEDDING and not getattr(unwrap(stage), "pre_process", True):
        return False  # a copy on the last pipeline stage
    return replicas.rank() == 0 and (placement.shards > 1 or tensor_parallel.rank() == 0)


def _get_default_dtype(stage: MegatronModule) -> str:
    config = stage.config
    return "BF16" if config.bf16 else "F16" if config.fp16 else NAMES[config.params_dtype]


def _write(
    held: Sequence[_Held], repetitions: Sequence[Repetition], folder: Path, layout: FileLayout
) -> tuple[list[Problem], int]:
    """Write this rank's rows; return what the file system refused, and the number of bytes."""
    with TensorWriter(folder, layout) as writer:
        try:
            for one in held:
                rows = one.rows
                if one.weight.factor != 1.0:
                    rows = rows.float() / one.weight.factor
                writer.write(one.list_regions(repetitions), rows)
            writer.close()
        except OSError as error:
            return [describe_failure(folder, error)], writer.written
    return [], writer.written


def _finish(folder: Path, layout: FileLayout, config: dict[str, Any], source: str | Path | None) -> list[Problem]:
    """Write all but the tensors, and give the folder its name; return what the file system refused."""
    try:
        write_headers(name_partial(folder), layout, config)
        if source is not None:
            carry_files(Path(source), name_partial(folder))
        finish(folder)
    except OSError as error:
        return [describe_failure(folder, error)]
    return []
