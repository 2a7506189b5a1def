"""Mark quick tests by inspecting their code, so that new tests need no marker.

`pytest -m quick -n 2` takes about a minute on two cores. A test is quick unless it is in SLOW_TESTS, or its function or
a fixture or helper of it uses one of SLOW_NAMES: modules, what is imported from them, fixtures.
"""

import ast
import atexit
import gc
import os
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a first call may import modules, beside other processes
settings.load_profile("untimed")

SLOW_NAMES = frozenset(
    {
        # They start processes: ranks, or commands that import torch, take seconds each.
        *(
            "subprocess",
            "multiprocessing",
            "ranks",
            "environments",
            "process_starts",
            "gpu.worker",
            "bridge.dist.run.pool",
        ),
        "pytester",
        "hypothesis.given",  # tries hundreds of examples
    }
)
SLOW_TESTS = frozenset(
    {
        "test_a_search_finds_what_planning_everything_finds",  # dozens of plans
        "test_multi_token_prediction_on_its_own_stage_receives_hidden_states",  # plans of several stages
        "test_llama_405b_on_16384_gpus",
        "test_deepseek_v3_on_2048_gpus",
        "test_a_checkpoint_is_loaded_again",  # torch's planner of checkpoints
    }
)
"""Tests that take seconds although they use none of SLOW_NAMES."""
CHILD_SECONDS = 1.0
"""CPU time that the processes started by a quick test may take; importing torch takes more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the quick tests; where several processes run tests, start files with slow ones first.

    The processes then end at about the same time.
    """
    for item in items:
        if isinstance(item, pytest.Function) and is_quick(item):
            item.add_marker("quick")
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if "quick" not in item.keywords}
        items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Exempt imported modules from garbage collection: with torch and Megatron a full collection takes 0.6 s."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # objects still frozen at exit are reported as leaks


def is_quick(test: pytest.Function) -> bool:
    """Return whether a test is quick, judged by its code."""
    name = test.function.__name__
    return not (name in SLOW_TESTS or name in slow_names(test.path) or "gpu" in test.keywords)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Fail a quick test whose child processes take long: `slow_names` does not detect how they were started."""
    before = _child_seconds()
    yield
    taken = _child_seconds() - before
    if "quick" in item.keywords and taken > CHILD_SECONDS:
        pytest.fail(
            f"not quick: its child processes took {taken:.1f} s of CPU time; "
            "add the function or module that starts them to SLOW_NAMES in conftest.py"
        )


def _child_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


@cache
def slow_names(file: Path) -> frozenset[str]:
    """Return the names in a file, and in the conftest.py beside it, that use one of SLOW_NAMES, directly or not."""
    fixtures = file.with_name("conftest.py")
    slow = slow_names(fixtures) if file != fixtures and fixtures.exists() else SLOW_NAMES
    uses = _uses_by_name(file)
    while found := {name for name, used in uses.items() if used & slow} - slow:
        slow |= found
    return slow


def _uses_by_name(file: Path) -> dict[str, set[str]]:
    """Return the names and imports that each top-level name of a file uses."""
    uses: dict[str, set[str]] = {}
    for statement in ast.parse(file.read_text()).body:
        for name, used in _uses(statement):
            uses.setdefault(name, set()).update(used)
    return uses


def _uses(statement: ast.stmt) -> Iterator[tuple[str, set[str]]]:
    match statement:
        case ast.Import() | ast.ImportFrom():
            yield from ((alias.asname or alias.name, _imported(statement, alias)) for alias in statement.names)
        case ast.FunctionDef() | ast.ClassDef():
            yield statement.name, _used(statement) - _stored(statement) | _fixtures(statement)
        case _:
            yield from ((name, _used(statement)) for name in _stored(statement))


def _fixtures(statement: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """Return the fixtures that a test or a fixture takes; parameters of other functions are not fixtures."""
    if isinstance(statement, ast.FunctionDef) and (statement.name.startswith("test_") or statement.decorator_list):
        return {argument.arg for argument in statement.args.args}
    return set()


def _stored(statement: ast.stmt) -> set[str]:
    nodes = list(ast.walk(statement))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {node.arg for node in nodes if isinstance(node, ast.arg)}


def _used(statement: ast.stmt) -> set[str]:
    used: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            used.update(*(_imported(node, alias) for alias in node.names))
    return used


def _imported(statement: ast.Import | ast.ImportFrom, alias: ast.alias) -> set[str]:
    if isinstance(statement, ast.Import):
        return {alias.name}
    return {str(statement.module), f"{statement.module}.{alias.name}"}
