"""`bridge verify` of a Hugging Face folder: the logits of the loaded model against those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from environments import run_command
from huggingface_cases import MODELS
from huggingface_models import build_transformers_model

from bridge.dist.errors import ComparisonError, LayoutError
from bridge.dist.run.splits import list_cases, select_cases
from bridge.models.huggingface import loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_transformers_model(MODELS["llama"] | {"vocab_size": 257, "num_hidden_layers": 4}).save_pretrained(path)
    return path


_computed: dict[str, torch.Tensor] = {}


@pytest.fixture
def keep_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the logits of transformers, which take a process, for tests with the same folder and tokens."""
    compute = loader.FolderLoader.compute_logits

    def compute_once(self: loader.FolderLoader, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
        if (key := f"{folder} {tokens.tolist()}") not in _computed:
            _computed[key] = compute(self, folder, tokens)
        return _computed[key]

    monkeypatch.setattr(loader.FolderLoader, "compute_logits", compute_once)


def verify(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    code, out, err = run_command(
        "verify", *arguments, "should_pad_vocab=true", "--steps", "1", "--seq-length", "32", "--json"
    )
    return code, json.loads(out), err


@pytest.mark.usefixtures("keep_logits")
def test_logits_are_those_of_transformers_under_each_layout(folder: Path) -> None:
    code, rows, err = verify(
        str(folder), "--nproc", "2", "--only", "tp2 sp with ddp,pp2 vp2 with ddp,dp2 with torch-fsdp2"
    )
    assert code == 0, err
    assert {row["layout"] for row in rows} == {"tp2 sp dp1", "pp2 vp2 dp1", "dp2"}
    assert {row["verdict"] for row in rows} == {"equal"}
    assert all(0 < row["logits_difference"] < 1e-5 for row in rows)


@pytest.mark.usefixtures("keep_logits")
def test_half_precision_has_its_own_tolerance(folder: Path) -> None:
    code, rows, err = verify(str(folder), "transformer.bf16=true", "--nproc", "2", "--only", "tp2 with ddp")
    assert code == 0, err
    assert all(1e-4 < row["logits_difference"] < 2e-2 for row in rows)


def test_a_model_that_computes_something_else_is_different(folder: Path) -> None:
    code, rows, _ = verify(str(folder), "transformer.layernorm_epsilon=0.1", "--nproc", "1", "--only", "dp1 with ddp")
    assert code == 1
    assert {row["verdict"] for row in rows} == {"different"}
    assert all(row["logits_difference"] > 1e-3 and row["loss_difference"] == 0 for row in rows)


def test_without_transformers_the_logits_are_not_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "find_spec", lambda name: None)  # tests have transformers installed
    code, rows, err = verify(str(folder), "--nproc", "1", "--only", "dp1 with torch-fsdp2")
    assert (code, [row["logits_difference"] for row in rows]) == (0, [None])
    assert f"{folder}: logits are not compared: transformers is not installed: pip install transformers" in err


def test_layouts_are_selected_by_name() -> None:
    def select(*names: str) -> list[str]:
        return [f"{split.format_name(4)} with {wrapping}" for split, wrapping in select_cases(4, names)]

    assert select("tp2 dp2 with megatron-fsdp") == ["tp2 dp2 with megatron-fsdp"]
    assert select("tp2 with ddp") == ["tp2 dp2 with ddp", "tp2 dp2 with ddp, dist. optimizer"]
    assert len(select("dp4", "pp2 vp2")) == 8
    assert select("tp2 pp2 dp1") == ["tp2 pp2 dp1 with ddp, dist. optimizer"]
    assert select_cases(4, [split.format_name(4) for split, _ in list_cases(4)]) == list_cases(4)
    with pytest.raises(LayoutError, match="no layout 'tp3' on 4 ranks; the layouts are dp4, tp2 dp2, tp2 sp dp2"):
        select("tp3")


def test_transformers_is_not_waited_for_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_LONGEST_S", 0.01)
    with pytest.raises(ComparisonError, match="transformers has not computed them in 0 minutes"):
        loader.LOADER.compute_logits(folder, torch.zeros(1, 4, dtype=torch.long))
