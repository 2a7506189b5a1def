"""Several processes write parts of one tensor."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bridge.models.huggingface.transfer.layout import lay_out
from bridge.models.huggingface.transfer.regions import Region
from bridge.models.huggingface.transfer.write import TensorWriter
from bridge.models.huggingface.weights.weight import Part

EXPERTS, COLUMNS, ROWS = 2, 5, 12
MATRIX, BIAS = "gate_up_proj", "gate_up_proj_bias"


def refuse_locks(*given: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("has_locks", [True, False])
def test_alternating_rows_of_several_writers(has_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPT-OSS stores its experts: gate and up rows alternate, and the matrix is transposed."""
    if not has_locks:
        monkeypatch.setattr(fcntl, "lockf", refuse_locks)
    expected = {
        MATRIX: torch.randn(EXPERTS, COLUMNS, ROWS).bfloat16(),
        BIAS: torch.randn(EXPERTS, ROWS),
    }
    layout = lay_out([(MATRIX, "BF16", (EXPERTS, COLUMNS, ROWS)), (BIAS, "F32", (EXPERTS, ROWS))])
    gate, up = range(0, ROWS, 2), range(1, ROWS, 2)
    shares = [[gate[:4]], [gate[4:], up[:1]], [up[1:2], up[2:]]]  # of three writers
    writers = [TensorWriter(tmp_path, layout) for _ in shares]
    for expert in range(EXPERTS):
        matrix, bias = expected[MATRIX][expert].T, expected[BIAS][expert]
        for writer, share in zip(writers, shares, strict=True):
            for rows in share:
                local, taken = slice(0, len(rows)), slice(rows.start, rows.stop, rows.step)
                part = Part(MATRIX, (EXPERTS, COLUMNS, ROWS), rows, index=expert, transposed=True)
                writer.write([Region(local, part, rows, slice(None))], matrix[taken])
                part = Part(BIAS, (EXPERTS, ROWS), rows, index=expert)
                writer.write([Region(local, part, rows, slice(None))], bias[taken])
    for writer in writers:
        writer.close()
    ((name, header),) = layout.headers.items()
    with (tmp_path / name).open("r+b") as file:
        file.write(header)
    found = load_file(tmp_path / name)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert sum(writer.written for writer in writers) == layout.tensor_bytes
