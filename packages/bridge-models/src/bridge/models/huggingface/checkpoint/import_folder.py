"""Write the weights of a folder of transformers as a Megatron checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from bridge.config import Document
from bridge.config.errors import Problem
from bridge.dist.checkpoint.common import make_common_state
from bridge.dist.checkpoint.document import write_documents
from bridge.dist.checkpoint.folder import RELEASE, TRACKER
from bridge.dist.checkpoint.partial import finish, name_partial
from bridge.dist.checkpoint.reader import COMMON_STATE
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
from bridge.models.huggingface.checkpoint.writer import CheckpointWriter
from bridge.models.huggingface.folder.folder import Folder, open_folder
from bridge.models.huggingface.folder.stored import Format
from bridge.models.huggingface.transfer.load import check_repetitions, fill
from bridge.models.huggingface.transfer.output import (
    check_space,
    check_target,
    describe_failure,
    prepare,
)
from bridge.models.huggingface.transfer.regions import cut_regions, find_regions
from bridge.models.huggingface.transfer.tensors import TensorReader
from bridge.models.huggingface.transfer.write import DTYPES, NAMES
from bridge.models.huggingface.weights.weight import Part, Weight


def import_folder(folder: str | Path, checkpoint: str | Path, *, force: bool = False) -> list[str]:
    """Write the weights of a folder as a checkpoint of megatron-core's format torch_dist.

    At most 32 MiB of a tensor are held. Each tensor keeps its precision; one that megatron-core stacks with others of
    other precisions, or multiplies by a factor, has one that holds all of them.

    Args:
        folder: A folder with config.json and safetensors files.
        checkpoint: Where to write.
        force: Replace a checkpoint of this name.

    Returns:
        Notes for the user.

    Raises:
        DocumentError: config.json is invalid, or describes a model that Megatron-Core does not have.
        WeightsError: The tensors are not those of the model, the checkpoint exists, or the disk is too small.
    """
    opened = open_folder(folder)
    target = Path(checkpoint)
    raise_any(check_target(target, replaces=TRACKER, force=force, source=opened.path))
    with TensorReader() as reader:
        check_repetitions(opened, reader)
        contents = list_contents(opened.document, CONTENT)
        _check_shapes(contents, opened)
        dtypes = _choose_dtypes(contents, opened)
        raise_any(prepare(target))
        raise_any(check_space(name_partial(target), _count_bytes(contents, dtypes)))
        iteration = name_partial(target) / RELEASE
        try:
            iteration.mkdir()
            _write_tensors(iteration, contents, opened, dtypes, reader)
            _write_documents(iteration, opened, dtypes, contents)
            (name_partial(target) / TRACKER).write_text(RELEASE)
            finish(target)
        except OSError as error:
            raise WeightsError([describe_failure(target, error)]) from error
    return [*opened.notes, *_note_quantized(opened)]


def _count_bytes(contents: Contents, dtypes: Mapping[str, torch.dtype]) -> int:
    pieces = (piece for each in contents.pieces.values() for piece in each)
    return sum(math.prod(piece.shape) * dtypes[piece.key].itemsize for piece in pieces)


def _check_shapes(contents: Contents, folder: Folder) -> None:
    """Check that the model has the parameters of the weight table.

    Raises:
        WeightsError: It does not.
    """
    known = folder.match.weights
    problems = [Problem(name, "Megatron-Core has no such parameter") for name in known if name not in contents.shapes]
    for name, shape in contents.shapes.items():
        if name not in known:
            problems.append(Problem(name, "the folder has no such parameter"))
        elif not known[name][0].fits(shape):
            message = f"Megatron-Core has the shape {list(shape)}, the folder {list(known[name][0].shape)}"
            problems.append(Problem(name, message))
    raise_any(problems)


def _choose_dtypes(contents: Contents, folder: Folder) -> dict[str, torch.dtype]:
    """Return the precision of each tensor of the checkpoint: one that holds all that it is made of."""
    dtypes: dict[str, torch.dtype] = {}
    for name, pieces in contents.pieces.items():
        dtype = _find_dtype(*folder.match.weights[name], folder)
        for piece in pieces:
            dtypes[piece.key] = torch.promote_types(dtypes.get(piece.key, dtype), dtype)
    return dtypes


def _find_dtype(weight: Weight, parts: tuple[Part, ...], folder: Folder) -> torch.dtype:
    if weight.factor != 1.0 or not parts:
        return torch.float32
    found = {DTYPES[folder.stored[part.tensor].dtype] for part in parts}
    widest = found.pop()
    for dtype in found:
        widest = torch.promote_types(widest, dtype)
    return widest


def _write_tensors(
    iteration: Path, contents: Contents, folder: Folder, dtypes: Mapping[str, torch.dtype], reader: TensorReader
) -> None:
    with CheckpointWriter(iteration) as writer:
        buffer = _Buffer()
        for name, pieces in contents.pieces.items():
            weight, parts = folder.match.weights[name]
            placement = Placement(name=name, full_name=name, shape=torch.Size(contents.shapes[name]))
            regions = list(find_regions(parts, placement))
            width = math.prod(contents.shapes[name][1:])
            for piece in pieces:
                dtype = dtypes[piece.key]
                for window in _divide(piece, max(1, WINDOW // (width * dtype.itemsize))):
                    first, last = window.rows.start, window.rows.stop
                    rows = buffer.take((last - first, *contents.shapes[name][1:]), dtype)
                    fill(rows, cut_regions(regions, first, last), weight, folder, reader)
                    writer.write_tensor(window.key, window.full_shape, window.offset, rows.reshape(window.shape))
        writer.write_objects(contents.extra_states, None)
        common = make_common_state(
            contents.model, contents.config, step=0, samples=0, no_save_optim=True, no_save_rng=True
        )
        writer.write_objects([COMMON_STATE], common | {"content_metadata": CONTENT})
        writer.finish()
    save_config(CheckpointingConfig("torch_dist"), str(iteration))


class _Buffer:
    """Memory for one tensor after the other: the allocator would keep what it got for each."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor without defined values, in place of the one before. Its storage has no other values."""
        count = math.prod(shape)
        if count * dtype.itemsize > len(self._bytes):
            self._bytes = bytearray(count * dtype.itemsize)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count).reshape(shape)


