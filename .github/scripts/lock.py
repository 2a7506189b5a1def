#!/usr/bin/env python3
"""Write locked.txt, a copy of uv.lock without index addresses, and the version pins in pyproject.toml.

    lock.py [ARG]...    run `uv lock ARG...` without the pins (ARG: --upgrade, for example), then write both
    lock.py --check     check that the uv.lock that uv writes here has the same versions and files

uv.lock itself is not committed, because it names the index that it was made with. Without these addresses, uv rewrites
the file or refuses it. So each clone has its own uv.lock, made from the index that is configured there, and
`constraint-dependencies` in pyproject.toml allow uv only one version of each package. Constraints have no hashes, so
`--check` compares those.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCKED = ROOT / "locked.txt"
PROJECT = ROOT / "pyproject.toml"
HEADER = "# Written by .github/scripts/lock.py: every version and file that uv installs here.\n"
EXPORT = (
    *("export", "--quiet", "--all-packages", "--all-groups", "--all-extras"),
    *("--no-emit-workspace", "--no-header", "--no-annotate"),
)
PINS = re.compile(r"(?<=^constraint-dependencies = \[  # written by \.github/scripts/lock\.py\n)[^\]]*(?=^\])", re.M)


def run_uv(*args: str) -> str:
    """Run the uv that runs this script, or the one on PATH; return its output."""
    return subprocess.run(
        [os.environ.get("UV", "uv"), *args], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def export_lock() -> str:
    """Return uv.lock as requirements with hashes. Packages with a single version lose their markers."""
    exported = run_uv(*EXPORT)
    names = Counter(re.findall(r"^[\w.-]+(?===)", exported, re.M))

    def remove_marker(line: re.Match[str]) -> str:
        return line[0] if names[line["name"]] > 1 else f"{line['name']}=={line['version']} \\"

    return HEADER + re.sub(r"^(?P<name>[\w.-]+)==(?P<version>\S+)( ; .*)? \\$", remove_marker, exported, flags=re.M)


def format_pins(requirements: str) -> str:
    """Return the requirements, without hashes, as lines of a TOML list."""
    lines = (line.removesuffix(" \\") for line in requirements.splitlines() if not line.startswith((" ", "#")))
    return "".join(f'    "{line}",\n' for line in lines)


def replace_pins(project: str, lines: str) -> str:
    """Return the text of pyproject.toml with `lines` as its pins."""
    assert PINS.search(project)
    return PINS.sub(lambda _: lines, project)


def relock(*args: str) -> None:
    """Run `uv lock` without the pins, then pin the chosen versions. uv prefers the versions of an existing uv.lock."""
    before = PROJECT.read_text()
    PROJECT.write_text(replace_pins(before, ""))
    try:
        run_uv("lock", *args)
        requirements = export_lock()
    except BaseException:  # Ctrl-C too: never leave pyproject.toml without pins
        PROJECT.write_text(before)
        raise
    LOCKED.write_text(requirements)
    PROJECT.write_text(replace_pins(before, format_pins(requirements)))


def list_entries(requirements: str) -> Iterator[str]:
    """Yield each requirement, and each of its hashes with the requirement."""
    requirement = ""
    for line in requirements.removeprefix(HEADER).splitlines():
        text = line.strip().removesuffix(" \\")
        if text.startswith("--hash="):
            yield f"{requirement} {text}"
        else:
            yield (requirement := text)


def find_differences(requirements: str) -> Iterator[str]:
    """Yield the differences between the lock that uv makes here and the committed one."""
    here, committed = set(list_entries(requirements)), set(list_entries(LOCKED.read_text()))
    yield from (f"- {entry}" for entry in sorted(committed - here))
    yield from (f"+ {entry}" for entry in sorted(here - committed))
    if replace_pins(project := PROJECT.read_text(), format_pins(LOCKED.read_text())) != project:
        yield f"the versions in {PROJECT.name} are not those of {LOCKED.name}"


def main(*args: str) -> int:
    """Lock, or check the lock."""
    if args != ("--check",):
        relock(*args)
        return 0
    if found := list(find_differences(export_lock())):
        print(
            *found, f"{LOCKED.name} (-) differs from what uv locks here (+): run lock.py, or find the cause", sep="\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
