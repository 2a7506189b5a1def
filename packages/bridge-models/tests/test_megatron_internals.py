"""Private names of megatron-core that bridge-models uses exist in the installed version."""

from __future__ import annotations

import pkgutil

import pytest

from bridge.models.backend.megatron_internals import MEGATRON_NAMES


@pytest.mark.parametrize("name", MEGATRON_NAMES)
def test_private_names_exist(name: str) -> None:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"there is no {name}, which bridge-models uses ({MEGATRON_NAMES[name]}): {error}")
