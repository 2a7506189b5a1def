"""What the tests across packages share."""

import os
from pathlib import Path

import pytest
from environments import build_wheels
from isolation import no_attention_backend_chosen  # noqa: F401

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the processors


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built wheel of every package, by name."""
    return build_wheels(tmp_path_factory.mktemp("wheels"))
