#!/usr/bin/env python3
"""Keep locked.txt, which is uv.lock without the addresses of a package index, and the versions that it pins for uv.

    lock.py [ARG]...    `uv lock ARG...` without the pins, such as --upgrade, then write both anew
    lock.py --check     does uv.lock, as uv has just written it here, hold the same versions and files?

uv.lock itself is not committed. It names the index that it was made with, and uv either rewrites it or refuses it when
the names are taken out: it asks for a path in place of each address, or for a server that is not there. So uv makes
uv.lock in each clone, from whichever index that is set up for, and `constraint-dependencies` in pyproject.toml leave it
one version of each package. They have no hashes: that the files are the locked ones is for `--check` to say.
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


def uv(*args: str) -> str:
    """Run the uv that runs this script, or the one on PATH; return what it printed."""
    return subprocess.run(
        [os.environ.get("UV", "uv"), *args], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def locked() -> str:
    """Return what uv.lock holds, as requirements with hashes; those of which there is one need no marker."""
    exported = uv(*EXPORT)
    names = Counter(re.findall(r"^[\w.-]+(?===)", exported, re.M))

    def unmarked(line: re.Match[str]) -> str:
        return line[0] if names[line["name"]] > 1 else f"{line['name']}=={line['version']} \\"

    return HEADER + re.sub(r"^(?P<name>[\w.-]+)==(?P<version>\S+)( ; .*)? \\$", unmarked, exported, flags=re.M)


def pins(requirements: str) -> str:
    """Return the requirements, without hashes, as lines of a TOML list."""
    lines = (line.removesuffix(" \\") for line in requirements.splitlines() if not line.startswith((" ", "#")))
    return "".join(f'    "{line}",\n' for line in lines)


def with_pins(project: str, lines: str) -> str:
    """Return the text of pyproject.toml with other pins."""
    assert PINS.search(project)
    return PINS.sub(lambda _: lines, project)


def relock(*args: str) -> None:
    """Let uv choose versions without the pins, prefer those of uv.lock if there is one, and pin what it chose."""
    before = PROJECT.read_text()
    PROJECT.write_text(with_pins(before, ""))
    try:
        uv("lock", *args)
        requirements = locked()
    except BaseException:
        PROJECT.write_text(before)
        raise
    LOCKED.write_text(requirements)
    PROJECT.write_text(with_pins(before, pins(requirements)))


def entries(requirements: str) -> Iterator[str]:
    """Yield each requirement, and each of its files with it."""
    requirement = ""
    for line in requirements.removeprefix(HEADER).splitlines():
        text = line.strip().removesuffix(" \\")
        if text.startswith("--hash="):
            yield f"{requirement} {text}"
        else:
            yield (requirement := text)


def problems(requirements: str) -> Iterator[str]:
    """Yield how what uv locks here differs from what is committed."""
    here, committed = set(entries(requirements)), set(entries(LOCKED.read_text()))
    yield from (f"- {entry}" for entry in sorted(committed - here))
    yield from (f"+ {entry}" for entry in sorted(here - committed))
    if with_pins(project := PROJECT.read_text(), pins(LOCKED.read_text())) != project:
        yield f"the versions in {PROJECT.name} are not those of {LOCKED.name}"


def main(*args: str) -> int:
    """Lock, or check the lock."""
    if args != ("--check",):
        relock(*args)
        return 0
    if found := list(problems(locked())):
        print(*found, f"{LOCKED.name} (-) is not what uv locks here (+): run lock.py, or find out why", sep="\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
