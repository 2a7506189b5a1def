"""Folders of weights as they really are: names, files and precisions differ, the parameters do not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_cases import MODELS
from huggingface_models import build_transformers_model
from huggingface_weights import Weights, convert_weights
from weight_folders import read_weights, write

from bridge.models.errors import WeightsError
from bridge.models.huggingface.folder.folder import open_folder
from bridge.models.huggingface.transfer.tensors import TensorReader

TIED = MODELS["llama 3.2, tied"]
UNTIED = MODELS["llama"]


def build(config: dict[str, Any]) -> tuple[Weights, Weights]:
    """Build a model of transformers; return its tensors in memory, and its weights by Megatron-Core's names."""
    model = build_transformers_model(config)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    expected = convert_weights(model.config, state)
    if config.get("tie_word_embeddings", model.config.model_type == "gpt2"):
        state.pop("lm_head.weight")
    return state, expected


def check(folder: Path, expected: Weights, *, notes: tuple[str, ...] = ()) -> None:
    """Check that a folder opens and gives these parameters, with these notes beyond those on config.json."""
    opened = open_folder(folder)
    found = read_weights(opened)
    different = [name for name in found if name not in expected or not torch.equal(found[name], expected[name])]
    assert (different, found.keys() ^ expected.keys()) == ([], set())
    assert [note for note in opened.notes if "tensors" in note or "rows" in note] == list(notes)


def rename(tensors: Weights, change: Callable[[str], str]) -> Weights:
    return {change(name): tensor for name, tensor in tensors.items()}


def test_one_file(tmp_path: Path) -> None:
    state, expected = build(UNTIED)
    check(write(tmp_path, UNTIED, state), expected)


def test_shards_with_an_index(tmp_path: Path) -> None:
    model = build_transformers_model(UNTIED)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    check(tmp_path, convert_weights(model.config, model.state_dict()))


