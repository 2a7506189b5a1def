"""Published config.json files, converted by `bridge from-hf`, give models with the published number of parameters.

The files are in ``huggingface``, as published, except mamba2-2.7b: its authors' file has another format, so this one
has the format of transformers.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bridge.config import Document, DocumentError, ModelConfig
from bridge.dist.cpu import cpu_runtime
from bridge.models.huggingface import from_hf

FILES = {file.stem: file for file in (Path(__file__).parent / "huggingface").glob("*.json")}


@dataclass(frozen=True)
class Count:
    """Numbers of parameters of one model; tied parameters count once."""

    published: int
    """Elements of the published weights, from the model's page, or else from the authors' or transformers' code."""

    stored: int = 0
    """Published elements that are not parameters: buffers, copies, scales."""

    megatron: int = 0
    """Additional parameters of Megatron's model."""

    transformers: int = 0
    """Additional parameters of the model of transformers."""

    @property
    def parameters(self) -> int:
        """The parameters of the model."""
        return self.published - self.stored


def causal_masks(layers: int, positions: int) -> int:
    """Return the elements of the causal masks that GPT-2's files store for each layer."""
    return layers * positions**2


Matrices = list[tuple[int, int]]


def elements(matrices: Matrices) -> int:
    return sum(rows * columns for rows, columns in matrices)


