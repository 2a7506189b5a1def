"""A folder that is written belongs to one run, and is taken over when that run is dead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bridge.dist.checkpoint.partial import claim, finish, replace_file


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    head = "import os, sys, signal\nfrom pathlib import Path\nfrom bridge.dist.checkpoint.partial import claim\n"
    command = [sys.executable, "-c", head + code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_folder_of_another_run_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (claim(folder) / "data").write_text("mine")
    other = run_python("claim(Path(sys.argv[1]))", folder)
    assert "another run is writing to it" in other.stderr
    assert (tmp_path / "folder.partial" / "data").read_text() == "mine"
    finish(folder)
    assert [file.name for file in folder.iterdir()] == ["data"]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_the_folder_of_a_dead_run_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    code = "(claim(Path(sys.argv[1])) / 'data').mkdir()\nos.kill(os.getpid(), signal.SIGKILL)"
    assert run_python(code, folder).returncode == -9
    assert (tmp_path / "folder.partial" / "data").is_dir()
    assert not (claim(folder) / "data").exists()
    claim(folder)  # again, by the same process
    finish(folder)
    claim(folder)
    finish(folder)  # in place of the other
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_link_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data").write_text("theirs")
    (tmp_path / "folder.partial").symlink_to(tmp_path / "other")
    with pytest.raises(FileExistsError, match="is no folder"):
        claim(tmp_path / "folder")
    assert (tmp_path / "other" / "data").read_text() == "theirs"


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", "1")
    replace_file(tmp_path / "file", "2")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "2")]
