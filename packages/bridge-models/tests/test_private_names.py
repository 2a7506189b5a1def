"""Private names of torch and megatron-core that bridge-models uses exist in the installed versions."""

from __future__ import annotations

import pkgutil

import pytest

from bridge.models.backend.internals import MEGATRON_NAMES, PRIVATE_NAMES

NEEDED = PRIVATE_NAMES | MEGATRON_NAMES


@pytest.mark.parametrize("name", NEEDED)
def test_private_names_exist(name: str) -> None:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"there is no {name}, which bridge-models uses ({NEEDED[name]}): {error}")
