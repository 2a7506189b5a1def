"""What the tests across packages share."""

from pathlib import Path

import pytest
from environments import build_wheels


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built wheel of every package, by name."""
    return build_wheels(tmp_path_factory.mktemp("wheels"))
