"""bridge.models.common.base re-exports the public names of bridge.config and bridge.builders."""

import subprocess
import sys

import pytest

import bridge.builders
import bridge.config
from bridge.models.common import base


@pytest.mark.parametrize("name", ["Serializable", "ModelConfig"])
def test_base_re_exports_bridge_config(name: str) -> None:
    assert getattr(base, name) is getattr(bridge.config, name)


@pytest.mark.parametrize("name", ["ModelT", "BuildConfigT", "ModelBuilder", "compose_hooks"])
def test_base_re_exports_bridge_builders(name: str) -> None:
    assert getattr(base, name) is getattr(bridge.builders, name)


def test_base_exports_nothing_else() -> None:
    assert sorted(base.__all__) == sorted(
        ["Serializable", "ModelConfig", "ModelT", "BuildConfigT", "ModelBuilder", "compose_hooks"]
    )


@pytest.mark.parametrize(
    "module", ["bridge.models", "bridge.models.commands.presets", "bridge.models.commands.huggingface"]
)
def test_importing_needs_no_torch(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('torch', 'megatron', 'megatron.core') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
