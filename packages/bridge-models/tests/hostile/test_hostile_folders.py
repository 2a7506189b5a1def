"""Hostile folders of weights are refused without side effects, at the place that is hostile.

folders.py makes and opens them.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDERS = Path(__file__).parent / "folders.py"
CORPUS: dict[str, Any] = runpy.run_path(str(FOLDERS))["FOLDERS"]
MEGABYTE = 2**20

Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What opening each folder does, by name."""
    program = [sys.executable, str(FOLDERS), str(tmp_path_factory.mktemp("folders"))]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: Outcomes = json.loads(done.stdout)
    return result


def test_harmless_folders_are_accepted(outcomes: Outcomes) -> None:
    harmless = [result for name, result in outcomes.items() if name.startswith("harmless")]
    assert [result["verdict"] for result in harmless] == ["accepted", "accepted"], harmless


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_folders_are_refused_without_side_effects(name: str, outcomes: Outcomes) -> None:
    entry, result = CORPUS[name], outcomes[name]
    assert result["verdict"] == ("refused" if entry.at else "accepted"), result
    assert [place for place, _ in result["problems"]] == list(entry.at)
    assert (result["events"], result["modules"], result["ran"], result["said"]) == ([], [], False, "")
    assert [text for problem in result["problems"] for text in problem if not text.isprintable()] == []
    assert [message for _, message in result["problems"] if len(message) > 500] == []
    assert result["peak"] < 64 * MEGABYTE
    assert result["seconds"] < 5


def test_torch_is_not_imported(outcomes: Outcomes) -> None:
    assert not {"torch", "transformers", "megatron"} & {
        module for one in outcomes.values() for module in one["modules"]
    }
