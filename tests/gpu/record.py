"""The record of the suite: a JSON file that is written after each row.

``runs`` lists machines with the versions on them; ``rows`` holds, by name, what became of a row when it was last tried,
and in which of the runs. Of a run of some rows the others stay as they are.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
RECORD = Path(__file__).parent / "results" / "gpu.json"
"""The one that is committed."""

Data = dict[str, Any]


def load(path: Path) -> Data:
    """Read a record; an empty one where there is no file."""
    if not path.exists():
        return {"runs": [], "rows": {}}
    data: Data = json.loads(path.read_text())
    return data


def add_row(data: Data, name: str, row: Data, machine: Data) -> None:
    """Put a row into a record, in place of what it said of it; that a row was not run replaces nothing.

    Args:
        data: Changed in place.
        name: Of the row.
        row: Its ``outcome``, and what was measured.
        machine: Where it ran, and with what.
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
    """Write a record so that the file is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(part, path)


def figure(name: str, value: float | None, at_most: float | None) -> str:
    """Say what a figure is, and what it may be."""
    shown = f"{name} {value:,.0f}" if value is not None and abs(value) >= 1e4 else f"{name} {value:.4g}"
    return shown if at_most is None else f"{shown} (at most {at_most:g})"


def described(row: Data) -> str:
    """Say in one line what became of a row."""
    figures = [figure(name, **figure_) for name, figure_ in row["figures"].items()]
    return "; ".join([*([row["why"]] if "why" in row else []), *figures])


if __name__ == "__main__":
    for name, row in load(Path(sys.argv[1]))["rows"].items():
        print(f"{row['outcome']:8} {name:36} {row['seconds']:5.1f} s  {described(row)}")  # noqa: T201
