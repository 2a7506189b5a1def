"""The lock contains no index address, and its check reports changed versions and hashes."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / ".github/scripts/lock.py"))
LOCKED = (ROOT / "locked.txt").read_text()


def test_the_lock_contains_no_index_address() -> None:
    assert "://" not in LOCKED
    ignored = subprocess.run(["git", "check-ignore", "--quiet", "uv.lock"], cwd=ROOT, check=False)
    assert ignored.returncode == 0, "uv.lock names the index that it was made with"


def test_every_version_is_pinned_and_every_file_has_a_hash() -> None:
    names = re.findall(r"^[\w.-]+==\S+", LOCKED, re.MULTILINE)
    pinned = re.findall(r'^    "([\w.-]+==\S+?)(?: ;.*)?",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert pinned == names
    assert len(re.findall(r" \\\n    --hash=sha256:[0-9a-f]{64}", LOCKED)) > len(names)
    assert list(SCRIPT["find_differences"](LOCKED)) == []


@pytest.mark.parametrize(
    ("before", "after"), [("torch==2", "torch==1"), ("torch==", "tortch=="), ("--hash=sha256:4", "--hash=sha256:5")]
)
def test_changed_versions_hashes_and_packages_are_reported(before: str, after: str) -> None:
    here = LOCKED.replace(before, after, 1)
    found = list(SCRIPT["find_differences"](here))
    assert any(one.startswith("- ") and before in one for one in found)
    assert any(one.startswith("+ ") and after in one for one in found)
