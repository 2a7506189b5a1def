#!/usr/bin/env python3
"""Write docs/gpu.md: every row of the GPU suite, with its last outcome.

make_gpu_page.py            writes the page from tests/gpu and its record
make_gpu_page.py --check    fails if that would change the page
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/gpu.md"

sys.path.insert(0, str(ROOT / "tests"))
from gpu import record  # noqa: E402
from gpu.names import get_row_name  # noqa: E402

HEAD = """\
<!-- Written by .github/scripts/make_gpu_page.py -->

# On GPUs

A separate suite, `tests/gpu`, checks on a GPU what the other tests check on a CPU. pytest runs it only on request:

```console
$ uv run pytest -m gpu
```

A row trains or measures a model and compares the results with those computed beforehand on the CPU. Weights are
initialised by parameter name, so losses and gradient norms must be equal. The suite also runs on a machine without
network that has a GPU, CUDA, Python 3.12 and torch 2.11 or later:

```console
$ tests/gpu/wheels.sh  # on a machine with a network: collects missing wheels in .wheels
$ tests/gpu/run.sh     # on the GPU machine, in a copy of the working tree with .wheels: at most five minutes
$ tests/gpu/run.sh --only family:tiny-fp32,memory
```

`run.sh` writes `gpu.json` after each row, to the folder in `OUT` or to `tests/gpu/results`. This page is generated
from the committed file in the latter. A run of some rows does not change the others. `run.sh --te` builds Transformer
Engine and runs the rows that need it. `run.sh --rehearse` runs the rows that can run on the CPU, to test the suite
itself.

"""
NEVER = """\
## Never run

This suite has not run on a GPU yet. No row below is known to pass or to fail.
"""


class ListedRow(NamedTuple):
    """A row of the suite, with the docstring of its test."""

    name: str
    description: str


class _RowCollector:
    """A pytest plugin that stores the collected rows."""

    rows: list[ListedRow]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.rows = [
            ListedRow(get_row_name(item), cleandoc(item.function.__doc__ or ""))
            for item in session.items
            if isinstance(item, pytest.Function)
        ]


def list_rows() -> list[ListedRow]:
    """Return all rows, in their order.

    Raises:
        RuntimeError: pytest cannot collect them.
    """
    collector = _RowCollector()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = pytest.main(["--collect-only", "-q", "-m", "gpu", str(ROOT / "tests/gpu")], plugins=[collector])
    if code:
        raise RuntimeError(output.getvalue())
    return collector.rows


def make_page(rows: list[ListedRow], data: record.Data) -> str:
    """Return the page of a record."""
    parts = [HEAD + (make_runs_table(data) if data["runs"] else NEVER)]
    for kind, group in itertools.groupby(rows, lambda row: row.name.partition(":")[0]):
        of_kind = list(group)
        lines = [
            f"## {kind}",
            "",
            of_kind[0].description,
            "",
            "| row | outcome | measured |",
            "| --- | --- | --- |",
            *(f"| {row.name} | {' | '.join(list_cells(data, row.name))} |" for row in of_kind),
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def list_cells(data: record.Data, name: str) -> Iterator[str]:
    """Yield the outcome of a row, and its measurements or why it failed or was not run."""
    row = data["rows"].get(name)
    if row is None:
        yield record.NOT_RUN
        yield ""
        return
    run = f" [{row['run'] + 1}]" if len(data["runs"]) > 1 and row["outcome"] != record.NOT_RUN else ""
    yield f"{row['outcome']}{run}"
    yield record.describe_row(row).replace("|", "\\|")


def make_runs_table(data: record.Data) -> str:
    """Return when and where rows were run, and with what: a column for each machine."""
    runs = data["runs"]
    dates = [sorted({row["date"] for row in data["rows"].values() if row["run"] == run}) for run in range(len(runs))]
    lines = {
        "date": [" to ".join(dict.fromkeys((days[0], days[-1]))) for days in dates],
        "device": [f"{run['devices']} x {run['device']}, {run['memory'] / 2**30:.0f} GiB" for run in runs],
        "driver, CUDA, NCCL": [f"{run['driver']}, {run['cuda']}, {run['nccl']}" for run in runs],
        "Python, torch": [f"{run['python']}, {run['torch']}" for run in runs],
        "packages": [", ".join(f"{name} {version}" for name, version in run["packages"].items()) for run in runs],
        "commit": [run["commit"] or "unknown" for run in runs],
    }
    head = [
        "## Run",
        "",
        f"| | {' | '.join(f'[{run + 1}]' for run in range(len(runs)))} |",
        "|" + " --- |" * (1 + len(runs)),
    ]
    return "\n".join([*head, *(f"| {name} | {' | '.join(values)} |" for name, values in lines.items())]) + "\n"


def main(*args: str) -> int:
    """Write the page, or check it."""
    text = make_page(list_rows(), record.load(record.RECORD))
    if args != ("--check",):
        PAGE.write_text(text)
    elif not PAGE.exists() or text != PAGE.read_text():
        print(f"{PAGE.name} is out of date: run make_gpu_page.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
