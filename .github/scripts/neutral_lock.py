#!/usr/bin/env python3
"""Take the package index out of uv.lock, so that the committed file names none and works with any.

    neutral_lock.py < uv.lock     the neutral form, on stdout: git's clean filter (see .gitattributes)
    neutral_lock.py --check       does what uv has just written lock the same files as the committed uv.lock?

uv resolves again when it meets a neutral file, because `requires-python` in it has an upper bound that the workspace
does not have, and it then prefers the versions in the file. So a fresh clone gets the locked versions, from whichever
index it is set up for. That it really got them, with the locked hashes, is what `--check` proves after a `uv sync`.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

LOCK = "uv.lock"
UPPER_BOUND = ", <4"


class Pin(NamedTuple):
    """A locked package, or one file of it."""

    name: str
    version: str
    filename: str = ""
    digest: str = ""


def neutral(text: str) -> str:
    """The lock without addresses; a neutral lock comes back unchanged."""
    text = re.sub(r'\burl = "[^"]*/([^"/]+)"', r'filename = "\1"', text)
    text = re.sub(r'\bregistry = "[^"]*"', 'registry = "index"', text)
    text = re.sub(r', upload-time = "[^"]*"', "", text)
    return re.sub(r'^requires-python = "([^"<]*)"$', rf'requires-python = "\1{UPPER_BOUND}"', text, count=1, flags=re.M)


def pins(text: str) -> set[Pin]:
    """Every locked package and file; what differs from index to index (order, sizes, addresses) is left out."""
    found: set[Pin] = set()
    for package in tomllib.loads(text)["package"]:
        name, version = package["name"], package.get("version", "")
        found.add(Pin(name, version))
        files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else ())]
        found.update(Pin(name, version, file["filename"], file["hash"]) for file in files)
    return found


def check() -> int:
    """Compare the working tree's lock, as uv wrote it, with the committed one."""
    committed = subprocess.run(["git", "show", f"HEAD:{LOCK}"], check=True, capture_output=True, text=True).stdout
    if committed != neutral(committed):
        print(f"The committed {LOCK} names an index: set the clean filter (.gitattributes) and commit it again.")
        return 1
    here, locked = pins(neutral(Path(LOCK).read_text())), pins(committed)
    for sign, difference in (("-", locked - here), ("+", here - locked)):
        for pin in sorted(difference):
            print(sign, *pin)
    if here != locked:
        print(f"The committed {LOCK} (-) is not what uv resolves here (+): commit the new one, or find out why.")
        return 1
    print(f"{LOCK}: {len(locked)} packages and files as committed")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(check())
    sys.stdout.write(neutral(sys.stdin.read()))
