"""Names of torch that torch does not promise to keep: a version that lacks one is told by it."""

from __future__ import annotations

import pkgutil

import pytest

from bridge.dist.internals import PRIVATE_NAMES, PRIVATE_NAMES_OF_PLANS, TESTED_THROUGHOUT, TORCH

NEEDED = PRIVATE_NAMES | (PRIVATE_NAMES_OF_PLANS if TORCH >= TESTED_THROUGHOUT else {})


@pytest.mark.parametrize("name", NEEDED)
def test_torch_still_has_it(name: str) -> None:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError) as error:
        pytest.fail(
            f"torch {'.'.join(map(str, TORCH))} has no {name}, which bridge-dist uses ({NEEDED[name]}): {error}"
        )
