"""The commands of docs/finetune.md run as printed, with a small model in the place of the published one."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from environments import run_command
from huggingface_cases import MODELS
from huggingface_models import build_transformers_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "finetune.md").read_text()
COMMANDS = re.findall(r"^\$ (.*)", PAGE.replace("\\\n", ""), re.MULTILINE)
(PROGRAM,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES = {
    "vocab_size": 258,
    "hidden_size": 72,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def download(repository: str, cache: Path) -> Path:
    """Put a small model and a tokenizer of bytes where `hf download` would put a repository."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    torch.manual_seed(1)
    build_transformers_model(MODELS["llama"] | SIZES).save_pretrained(snapshot)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


@torch.no_grad()
def compute_loss(folder: Path) -> float:
    """Return the loss of transformers on the text."""
    tokens = AutoTokenizer.from_pretrained(folder)(Path("LICENSE").read_text(), return_tensors="pt").input_ids
    samples = tokens[0, : 8 * 128].reshape(8, 128)
    loss: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(samples, labels=samples).loss
    return loss.item()


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    shutil.copyfile(ROOT / "LICENSE", "LICENSE")
    first, *others = COMMANDS
    assert first.startswith("hf download ")
    snapshot = download(first.split()[-1], tmp_path / "cache")
    for command in others:
        name, *arguments = shlex.split(command)
        assert name == "bridge"
        if arguments[0] == "plan":  # other layers need a process that has not imported megatron-core
            arguments += ["--layers", "installed"]
        code, _, err = run_command(*arguments)
        assert code == 0, (command, err)
    exec(PROGRAM, {})
    assert capsys.readouterr().out.startswith("Licensed under the Apache")
    assert compute_loss(Path("tuned")) < compute_loss(snapshot) - 0.05
    assert {file.name for file in Path("tuned").iterdir()} == {file.name for file in snapshot.iterdir()}
    expected, same = load_file(snapshot / "model.safetensors"), load_file("same/model.safetensors")
    assert all(torch.equal(same[name], tensor) for name, tensor in expected.items())
