#!/usr/bin/env python3
"""Write the table of docs/security.md: what Bridge and the reference do with every hostile document.

make_security.py            with the packages that are installed
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
BEGIN, END = "<!-- written by .github/scripts/make_security.py -->", "<!-- end -->"

sys.path.insert(0, str(READING.parent))
from reading import MEMORY, SECONDS, corpus  # type: ignore[import-not-found]  # noqa: E402

Told = dict[str, Any]


def outcomes(reader: str) -> dict[str, Told]:
    """What a reader does with every document, by name."""
    with tempfile.TemporaryDirectory() as folder:
        said = subprocess.run([sys.executable, READING, reader, folder], stdout=subprocess.PIPE, check=True).stdout
    told: dict[str, Told] = json.loads(said)
    return told


def said_of_ours(told: Told) -> str:
    """A cell of the table about Bridge."""
    if told["verdict"] != "refused":
        return "accepts it as text" if told["verdict"] == "accepted" else f"**{told['verdict']}**"
    paths = sorted({path for path, _ in told["problems"]})
    return "refused at " + (", ".join(f"`{path}`" for path in paths) if len(paths) < 5 else f"{len(paths)} places")


def said_of_reference(told: Told) -> str:
    """A cell of the table about the reference."""
    verdict = "accepts it" if told["verdict"] == "accepted" else "fails" + (f": {_kind(told)}" if told["error"] else "")
    if told["ran"]:
        return f"**runs it**, then {verdict}"
    if told["modules"]:
        return f"**imports it**, then {verdict}"
    if any(event.startswith("open ") for event in told["events"]):
        return f"**opens it**, then {verdict}"
    if told["verdict"] == "died":
        return f"**no end** in {SECONDS} s and {MEMORY // 2**20} MiB"
    return verdict


def _kind(told: Told) -> str:
    return str(told["error"]).partition(":")[0]


def table() -> str:
    """The lines between the marks."""
    ours, reference = outcomes("validate"), outcomes("reference")
    lines = []
    for group, entries in groupby(corpus(), key=lambda entry: str(entry["group"])):
        lines += [f"\n### {group}\n", "| document | what it tries | Bridge | reference |", "| --- | --- | --- | --- |"]
        for entry in entries:
            name = entry["name"]
            cells = [f"`{name}`", entry["tries"], said_of_ours(ours[name]), said_of_reference(reference[name])]
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([count(ours, reference), *lines])


def count(ours: dict[str, Told], reference: dict[str, Told]) -> str:
    """The sums of both columns."""
    names = [entry["name"] for entry in corpus() if "at" in entry]
    said = [said_of_reference(reference[name]) for name in names]
    runs = sum(one.startswith(("**runs", "**imports")) for one in said)
    opens = sum(one.startswith(("**opens", "**no end")) for one in said)
    accepts = said.count("accepts it")
    fails = len(names) - runs - opens - accepts
    refused = sum(ours[name]["verdict"] == "refused" for name in names)
    return (
        f"Of {len(names)} hostile documents the reference runs or imports what {runs} name, opens a file or comes to no"
        f" end for {opens}, accepts {accepts} without a word, and fails on {fails} with the"
        f" error of whatever line they reach. Bridge refuses {refused}."
    )


def main(*args: str) -> int:
    """Write the table, or check it."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    made = f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"
    if args != ("--check",):
        PAGE.write_text(made)
    elif made != text:
        print(f"{PAGE.name} does not tell what happens any more: run make_security.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
