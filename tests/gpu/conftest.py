"""Fixtures of the GPU suite, and the record of its rows.

Settings are environment variables, since `pytest -m gpu` starts above this folder:

- BRIDGE_GPU_ONLY: rows to run, by comma; a name without its case (`family` of `family:tiny-fp32`) stands for all.
- BRIDGE_GPU_RECORD: the record to write; by default the one that is committed.
- BRIDGE_GPU_DEADLINE: when to stop, in seconds since 1970; rows that are left then are not run.
- BRIDGE_GPU_REHEARSE: run on the CPU what can be, with a small Llama, to try out the suite itself.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from gpu import record
from gpu.names import row_name
from gpu.session import Row, Session

_HERE = Path(__file__).parent
_session = pytest.StashKey[Session]()
_row = pytest.StashKey[Row]()


@pytest.fixture(scope="session")
def gpu_session(pytestconfig: pytest.Config) -> Iterator[Session]:
    session = Session()
    if session.is_at_work:  # another machine leaves no record
        pytestconfig.stash[_session] = session
    yield session
    session.worker.close()


@pytest.fixture
def row(request: pytest.FixtureRequest, gpu_session: Session) -> Row:
    """This row. It is not run where there is no GPU, except in a rehearsal."""
    if not gpu_session.is_at_work:
        pytest.skip("no CUDA device")
    made = Row(gpu_session)
    request.node.stash[_row] = made
    return made


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the rows that are not asked for."""
    if wanted := os.environ.get("BRIDGE_GPU_ONLY"):
        names = set(wanted.split(","))
        mine = [item for item in items if item.path.is_relative_to(_HERE)]
        left_out = [item for item in mine if not {row_name(item), row_name(item).partition(":")[0]} & names]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record what became of a row as soon as it is known."""
    report = yield
    session = item.config.stash.get(_session, None)
    if session is not None and report.when == "call":
        session.add(row_name(item), _described(item, report, call))
    return report


def _described(item: pytest.Item, report: pytest.TestReport, call: pytest.CallInfo[None]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "outcome": {"passed": record.PASSED, "failed": record.FAILED}.get(report.outcome, record.NOT_RUN),
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(report.duration, 1),
        "figures": item.stash[_row].figures,
    }
    if call.excinfo is not None:
        error = call.excinfo.value
        described["why"] = str(error).partition("\n")[0] or type(error).__name__
    return described
