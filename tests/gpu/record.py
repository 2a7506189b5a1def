"""Record of the suite: a JSON file that is written after each row.

``runs`` lists machines with their software versions. ``rows`` holds the last outcome of each row, by name, and the
index of its run. A run of some rows keeps the outcomes of the others.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
RECORD = Path(__file__).parent / "results" / "gpu.json"
"""The committed record."""

Data = dict[str, Any]


def load(path: Path) -> Data:
    """Read a record; return an empty one if the file does not exist."""
    if not path.exists():
        return {"runs": [], "rows": {}}
    data: Data = json.loads(path.read_text())
    return data


def add_row(data: Data, name: str, row: Data, machine: Data) -> None:
    """Add a row to a record, or replace it. A row that was not run does not replace an outcome.

    Args:
        data: Changed in place.
        name: The name of the row.
        row: Its ``outcome`` and measurements.
        machine: The machine and its software versions.
    """
    if row["outcome"] == NOT_RUN and data["rows"].get(name, row)["outcome"] != NOT_RUN:
        return
    if machine not in data["runs"]:
        data["runs"].append(machine)
    data["rows"][name] = row | {"run": data["runs"].index(machine)}
    used = sorted({row["run"] for row in data["rows"].values()})
    data["runs"] = [data["runs"][index] for index in used]
    for each in data["rows"].values():
        each["run"] = used.index(each["run"])


def write(data: Data, path: Path) -> None:
    """Write a record atomically: a reader never sees a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(part, path)


def format_figure(name: str, value: float | None, at_most: float | None) -> str:
    """Format a measurement and its limit."""
    text = f"{name} {value:,.0f}" if value is not None and abs(value) >= 1e4 else f"{name} {value:.4g}"
    return text if at_most is None else f"{text} (at most {at_most:g})"


def describe_row(row: Data) -> str:
    """Return one line with the error of a row and its measurements."""
    figures = [format_figure(name, **figure) for name, figure in row["figures"].items()]
    return "; ".join([*([row["why"]] if "why" in row else []), *figures])


if __name__ == "__main__":
    for name, row in load(Path(sys.argv[1]))["rows"].items():
        print(f"{row['outcome']:8} {name:36} {row['seconds']:5.1f} s  {describe_row(row)}")  # noqa: T201
