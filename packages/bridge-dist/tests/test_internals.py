"""Names that torch and megatron-core do not promise to keep: a version that lacks one is told by it."""

from __future__ import annotations

import inspect
import pkgutil

import pytest
from megatron.core.tensor_parallel import random

from bridge.dist.internals import (
    MEGATRON_MESSAGE,
    MEGATRON_NAMES,
    PRIVATE_NAMES,
    PRIVATE_NAMES_OF_PLANS,
    TESTED_THROUGHOUT,
    TORCH,
)
from bridge.dist.plan.virtual_rank.state import STATE

NAMES_OF_STATE = dict.fromkeys(STATE, "plan.virtual_rank.state: is put back after a plan")
NEEDED = PRIVATE_NAMES | MEGATRON_NAMES | NAMES_OF_STATE
if TORCH >= TESTED_THROUGHOUT:
    NEEDED |= PRIVATE_NAMES_OF_PLANS


@pytest.mark.parametrize("name", NEEDED)
def test_it_is_still_there(name: str) -> None:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"there is no {name}, which bridge-dist uses ({NEEDED[name]}): {error}")


def test_the_message_is_still_logged() -> None:
    assert MEGATRON_MESSAGE in inspect.getsource(random)