def test_a_single_file_is_preferred_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    state, expected = build(UNTIED)
    index = {"weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(write(tmp_path, UNTIED, state), expected)


def test_links_to_files_elsewhere_as_in_the_local_cache(tmp_path: Path) -> None:
    state, expected = build(UNTIED)
    (blobs := tmp_path / "blobs").mkdir()
    (snapshot := tmp_path / "snapshot").mkdir()
    write(blobs, UNTIED, state)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../blobs/{name}")
    check(snapshot, expected)


@pytest.mark.parametrize(
    ("case", "base"),
    [
        ("gpt2", "transformer."),
        ("llama 3.2, tied", "model."),
        ("mamba2", "backbone."),
        ("nemotron_h", "model."),
        ("qwen3_moe", "model."),
    ],
)
def test_base_model_without_its_prefix(case: str, base: str, tmp_path: Path) -> None:
    """An output layer of its own is beside the base model, as some converters leave it."""
    state, expected = build(MODELS[case])
    assert sum(name.startswith(base) for name in state) >= len(state) - 1
    check(write(tmp_path, MODELS[case], rename(state, lambda name: name.removeprefix(base))), expected)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "prefixes",
    [
        {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        {"model.": "model.language_model.", "lm_head.": "lm_head."},
        {"model.": "language_model.", "lm_head.": "lm_head."},
    ],
    ids=lambda prefixes: prefixes["model."],
)
def test_language_model_of_a_multimodal_one(prefixes: dict[str, str], config: dict[str, Any], tmp_path: Path) -> None:
    state, expected = build(config)
    for prefix, instead in prefixes.items():
        state = rename(state, lambda name: name.replace(prefix, instead, 1) if name.startswith(prefix) else name)  # noqa: B023 - called at once
    state |= {f"vision_tower.{number}.weight": torch.zeros(2) for number in range(3)}
    note = "3 tensors outside the language model are left out, vision_tower.0.weight the first of them"
    check(write(tmp_path, config, state), expected, notes=(note,))


@pytest.mark.parametrize("case", ["llama 3.2, tied", "gpt2", "t5, 1.0"])
def test_tied_output_layer_may_be_stored(case: str, tmp_path: Path) -> None:
    state, expected = build(MODELS[case])
    embedding = next(state[name] for name in state if "embed" in name or "wte" in name or name == "shared.weight")
    check(write(tmp_path, MODELS[case], state | {"lm_head.weight": embedding.clone()}), expected)


def test_tied_output_layer_of_another_shape_is_an_error(tmp_path: Path) -> None:
    state, _ = build(TIED)
    write(tmp_path, TIED, state | {"lm_head.weight": torch.zeros(95, 32)})
    with pytest.raises(WeightsError) as error:
        open_folder(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/model.safetensors: lm_head.weight: expected the shape [96, 32] of model.embed_tokens.weight, "
        "which it repeats, got [95, 32]"
    )


def test_more_rows_than_tokens_are_left_out(tmp_path: Path) -> None:
    state, expected = build(UNTIED)
    state |= {
        name: torch.cat([state[name], torch.ones(32, 32)]) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    folder = write(tmp_path, UNTIED, state)
    opened = open_folder(folder)
    found = read_weights(opened)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [note for note in opened.notes if "rows" in note] == [
        f"{name} has 128 rows: those beyond vocab_size, 96, are left out"
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    ]


BUFFERS: dict[str, Weights] = {
    "llama": {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=dtype)
        for layer, dtype in enumerate((torch.float32, torch.float64))
    },
    "gpt2": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "transformer.h.1.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    },
    "t5, 1.0": {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(8, 4)},
}


@pytest.mark.parametrize("case", BUFFERS)
def test_buffers_of_old_versions_are_ignored(case: str, tmp_path: Path) -> None:
    state, expected = build(MODELS[case])
    check(write(tmp_path, MODELS[case], state | BUFFERS[case]), expected)


def test_buffers_of_a_base_model(tmp_path: Path) -> None:
    """As in the folder of openai-community/gpt2."""
    state, expected = build(MODELS["gpt2"])
    state = rename(state | BUFFERS["gpt2"], lambda name: name.removeprefix("transformer."))
    check(write(tmp_path, MODELS["gpt2"], state), expected)


def test_gamma_and_beta_of_norms(tmp_path: Path) -> None:
    state, expected = build(MODELS["gpt2"])

    def make_old(name: str) -> str:
        return name.replace(".weight", ".gamma").replace(".bias", ".beta") if ".ln_" in name else name

    assert sum(make_old(name) != name for name in state) == 10
    check(write(tmp_path, MODELS["gpt2"], rename(state, make_old)), expected)


EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2, lite", "deepseek_v3", "gpt_oss", "nemotron_h, experts"]


@pytest.mark.parametrize("case", [*EXPERTS, "mamba2", "nemotron_h"])
def test_names_of_version_5_in_memory(case: str, tmp_path: Path) -> None:
    """Packed experts, and ``model.`` for the ``backbone.`` of Nemotron-H."""
    state, expected = build(MODELS[case])
    assert case not in EXPERTS or any(name.endswith("experts.down_proj") for name in state)
    check(write(tmp_path, MODELS[case], state), expected)


@pytest.mark.parametrize("case", [*EXPERTS, "mamba2", "nemotron_h"])
def test_names_that_version_5_saves(case: str, tmp_path: Path) -> None:
    model = build_transformers_model(MODELS[case])
    model.save_pretrained(tmp_path)
    check(tmp_path, convert_weights(model.config, model.state_dict()))


def test_several_precisions_in_one_folder(tmp_path: Path) -> None:
    state, _ = build(UNTIED)
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    state = {name: tensor.to(dtypes[number % 3]) for number, (name, tensor) in enumerate(state.items())}
    folder = open_folder(write(tmp_path, UNTIED, state))
    reader = TensorReader()
    for _, parts in folder.match.weights.values():
        for part in parts:
            read = reader.read(folder.stored[part.tensor], part, part.rows, slice(None))
            assert read.dtype == state[part.tensor].dtype
            assert torch.equal(read, state[part.tensor][part.rows.start : part.rows.stop])


def test_folders_are_opened_without_torch(tmp_path: Path) -> None:
    state, _ = build(UNTIED)
    write(tmp_path, UNTIED, state)
    program = (
        "import sys; from bridge.models.huggingface.folder.folder import open_folder\n"
        "print(len(open_folder(sys.argv[1]).stored), {'torch', 'transformers', 'megatron'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(state)} set()\n"


def test_what_is_no_folder_is_told(tmp_path: Path) -> None:
    """A file in it, and a folder of the cache whose files are gone."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llama"]))
    with pytest.raises(WeightsError, match=r"config\.json: is a file: expected a folder with config\.json and saf"):
        open_folder(tmp_path / "config.json")
    (tmp_path / "model.safetensors").symlink_to("blobs/nothing")
    with pytest.raises(WeightsError, match=r"model\.safetensors is a link to nothing"):
        open_folder(tmp_path)