def scales(matrices: Matrices) -> int:
    """Return the number of scales of matrices in FP8: one for each block of 128 x 128."""
    return sum(-(-rows // 128) * -(-columns // 128) for rows, columns in matrices)


def gated(width: int) -> Matrices:
    return [(width, V3_HIDDEN), (width, V3_HIDDEN), (V3_HIDDEN, width)]


# DeepSeek-V3: the matrices of its layers. Its 62nd layer predicts a second token; it has two more norms and a
# projection before it, and one norm after it.
V3_HIDDEN = 7168
V3_ATTENTION = [(1536, V3_HIDDEN), (128 * 192, 1536), (512 + 64, V3_HIDDEN), (128 * 256, 512), (V3_HIDDEN, 128 * 128)]
V3_EXPERTS = gated(2048) * 257
V3_PREDICTION_LAYER = elements(V3_ATTENTION + V3_EXPERTS) + (1536 + 512) + 256 * V3_HIDDEN + 2 * V3_HIDDEN
V3_PREDICTION_LAYER += 3 * V3_HIDDEN + 2 * V3_HIDDEN**2
V3_STORED = (
    2 * 129280 * V3_HIDDEN  # copies of embedding and output layer in the 62nd layer
    + 59 * 256  # biases of the routers, which are buffers, in Megatron, too
    + scales(62 * V3_ATTENTION + 3 * gated(18432) + 59 * V3_EXPERTS)
)
LLAMA_3 = Count(8_030_261_248)
COUNTS = {
    "Qwen--Qwen1.5-MoE-A2.7B": Count(14_315_784_192),
    "Qwen--Qwen2-57B-A14B": Count(57_408_658_944),
    "Qwen--Qwen2-7B": Count(7_615_616_512),
    "Qwen--Qwen2.5-0.5B": Count(494_032_768),
    "Qwen--Qwen2.5-72B": Count(72_706_203_648),
    "Qwen--Qwen2.5-7B": Count(7_615_616_512),
    "Qwen--Qwen3-0.6B": Count(751_632_384, stored=151936 * 1024),  # the tied output layer
    "Qwen--Qwen3-235B-A22B": Count(235_093_634_560),
    "Qwen--Qwen3-30B-A3B": Count(30_532_122_624),
    "Qwen--Qwen3-8B": Count(8_190_735_360),
    "deepseek-ai--DeepSeek-V2": Count(235_741_434_880),
    "deepseek-ai--DeepSeek-V2-Lite": Count(15_706_484_224),
    "deepseek-ai--DeepSeek-V3": Count(684_531_386_000, stored=V3_STORED, transformers=-V3_PREDICTION_LAYER),
    # transformers 5 ties the output layer of every T5; the published weights of version 1.1 have a separate one.
    "google--flan-t5-xl": Count(2_849_757_184, transformers=-32128 * 2048),
    "google--t5-v1_1-xl": Count(2_849_757_184, transformers=-32128 * 2048),
    "google--gemma-2b": Count(2_506_172_416),
    "google--gemma-7b": Count(8_537_680_896),
    # Megatron's tied output layer has a bias. The file of t5-base contains unused relative-position biases of the
    # decoder's cross attention.
    "google-t5--t5-11b": Count(11_307_321_344, megatron=32128),
    "google-t5--t5-base": Count(222_903_936, stored=32 * 12, megatron=32128),
    "meta-llama--Llama-2-7b-hf": Count(6_738_417_664, stored=32 * 64),  # rotary frequencies in each layer
    "meta-llama--Llama-3.1-405B": Count(405_853_388_800),
    "meta-llama--Llama-3.1-70B": Count(70_553_706_496),
    "meta-llama--Llama-3.1-8B": LLAMA_3,
    "meta-llama--Llama-3.2-1B": Count(1_235_814_400),
    "meta-llama--Meta-Llama-3-8B": LLAMA_3,
    "microsoft--Phi-3-medium-4k-instruct": Count(13_960_238_080),
    "microsoft--Phi-3-mini-4k-instruct": Count(3_821_079_552),
    "mistralai--Mamba-Codestral-7B-v0.1": Count(7_285_403_648),
    "mistralai--Mistral-7B-v0.1": Count(7_241_732_096),
    "mistralai--Mistral-7B-v0.3": Count(7_248_023_552),
    "mistralai--Mixtral-8x22B-v0.1": Count(140_620_634_112),
    "mistralai--Mixtral-8x7B-v0.1": Count(46_702_792_704),
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Count(31_577_937_344),
    "nvidia--Nemotron-H-8B-Base-8K": Count(8_100_852_736),
    "openai--gpt-oss-120b": Count(116_829_156_672),
    "openai--gpt-oss-20b": Count(20_914_757_184),
    "openai-community--gpt2": Count(137_022_720, stored=causal_masks(12, 1024)),
    "openai-community--gpt2-xl": Count(1_557_611_200),
    "state-spaces--mamba2-2.7b": Count(2_702_599_680),
}


# Megatron selects groups of experts by the sum of their best 6 // 3 scores, DeepSeek-V2 by the best score. With
# topk_group = 6 both are the same, and the number of parameters does not change.
REFUSED = {"deepseek-ai--DeepSeek-V2": ("$.topk_method", {"topk_group": 6})}


def load_published(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILES[name].read_text())
    return content


def convert(config: dict[str, Any]) -> dict[str, Any]:
    return from_hf(config).data


def count_parameters(data: dict[str, Any], pg_collection: ProcessGroupCollection) -> int:
    """Build the model on the meta device and return its number of parameters."""
    config: Any = ModelConfig.from_dict(data)
    config.finalize()
    config.transformer.use_cpu_initialization = True
    config.transformer.perform_initialization = False
    with cpu_runtime(), torch.device("meta"):  # some layers create tensors on the GPU
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        model = config.get_builder_cls()(config).build_model(pg_collection)
    return sum(parameter.numel() for parameter in model.parameters())


def test_each_published_file_has_a_parameter_count() -> None:
    assert set(FILES) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_the_built_model_has_the_published_parameters(name: str, pg_collection: ProcessGroupCollection) -> None:
    count = COUNTS[name]
    _, changes = REFUSED.get(name, ("", {}))
    assert count_parameters(convert(load_published(name) | changes), pg_collection) == count.parameters + count.megatron


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_megatron_would_compute_differently_are_refused(name: str) -> None:
    path, _ = REFUSED[name]
    with pytest.raises(DocumentError) as caught:
        convert(load_published(name))
    assert [problem.path for problem in caught.value.problems] == [path]


@pytest.mark.parametrize("name", COUNTS)
def test_the_model_of_transformers_has_the_published_parameters(name: str) -> None:
    kept = {key: value for key, value in load_published(name).items() if key not in ("auto_map", "quantization_config")}
    config = CONFIG_MAPPING[kept["model_type"]].from_dict(kept)
    with torch.device("meta"):
        model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == COUNTS[name].parameters + COUNTS[name].transformers


# --- Presets


SCRIPT = Path(__file__).parents[3] / ".github/scripts/make_presets.py"
TRAINING_FIELDS = {
    "seq_length",
    "should_pad_vocab",
    "transformer.bf16",
    "transformer.fp16",
    "transformer.params_dtype",
    "transformer.cross_entropy_loss_fusion",  # in bf16 only
    "transformer.init_method_std",
    "transformer.transformer_impl",
    "transformer.moe_router_load_balancing_type",
    "transformer.moe_aux_loss_coeff",
    "transformer.moe_router_bias_update_rate",
    "transformer.mtp_num_layers",
}


def flatten(data: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in data.items() if key != "transformer"}
    return rest | {f"transformer.{key}": value for key, value in data["transformer"].items()}


def test_presets_equal_the_converted_published_files() -> None:
    made = runpy.run_path(str(SCRIPT))
    for name, preset in made["MODELS"].items():
        committed = (made["PRESETS"] / f"{name}.yaml").read_text()
        assert committed == made["make_text"](preset), f"run {SCRIPT.name}"
        preset_fields, published_fields = (
            flatten(data)
            for data in (
                Document.load(name).data,
                from_hf(load_published(preset.published.stem), model_id=preset.model_id).data,
            )
        )
        assert {
            key for key in preset_fields | published_fields if preset_fields.get(key) != published_fields.get(key)
        } <= TRAINING_FIELDS, name
