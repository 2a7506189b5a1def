"""Fixtures of the GPU suite, and a hook that records the outcome of each row.

Settings are environment variables, because `pytest -m gpu` starts above this folder and would not read its options:

- BRIDGE_GPU_ONLY: rows to run, separated by commas. A name without its case (`family`) selects all of its cases.
- BRIDGE_GPU_RECORD: the record to write; default: the committed one.
- BRIDGE_GPU_DEADLINE: when to stop, in seconds since 1970. The remaining rows are not run.
- BRIDGE_GPU_REHEARSE: run rows on the CPU where possible, with a small Llama, to test the suite itself.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from gpu import record
from gpu.names import get_row_name
from gpu.session import Row, Session

_HERE = Path(__file__).parent
_session = pytest.StashKey[Session]()
_row = pytest.StashKey[Row]()


@pytest.fixture(scope="session")
def gpu_session(pytestconfig: pytest.Config) -> Iterator[Session]:
    session = Session()
    if session.can_run_rows:  # without a GPU no record is written
        pytestconfig.stash[_session] = session
    yield session
    session.worker.close()


@pytest.fixture
def row(request: pytest.FixtureRequest, gpu_session: Session) -> Row:
    """Return the row of this test; skip it without a GPU, except in a rehearsal."""
    if not gpu_session.can_run_rows:
        pytest.skip("no CUDA device")
    made = Row(gpu_session)
    request.node.stash[_row] = made
    return made


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the rows that BRIDGE_GPU_ONLY does not name."""
    if wanted := os.environ.get("BRIDGE_GPU_ONLY"):
        names = set(wanted.split(","))
        mine = [item for item in items if item.path.is_relative_to(_HERE)]
        left_out = [item for item in mine if not {get_row_name(item), get_row_name(item).partition(":")[0]} & names]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record the outcome of a row as soon as it is known."""
    report = yield
    session = item.config.stash.get(_session, None)
    if session is not None and report.when == "call":
        session.add(get_row_name(item), _make_row_record(item, report, call))
    return report


def _make_row_record(item: pytest.Item, report: pytest.TestReport, call: pytest.CallInfo[None]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "outcome": {"passed": record.PASSED, "failed": record.FAILED}.get(report.outcome, record.NOT_RUN),
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(report.duration, 1),
        "figures": item.stash[_row].figures,
    }
    if call.excinfo is not None:
        error = call.excinfo.value
        data["why"] = str(error).partition("\n")[0] or type(error).__name__
    return data
