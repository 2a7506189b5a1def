"""Write the weights of a Megatron checkpoint as a folder of transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from bridge.config import Document
from bridge.config.errors import Problem
from bridge.dist.checkpoint.document import read_folder
from bridge.dist.checkpoint.folder import find_iteration, is_checkpoint
from bridge.dist.checkpoint.partial import finish, name_partial
from bridge.dist.checkpoint.reader import Checkpoint
from bridge.dist.checkpoint.state import OPTIMIZER_PREFIXES
from bridge.dist.checkpoint.tokenizer import TOKENIZER, carry_files
from bridge.dist.engine.placement import Placement
from bridge.models.errors import WeightsError, raise_any
from bridge.models.huggingface.checkpoint.contents import (
    CONTENT,
    PRECISIONS,
    WINDOW,
    Contents,
    Piece,
    list_contents,
)
from bridge.models.huggingface.checkpoint.reader import CheckpointReader
from bridge.models.huggingface.convert import to_hf
from bridge.models.huggingface.document_fields import read_fields
from bridge.models.huggingface.matching import find_architecture
from bridge.models.huggingface.transfer.layout import ITEM_BYTES, SHARD_BYTES, FileLayout, lay_out
from bridge.models.huggingface.transfer.output import (
    check_space,
    check_target,
    describe_failure,
    prepare,
    write_headers,
)
from bridge.models.huggingface.transfer.regions import cut_regions, find_regions, repeat_regions
from bridge.models.huggingface.transfer.write import NAMES, TensorWriter
from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Repetition, Weight, list_written_tensors


def export_folder(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    document: Document | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write the weights of a checkpoint of the format torch_dist, saved under any layout, as a folder.

    At most 32 MiB of a tensor are held, but all of a tensor that transformers stores transposed. Nothing that is in the
    checkpoint is run. Tensors that ``import_folder`` read get their precision back.

    Args:
        checkpoint: The folder of all iterations, of which the latest is read, or the folder of one iteration.
        folder: Where to write.
        document: The model; that of the checkpoint by default.
        force: Replace a folder of this name that has a config.json.
        shard_bytes: Most bytes of a file.

    Returns:
        Notes for the user.

    Raises:
        CheckpointError: The checkpoint is damaged.
        DocumentError: transformers has no architecture for the model.
        WeightsError: The tensors are not those of the model, the folder exists, or the disk is too small.
    """
    target = Path(folder)
    iteration = _find_iteration(Path(checkpoint))
    raise_any(check_target(target, replaces="config.json", force=force, source=iteration))
    source = _read_source(iteration, document)
    layout = lay_out(_list_tensors(source), shard_bytes=shard_bytes)
    raise_any(prepare(target))
    partial = name_partial(target)
    raise_any(check_space(partial, sum(layout.sizes.values())))
    try:
        with CheckpointReader(source.iteration, source.metadata) as reader:
            _write_tensors(partial, layout, source, reader)
        write_headers(partial, layout, source.config)
        carry_files(source.iteration / TOKENIZER, partial)
        finish(target)
    except OSError as error:
        raise WeightsError([describe_failure(target, error)]) from error
    return source.notes


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A checkpoint that has all that the folder needs."""

    iteration: Path
    metadata: Metadata
    config: dict[str, Any]
    """config.json."""

    notes: list[str]
    contents: Contents
    weights: list[Weight]
    repetitions: list[Repetition]


def _find_iteration(checkpoint: Path) -> Path:
    """Return the folder of the iteration to read.

    Raises:
        CheckpointError: There is none.
        WeightsError: It is a folder of transformers.
    """
    if (checkpoint / "config.json").is_file() and not is_checkpoint(checkpoint):
        raise WeightsError([Problem(str(checkpoint), "is a Hugging Face folder already: expected a checkpoint")])
    return find_iteration(checkpoint)


def _read_source(iteration: Path, document: Document | None) -> _Source:
    """Read what a checkpoint has, and check that it is all of a model.

    Raises:
        CheckpointError: The checkpoint is damaged.
        DocumentError: transformers has no architecture for the model.
        WeightsError: The tensors are not those of the model.
    """
    found = Checkpoint(iteration)
    model = document or read_folder(str(iteration))
    converted = to_hf(model.data)
    contents = list_contents(model.data, found.content or CONTENT)
    entries = list(find_architecture(converted.data).weights(Sizes(read_fields(model.data))))
    weights = [entry for entry in entries if isinstance(entry, Weight)]
    raise_any([*_find_missing(weights, contents, found.metadata), *_find_unknown(contents, found.metadata)])
    return _Source(
        iteration=iteration,
        metadata=found.metadata,
        config=converted.data,
        notes=converted.notes,
        contents=contents,
        weights=weights,
        repetitions=[entry for entry in entries if isinstance(entry, Repetition) and entry.is_written],
    )


def _find_missing(weights: Sequence[Weight], contents: Contents, metadata: Metadata) -> Iterator[Problem]:
    """Yield what the checkpoint lacks of the weights."""
    for weight in weights:
        shape = contents.shapes.get(weight.name)
        if shape is None or not weight.fits(shape):
            yield Problem(weight.name, f"Megatron-Core has no such parameter of the shape {list(weight.shape)}")
            continue
        for piece in contents.pieces[weight.name]:
            stored = metadata.state_dict_metadata.get(piece.key)
            if not isinstance(stored, TensorStorageMetadata):
                yield Problem(piece.key, f"missing in the checkpoint: {weight.name} is made of it")
            elif not _fits(weight, tuple(stored.size), piece.full_shape):
                message = f"expected the shape {list(piece.full_shape)}, got {list(stored.size)}"
                yield Problem(piece.key, message)
            elif stored.properties.dtype not in NAMES:
                yield Problem(piece.key, f"is stored as {stored.properties.dtype}: expected bf16, fp16 or fp32")


def _fits(weight: Weight, stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether a tensor has the shape, apart from rows that pad the vocabulary."""
    return stored == expected or (weight.per_token and stored[1:] == expected[1:] and stored[0] >= weight.shape[0])


