"""`bridge doctor`: which layers models are built from, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.models.commands.diagnosis import find_layers


def test_layers_in_pytorch_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [(finding.value, finding.meaning) for finding in find_layers()] == [
        ("PyTorch", "Transformer Engine is not installed, and would need a GPU"),
        ("PyTorch", "mamba-ssm and causal-conv1d are not installed, and would need a GPU"),
    ]
    (tmp_path / "transformer_engine.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    layers, _ = find_layers()
    assert layers.meaning == "Transformer Engine is installed, but no GPU is visible"
