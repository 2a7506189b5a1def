"""Presets have the expected size, can be finalized, and are listed by `bridge presets`."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import MegatronModule

from bridge.config import Document, ModelConfig, load_config
from bridge.config.documents.presets import list_presets
from bridge.dist.cpu import cpu_runtime
from bridge.models.commands.presets import presets
from bridge.models.gpt import GPTModelConfig

SMALL = ["hybrid-tiny", "mamba-tiny", "mla-tiny", "moe-tiny", "tiny"]
NAMES = list(list_presets())

EMBEDDINGS = 2 * 256 * 64
GATED_MLP = 3 * 64 * 128
LATENT = (64 + 1) * 32 + 32 * 4 * (16 + 8) + 64 * (16 + 8) + 16 + 16 * 4 * (16 + 16)  # queries, then keys and values
EXPERTS = 4 * (64 + 3 * 64 * 64)  # with their rows of the router
ATTENTION = 64 * (64 + 2 * 32) + 64 * 64
# Input projection (twice 128 channels, B and C of 4 groups with a state of 16, 8 time steps), output projection,
# convolution, parameters of each head, norm.
MAMBA = 64 * (2 * 128 + 2 * 4 * 16 + 8) + 128 * 64 + (128 + 2 * 4 * 16) * (4 + 1) + 3 * 8 + 128
T5_ATTENTION, T5_MLP, T5_BUCKETS = 4 * 64 * 64, 2 * 64 * 256, 32 * 4
# Parameters of embeddings, layers (norms, attention, MLP) and the final norm. test_published_models.py covers published
# models.
TOTALS = {
    # Tied embedding with the bias of the output layer; encoder layers with two norms; decoder layers with cross
    # attention and three norms; in each stack the relative-position biases and a final norm.
    "t5-tiny": 256 * (64 + 1)
    + 4 * (T5_ATTENTION + T5_MLP + 2 * 64)
    + 4 * (2 * T5_ATTENTION + T5_MLP + 3 * 64)
    + 2 * (T5_BUCKETS + 64),
    "mla-tiny": EMBEDDINGS + 4 * (2 * 64 + LATENT + 4 * 16 * 64 + GATED_MLP) + 64,
    "moe-tiny": EMBEDDINGS + 4 * (2 * 64 + ATTENTION + EXPERTS) + 64,
    "mamba-tiny": EMBEDDINGS + 4 * (64 + MAMBA) + 64,
    "hybrid-tiny": EMBEDDINGS + 2 * (4 * 64 + MAMBA + ATTENTION + GATED_MLP + EXPERTS) + 64,
}


def build_on_meta(config: ModelConfig, pg_collection: ProcessGroupCollection) -> MegatronModule:
    """Build the model on the meta device; the vectors of Mamba layers have values all the same."""
    builder = config.get_builder_cls()(config)
    builder.transformer_config.use_cpu_initialization = True
    builder.transformer_config.perform_initialization = False
    with cpu_runtime(), torch.device("meta"):  # some layers create tensors on the GPU
        model_parallel_cuda_manual_seed(1)
        model: MegatronModule = builder.build_model(pg_collection)
    return model


def parameter_count(model: MegatronModule) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def load_finalized(name: str, *overrides: str) -> Any:
    config: Any = load_config(name, overrides)
    config.finalize()
    return config


def load_gpt(name: str, *overrides: str) -> GPTModelConfig:
    config = load_config(name, overrides)
    assert isinstance(config, GPTModelConfig)
    return config


@pytest.mark.parametrize("name", TOTALS)
def test_presets_have_the_expected_number_of_parameters(pg_collection: ProcessGroupCollection, name: str) -> None:
    model = build_on_meta(load_config(name, ["should_pad_vocab=false"]), pg_collection)
    assert {parameter.device.type for parameter in model.parameters() if parameter.numel() > 100_000} <= {"meta"}
    assert parameter_count(model) == TOTALS[name]


@pytest.mark.parametrize(("name", "hidden_size"), [("gpt2-124m", 768), ("gpt2-xl", 1600)])
def test_padding_adds_rows_only_to_the_embedding(
    pg_collection: ProcessGroupCollection, name: str, hidden_size: int
) -> None:
    padding = 50304 - 50257  # to a multiple of 128
    plain = build_on_meta(load_gpt(name, "should_pad_vocab=false"), pg_collection)
    assert (
        parameter_count(build_on_meta(load_gpt(name), pg_collection)) == parameter_count(plain) + padding * hidden_size
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_round_trips(name: str) -> None:
    config = load_config(name)
    written = config.as_dict()
    assert ModelConfig.from_dict(json.loads(json.dumps(written))).as_dict() == written


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_written_as_yaml_reads_back(tmp_path: Path, name: str) -> None:
    config = load_config(name)
    file = tmp_path / "written.yaml"
    file.write_text(Document.of(config).to_yaml())
    assert load_config(file).as_dict() == config.as_dict()


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_can_be_finalized(name: str) -> None:
    load_finalized(name)


def test_gpt2_uses_the_tanh_approximation_of_gelu() -> None:
    activation = load_gpt("gpt2-124m").activation_func
    assert isinstance(activation, partial)
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    # The formula of Hendrycks and Gimpel, as in the code of GPT-2.
    expected = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    torch.testing.assert_close(activation(x), expected)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-405b"])
def test_llama_uses_the_published_rotary_frequencies(pg_collection: ProcessGroupCollection, name: str) -> None:
    model = build_on_meta(load_gpt(name, "transformer.num_layers=1"), pg_collection)
    rotary: Any = model.rotary_pos_emb
    frequencies = rotary.inv_freq
    assert frequencies.shape == (64,)
    assert frequencies[0] == 1.0
    # The slowest pair rotates less than once in 8192 tokens, so the scaling divides its frequency by the factor, 8.
    torch.testing.assert_close(frequencies[-1].item(), 500000.0 ** (-126 / 128) / 8)


@pytest.mark.parametrize("name", SMALL)
def test_small_presets_have_byte_tokens_and_split_evenly(name: str) -> None:
    assert load_finalized(name).vocab_size >= 256
    for overrides in (
        ["transformer.tensor_model_parallel_size=2", *pipeline_overrides("2", "2")],
        pipeline_overrides("4", "null"),
    ):
        load_finalized(name, *overrides)


def pipeline_overrides(pp: str, vp: str) -> list[str]:
    return [
        f"transformer.pipeline_model_parallel_size={pp}",
        f"transformer.virtual_pipeline_model_parallel_size={vp}",
        "transformer.pipeline_dtype=torch.float32",
    ]


def test_the_presets_command_lists_all_presets() -> None:
    result = click.testing.CliRunner().invoke(presets)
    assert result.exit_code == 0
    for name in NAMES:
        assert name in result.stdout
    assert "124M parameters" in result.stdout


def test_the_presets_command_prints_json() -> None:
    result = click.testing.CliRunner().invoke(presets, ["--json"])
    described = json.loads(result.stdout)
    assert set(NAMES) <= set(described)
    assert all(described[name] and not described[name].startswith("#") for name in NAMES)