def _divide(piece: Piece, rows: int) -> Iterator[Piece]:
    """Yield a piece in windows of so many rows."""
    for start in range(0, len(piece.rows), rows):
        yield piece.cut(piece.rows[start : start + rows])


def _write_documents(iteration: Path, folder: Folder, dtypes: Mapping[str, torch.dtype], contents: Contents) -> None:
    """Write the document, what Megatron Bridge reads instead, the tokenizer, and the precisions that were changed."""
    write_documents(Document(folder.document), iteration, has_optimizer=False, has_random_states=False)
    carry_files(folder.path, iteration / TOKENIZER)
    changed = {}
    for name, (weight, parts) in folder.match.weights.items():
        for part in weight.forms[0]:  # the tensors that exporting writes
            stored = folder.stored.get(part.tensor, folder.stored[parts[0].tensor])
            if any(stored.dtype != NAMES[dtypes[piece.key]] for piece in contents.pieces[name]):
                changed[part.tensor] = stored.dtype
    if changed:
        (iteration / PRECISIONS).write_text(json.dumps(changed, indent=2) + "\n")


def _note_quantized(folder: Folder) -> Iterator[str]:
    quantized = [name for name, stored in folder.stored.items() if stored.format is not Format.PLAIN]
    if quantized:
        stored_as = folder.stored[quantized[0]].format.value
        yield f"{len(quantized):,} tensors stored as {stored_as} are dequantized to BF16, also when they are exported"
