"""Progress on a terminal, and in a log file."""

from __future__ import annotations

import re

import pytest

from bridge.dist.run import progress
from bridge.dist.run.progress import show_progress


def run_progress() -> None:
    assert list(show_progress(range(3), 3, describe=lambda done, item: f"item {item} [{done}]")) == [0, 1, 2]


def test_a_bar_has_only_the_colours_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    run_progress()
    shown = capsys.readouterr().err
    assert "item 2 [3]" in shown
    codes = {code for group in re.findall(r"\x1b\[([\d;]+)m", shown) for code in group.split(";")}
    assert codes
    assert not codes & {"38", "48"}, "colours by number, whatever the background"
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown))
    assert max(map(len, lines)) <= 80


def test_a_log_file_gets_lines_without_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    run_progress()
    assert capsys.readouterr().err == "1 of 3: item 0 [1]\n2 of 3: item 1 [2]\n3 of 3: item 2 [3]\n"
