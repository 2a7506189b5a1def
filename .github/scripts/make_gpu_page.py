#!/usr/bin/env python3
"""Write docs/gpu.md: every row of the GPU suite, with what became of it when it was last run.

make_gpu_page.py            from tests/gpu and its record
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
from gpu.names import row_name  # noqa: E402

HEAD = """\
<!-- Written by .github/scripts/make_gpu_page.py -->

# On GPUs

What runs on a CPU in every test is run on a GPU by a suite of its own, `tests/gpu`, which is left out of a usual run of
pytest:

```console
$ uv run pytest -m gpu
```

A row trains a model, or measures one, and compares with what was computed beforehand on the CPU: weights are drawn by
parameter name, so that losses and gradient norms must be the same. The suite also runs on a machine without network
that has a GPU, CUDA, Python 3.12 and torch 2.11 or later:

```console
$ tests/gpu/wheels.sh  # where there is a network: collects in .wheels what the machine lacks
$ tests/gpu/run.sh     # there, in a copy of the working tree with .wheels: at most five minutes
$ tests/gpu/run.sh --only family:tiny-fp32,memory
```

`run.sh` writes `gpu.json` after each row, to the folder that `OUT` names or to `tests/gpu/results`. From the latter,
which is committed, this page is made. A run of some rows leaves the others as they are. `run.sh --te` builds
Transformer Engine and runs the rows that need it. `run.sh --rehearse` runs on the CPU what can be, to try out the suite
itself.

"""
NEVER = """\
## Never run

No machine with a GPU has run this suite yet. No row below is known to pass or to fail.
"""


class Listed(NamedTuple):
    """A row of the suite, and what its test says of itself."""

    name: str
    description: str


class _Collected:
    """A plugin that keeps what pytest collects."""

    rows: list[Listed]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.rows = [
            Listed(row_name(item), cleandoc(item.function.__doc__ or ""))
            for item in session.items
            if isinstance(item, pytest.Function)
        ]


def listed() -> list[Listed]:
    """Return all rows, in their order.

    Raises:
        RuntimeError: pytest cannot collect them.
    """
    collected = _Collected()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main(["--collect-only", "-q", "-m", "gpu", str(ROOT / "tests/gpu")], plugins=[collected])
    if code:
        raise RuntimeError(said.getvalue())
    return collected.rows


def page(rows: list[Listed], data: record.Data) -> str:
    """Return the page of a record."""
    parts = [HEAD + (runs_table(data) if data["runs"] else NEVER)]
    for kind, group in itertools.groupby(rows, lambda row: row.name.partition(":")[0]):
        of_kind = list(group)
        lines = [
            f"## {kind}",
            "",
            of_kind[0].description,
            "",
            "| row | outcome | measured |",
            "| --- | --- | --- |",
            *(f"| {row.name} | {' | '.join(cells(data, row.name))} |" for row in of_kind),
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def cells(data: record.Data, name: str) -> Iterator[str]:
    """Yield what became of a row, and what it measured or why it failed or was not run."""
    row = data["rows"].get(name)
    if row is None:
        yield record.NOT_RUN
        yield ""
        return
    run = f" [{row['run'] + 1}]" if len(data["runs"]) > 1 and row["outcome"] != record.NOT_RUN else ""
    yield f"{row['outcome']}{run}"
    yield record.described(row).replace("|", "\\|")


def runs_table(data: record.Data) -> str:
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
    text = page(listed(), record.load(record.RECORD))
    if args != ("--check",):
        PAGE.write_text(text)
    elif not PAGE.exists() or text != PAGE.read_text():
        print(f"{PAGE.name} does not tell the rows and their record: run make_gpu_page.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
