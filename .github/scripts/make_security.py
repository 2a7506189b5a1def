#!/usr/bin/env python3
"""Write the tables of docs/security.md: what Bridge and megatron.training do with every hostile document, and what
Bridge does with every hostile folder of weights.

make_security.py            writes the tables with the installed packages
make_security.py --check    fails if that would change the page
"""

import json
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/security.md"
READING = ROOT / "packages/bridge-config/tests/hostile/reading.py"
FOLDERS = ROOT / "packages/bridge-models/tests/hostile/folders.py"
BEGIN, END = "<!-- written by .github/scripts/make_security.py -->", "<!-- end -->"

sys.path[:0] = [str(READING.parent), str(FOLDERS.parent)]
from folders import FOLDERS as CORPUS_OF_FOLDERS  # type: ignore[import-not-found]  # noqa: E402
from reading import MEMORY, SECONDS, load_corpus  # type: ignore[import-not-found]  # noqa: E402

Outcome = dict[str, Any]


def read_all(program: Path, *reader: str) -> dict[str, Outcome]:
    """Return what a reader does with every document, or Bridge with every folder, by name."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(program), *reader, folder]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    outcomes: dict[str, Outcome] = json.loads(output)
    return outcomes


def make_bridge_cell(outcome: Outcome, *, accepted: str = "accepts it as text") -> str:
    """Return the cell of a document in the column of Bridge."""
    if outcome["verdict"] != "refused":
        return accepted if outcome["verdict"] == "accepted" else f"**{outcome['verdict']}**"
    paths = sorted({path for path, _ in outcome["problems"]})
    return "refused at " + (", ".join(f"`{path}`" for path in paths) if len(paths) < 5 else f"{len(paths)} places")


def make_megatron_cell(outcome: Outcome) -> str:
    """Return the cell of a document in the column of megatron.training."""
    verdict = (
        "accepts it"
        if outcome["verdict"] == "accepted"
        else "fails" + (f": {_format_error(outcome)}" if outcome["error"] else "")
    )
    if outcome["ran"]:
        return f"**runs it**, then {verdict}"
    if outcome["modules"]:
        return f"**imports it**, then {verdict}"
    if any(event.startswith("open ") for event in outcome["events"]):
        return f"**opens it**, then {verdict}"
    if outcome["verdict"] == "died":
        return f"**does not terminate** in {SECONDS} s and {MEMORY // 2**20} MiB"
    return verdict


def _format_error(outcome: Outcome) -> str:
    return str(outcome["error"]).partition(":")[0]


def make_table() -> str:
    """Return the lines between the marks."""
    ours, theirs = read_all(READING, "validate"), read_all(READING, "megatron_training")
    lines = []
    for group, entries in groupby(load_corpus(), key=lambda entry: str(entry["group"])):
        lines += [
            f"\n### {group}\n",
            "| document | what it tries | Bridge | megatron.training |",
            "| --- | --- | --- | --- |",
        ]
        for entry in entries:
            name = entry["name"]
            cells = [f"`{name}`", entry["tries"], make_bridge_cell(ours[name]), make_megatron_cell(theirs[name])]
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([summarize(ours, theirs), *lines])


def make_table_of_folders() -> str:
    """Return the lines on folders of weights."""
    outcomes = read_all(FOLDERS)
    refused = sum(outcomes[name]["verdict"] == "refused" for name in CORPUS_OF_FOLDERS)
    lines = ["## Hostile folders of weights\n", f"Bridge refuses {refused} of these {len(CORPUS_OF_FOLDERS)} folders."]
    for group, entries in groupby(CORPUS_OF_FOLDERS.items(), key=lambda entry: str(entry[1].group)):
        lines += [f"\n### {group}\n", "| folder | what it tries | Bridge |", "| --- | --- | --- |"]
        for name, entry in entries:
            cells = [f"`{name}`", entry.tries, make_bridge_cell(outcomes[name], accepted="opens it and runs nothing")]
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def summarize(ours: dict[str, Outcome], theirs: dict[str, Outcome]) -> str:
    """Return a sentence with the totals of both columns."""
    names = [entry["name"] for entry in load_corpus() if "at" in entry]
    cells = [make_megatron_cell(theirs[name]) for name in names]
    runs = sum(cell.startswith(("**runs", "**imports")) for cell in cells)
    opens = sum(cell.startswith(("**opens", "**does not terminate")) for cell in cells)
    accepts = cells.count("accepts it")
    fails = len(names) - runs - opens - accepts
    refused = sum(ours[name]["verdict"] == "refused" for name in names)
    return (
        f"Of {len(names)} hostile documents, megatron.training runs or imports what {runs} name, opens a file or does"
        f" not terminate for {opens}, accepts {accepts} silently, and fails on {fails} with the error of the line that"
        f" they reach. Bridge refuses {refused}."
    )


def main(*args: str) -> int:
    """Write the tables, or check them."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    made = f"{before}{BEGIN}\n\n{make_table()}\n\n{make_table_of_folders()}\n\n{END}{after}"
    if args != ("--check",):
        PAGE.write_text(made)
    elif made != text:
        print(f"{PAGE.name} is out of date: run make_security.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
