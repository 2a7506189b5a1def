"""Fixtures for the tests across packages."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_runs import Run, train
from environments import build_wheels
from isolation import no_attention_backend_chosen  # noqa: F401
from process_starts import Folder
from ranks import run_ranks

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the processors


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the built wheel of every package, by name."""
    return build_wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def saved_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of one rank after one step."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(train, 1, Run({}, 1, save=str(folder)))
    return folder


@pytest.fixture
def folder() -> Iterator[Folder]:
    with tempfile.TemporaryDirectory(prefix="f") as path:  # short: sockets are made below it
        folder = Folder(Path(path))
        yield folder
        for process in folder.processes():
            os.kill(process, 9)