def _find_unknown(contents: Contents, metadata: Metadata) -> Iterator[Problem]:
    known = {piece.key for pieces in contents.pieces.values() for piece in pieces}
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata) and key not in known and not key.startswith(OPTIMIZER_PREFIXES):
            yield Problem(key, "no parameter of the model is made of it: pass the document of this model")


def _read_precisions(iteration: Path) -> dict[str, str]:
    """Return the precisions that tensors had in the folder that the checkpoint was imported from."""
    file = iteration / PRECISIONS
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict) or not all(one in ITEM_BYTES for one in found.values()):
            raise ValueError(f"expected a mapping from tensors to {', '.join(ITEM_BYTES)}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise WeightsError([Problem(str(file), f"cannot be read: {error}")]) from error
    return found


def _list_tensors(source: _Source) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield the tensors to write: name, dtype, shape."""
    precisions = _read_precisions(source.iteration)
    for tensor, part, weight in list_written_tensors(source.weights, source.repetitions):
        stored = source.metadata.state_dict_metadata[source.contents.pieces[weight.name][0].key]
        assert isinstance(stored, TensorStorageMetadata)
        yield tensor, precisions.get(part.tensor, NAMES[stored.properties.dtype]), part.shape


def _write_tensors(folder: Path, layout: FileLayout, source: _Source, reader: CheckpointReader) -> None:
    with TensorWriter(folder, layout) as writer:
        for weight in source.weights:
            placement = Placement(name=weight.name, full_name=weight.name, shape=torch.Size(weight.shape))
            regions = list(find_regions(weight.forms[0], placement))
            # A transposed tensor would be written number by number.
            is_transposed = any(part.transposed for part in weight.forms[0])
            step = weight.shape[0] if is_transposed else max(1, WINDOW // (4 * math.prod(weight.shape[1:])))
            for first in range(0, weight.shape[0], step):
                last = min(first + step, weight.shape[0])
                rows = _read_rows(source.contents.pieces[weight.name], range(first, last), reader)
                if not weight.forms[0]:
                    if rows.count_nonzero():
                        raise_any([Problem(weight.name, "is not zero, but transformers has no such parameter")])
                    continue
                if weight.factor != 1.0:
                    rows = rows.float() / weight.factor
                writer.write(repeat_regions(cut_regions(regions, first, last), source.repetitions), rows)


def _read_rows(pieces: Sequence[Piece], rows: range, reader: CheckpointReader) -> torch.Tensor:
    """Return rows of a parameter."""
    found = []
    for piece in pieces:
        first, last = max(piece.rows.start, rows.start), min(piece.rows.stop, rows.stop)
        if first < last:
            taken = piece.cut(range(first, last))
            found.append(reader.read(taken.key, taken.offset, taken.shape).flatten(0, piece.axis))
    return found[0] if len(found) == 1 else torch.cat(found)
