"""The committed lock names no index, and its check tells when a version or a hash has moved."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".github/scripts/neutral_lock.py"

WRITTEN = """\
version = 1
requires-python = ">=3.12"

[[package]]
name = "anything"
version = "1.2"
source = { registry = "https://index.example/simple" }
sdist = { url = "https://files.example/ab/cd/anything-1.2.tar.gz", hash = "sha256:aa", size = 7, upload-time = "2026-01-01T00:00:00Z" }
wheels = [
    { url = "https://files.example/ef/anything-1.2-py3-none-any.whl", hash = "sha256:bb", size = 9 },
]
"""  # noqa: E501


def neutral(text: str) -> str:
    return subprocess.run([sys.executable, SCRIPT], input=text, capture_output=True, text=True, check=True).stdout


def check(clone: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, "--check"], cwd=clone, capture_output=True, text=True, check=False)


def git(clone: Path, *args: str) -> None:
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com"]
    subprocess.run(["git", *identity, *args], cwd=clone, check=True, capture_output=True)


def committed(clone: Path, lock: str) -> Path:
    """A repository whose last commit holds ``lock``, and whose working tree holds what uv wrote."""
    git(clone, "init")
    (clone / "uv.lock").write_text(lock)
    git(clone, "add", "uv.lock")
    git(clone, "commit", "-m", "lock")
    (clone / "uv.lock").write_text(WRITTEN)
    return clone


def test_no_address_is_left() -> None:
    assert "://" not in neutral(WRITTEN)


def test_neutral_form_is_stable() -> None:
    assert neutral(neutral(WRITTEN)) == neutral(WRITTEN)


def test_this_repository_holds_a_neutral_lock() -> None:
    lock = subprocess.run(["git", "show", "HEAD:uv.lock"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "://" not in lock
    assert neutral(lock) == lock


def test_check_accepts_what_was_committed(tmp_path: Path) -> None:
    assert check(committed(tmp_path, neutral(WRITTEN))).returncode == 0


@pytest.mark.parametrize(
    ("before", "after"), [("1.2", "1.1"), ("sha256:aa", "sha256:ab"), ("sha256:bb", "sha256:bc"), ("anything", "other")]
)
def test_check_refuses_another_version_hash_or_package(tmp_path: Path, before: str, after: str) -> None:
    result = check(committed(tmp_path, neutral(WRITTEN).replace(before, after)))
    assert result.returncode == 1
    assert re.search(rf"^- .*{re.escape(after)}", result.stdout, re.MULTILINE)


def test_check_refuses_a_committed_address(tmp_path: Path) -> None:
    result = check(committed(tmp_path, WRITTEN))
    assert result.returncode == 1
    assert "names an index" in result.stdout
