"""`bridge build` of a Hugging Face folder starts from its weights: the first loss is that of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from environments import run_command
from huggingface_cases import MODELS
from huggingface_hub import snapshot_download
from huggingface_models import build_transformers_model

VOCABULARY = 257  # odd, so that tensor-parallel ranks need padding
SAMPLES, LENGTH = 8, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_transformers_model(MODELS["llama"] | {"vocab_size": VOCABULARY}).save_pretrained(path)
    (path / "text").write_bytes(torch.randint(256, (SAMPLES * LENGTH + 1,)).to(torch.uint8).numpy().tobytes())
    return path


@pytest.fixture(scope="module")
def loss(folder: Path) -> float:
    """The loss of transformers on the samples of the first step."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.frombuffer(bytearray((folder / "text").read_bytes()), dtype=torch.uint8).long()
    samples = torch.stack([tokens[start : start + LENGTH + 1] for start in range(0, SAMPLES * LENGTH, LENGTH)])
    with torch.no_grad():
        logits = model(samples[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()).item()


def train(folder: Path, *arguments: str) -> dict[str, Any]:
    options = ("--text", str(folder / "text"), "--seq-length", str(LENGTH), "--steps", "1", "--json")
    code, out, err = run_command("build", *arguments, *options)
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    assert err.count("has no tokenizer.json: each byte") == (report["weights"] is not None)
    return report


def test_weights_of_a_folder_are_loaded_under_a_layout(folder: Path, loss: float, tmp_path: Path) -> None:
    """The checkpoint of the run keeps the files that belong to the tokenizer and to generation."""
    run = str(tmp_path / "run")
    report = train(folder, str(folder), "should_pad_vocab=true", "--nproc", "2", "--tp", "2", "--save", run)
    assert report["weights"] == str(folder)
    assert report["losses"][0] == pytest.approx(loss, rel=1e-5)
    code, _, err = run_command("export-hf", run, "-o", str(tmp_path / "exported"))
    assert code == 0, err
    assert (tmp_path / "exported" / "generation_config.json").read_bytes() == (
        folder / "generation_config.json"
    ).read_bytes()


def put_into_cache(folder: Path, cache: Path) -> Path:
    """Make the folder the repository org/llama of a Hugging Face cache, where files are links; return its folder."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--org--llama"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def test_load_takes_the_weights_of_a_cached_repository_into_the_model_of_a_document(
    folder: Path, loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, document = tmp_path / "cache", tmp_path / "model.yaml"
    snapshot = put_into_cache(folder, cache)
    assert snapshot_download("org/llama", cache_dir=cache, local_files_only=True) == str(snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert run_command("from-hf", "org/llama", "-o", str(document))[0] == 0
    for command in ("show", "check-hf"):
        assert run_command(command, "org/llama")[0] == 0
    report = train(folder, str(document), "--load", "org/llama", "--nproc", "2", "--pp", "2")
    assert (report["weights"], report["losses"][0]) == (str(snapshot), pytest.approx(loss, rel=1e-5))


def test_random_init_draws_the_weights(folder: Path, loss: float) -> None:
    report = train(folder, str(folder), "--random-init")
    assert report["weights"] is None
    assert abs(report["losses"][0] - loss) > 0.01


def test_what_cannot_be_loaded_is_refused_before_ranks_start(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    code, _, err = run_command("build", str(tmp_path))
    assert code == 1
    assert "has neither model.safetensors nor model.safetensors.index.json" in err
    assert "To draw the weights instead of loading them, give --random-init" in err
    code, _, err = run_command("build", "tiny", "--load", str(tmp_path / "elsewhere"))
    assert code == 1
    assert "elsewhere: no such folder: give one with weights, or a Megatron checkpoint" in err
    assert run_command("build", str(folder), "--load", str(folder), "--random-init")[0] == 2


def test_a_vocabulary_that_does_not_divide_says_what_to_set(folder: Path) -> None:
    code, _, err = run_command("build", str(folder), "--nproc", "2", "--tp", "2")
    assert code == 1
    assert "should_pad_vocab" in err
