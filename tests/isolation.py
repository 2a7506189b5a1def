"""What a test must not leave to the next, in a process that builds models itself."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_attention_backend_chosen() -> Iterator[None]:
    """megatron-core 0.19.2 notes a model's attention backend in the environment, and refuses another one after that.

    Commands that a test starts have that environment too.
    """
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
