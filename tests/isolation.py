"""Fixtures that reset process state between tests that build models in the test process."""

import os
from collections.abc import Iterator

import pytest

from bridge.dist.process.imports import ATTENTION_BACKEND_VARIABLES


@pytest.fixture(autouse=True)
def no_attention_backend_chosen() -> Iterator[None]:
    """Reset the attention backend: megatron-core 0.19.2 stores it in the environment and then refuses another one.

    Commands that a test starts inherit that environment.
    """
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name in ATTENTION_BACKEND_VARIABLES:
        os.environ.pop(name, None)
