"""The tests that `pytest -m quick` selects; a quick test that starts a slow process fails."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest_plugins = ["pytester"]

SUITE = """
import os
import subprocess
import sys

import pytest
from hypothesis import given, strategies

COMPUTE = "import time\\nwhile time.process_time() < 1.5: pass"

def run():
    subprocess.run(["true"])

@pytest.fixture
def result():
    return run()

def test_plain(): pass
def test_helper(): run()
def test_fixture(result): pass
@given(strategies.integers())
def test_property(number): pass
def test_hidden(): os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", COMPUTE)
"""


def test_quick_tests_start_no_process(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers = quick: a quick test")
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_inprocess("-m", "quick", "-p", "no:xdist", "-rA")
    result.assert_outcomes(passed=1, failed=1, deselected=3)
    result.stdout.fnmatch_lines(
        ["E *Failed: not quick: *SLOW_NAMES*", "PASSED *::test_plain", "FAILED *::test_hidden*"]
    )


def test_slow_tests_exist(request: pytest.FixtureRequest) -> None:
    conftest = next(plugin for plugin in request.config.pluginmanager.get_plugins() if hasattr(plugin, "SLOW_TESTS"))
    files = [*ROOT.glob("packages/*/tests/**/test_*.py"), *ROOT.glob("tests/**/test_*.py")]
    text = "\n".join(file.read_text() for file in files)
    assert [name for name in conftest.SLOW_TESTS if f"def {name}(" not in text] == []
