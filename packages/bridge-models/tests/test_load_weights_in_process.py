"""What load_weights refuses or loads that transformers has no model for, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from built_models import build_bridge_model
from huggingface_cases import MODELS
from huggingface_models import build_transformers_model
from huggingface_weights import Weights
from megatron.core.process_groups_config import ProcessGroupCollection
from quantized_parameters import quantize
from safetensors.torch import load_file
from weight_folders import read_weights, write

from bridge.config import ModelConfig
from bridge.dist.cpu import cpu_runtime, on_meta
from bridge.dist.engine.placement import named_tensors
from bridge.models.errors import WeightsError
from bridge.models.huggingface import from_hf, load_weights, save_weights
from bridge.models.huggingface.folder.folder import open_folder
from bridge.models.huggingface.transfer.names import canonicalize_name

Groups = ProcessGroupCollection
PREDICTING = MODELS["deepseek_v3"] | {"num_nextn_predict_layers": 1}
EXTRA = "model.layers.2."
"""The prefix of the layer of multi-token prediction, which comes after the last of the model."""


@pytest.fixture(scope="module", autouse=True)
def _on_cpu(pg_collection: Groups) -> Iterator[None]:
    with cpu_runtime():
        yield


def list_tensors(model: Any, groups: Groups) -> Weights:
    """Return the parameters and buffers of a model by the names of weight tables."""
    found = named_tensors(model, groups)
    return {canonicalize_name(placement.full_name): tensor.detach() for placement, tensor in found}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The tensors of a small DeepSeek-V3, named as those of the published one, which transformers does not load."""
    folder = tmp_path_factory.mktemp("saved")
    build_transformers_model(MODELS["deepseek_v3"]).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    extra = {
        name.replace("model.layers.1.", EXTRA): torch.randn(one.shape, generator=generator)
        for name, one in last.items()
    }
    for name, shape in {"enorm": (32,), "hnorm": (32,), "eh_proj": (32, 64), "shared_head.norm": (32,)}.items():
        extra[f"{EXTRA}{name}.weight"] = torch.randn(shape, generator=generator)
    extra[f"{EXTRA}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    extra[f"{EXTRA}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors | extra


def test_multi_token_prediction_is_loaded(state: Weights, pg_collection: Groups, tmp_path: Path) -> None:
    folder = open_folder(write(tmp_path, PREDICTING, state))
    model = build_bridge_model(PREDICTING, pg_collection)
    built = list_tensors(model, pg_collection)
    assert {name: tuple(tensor.shape) for name, tensor in built.items()} == {
        name: weight.shape for name, (weight, _) in folder.match.weights.items()
    }
    load_weights([model], folder, pg_collection)
    loaded = list_tensors(model, pg_collection)
    expected = read_weights(folder)
    assert [name for name in loaded if not torch.equal(loaded[name], expected[name])] == []
    for mcore, hf in {
        "enorm": "enorm",
        "hnorm": "hnorm",
        "eh_proj": "eh_proj",
        "final_layernorm": "shared_head.norm",
        "mtp_model_layer.pre_mlp_layernorm": "post_attention_layernorm",
        "mtp_model_layer.self_attention.linear_proj": "self_attn.o_proj",
        "mtp_model_layer.mlp.router": "mlp.gate",
        "mtp_model_layer.mlp.shared_experts.linear_fc2": "mlp.shared_experts.down_proj",
    }.items():
        assert torch.equal(loaded[f"mtp.layers.0.{mcore}.weight"], state[f"{EXTRA}{hf}.weight"]), mcore
    experts = "mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc2.weight"
    for expert in range(16):
        assert torch.equal(loaded[f"{experts}{expert}"], state[f"{EXTRA}mlp.experts.{expert}.down_proj.weight"])


def test_multi_token_prediction_needs_no_copies(state: Weights, pg_collection: Groups, tmp_path: Path) -> None:
    copies = (f"{EXTRA}embed_tokens.weight", f"{EXTRA}shared_head.head.weight")
    open_folder(write(tmp_path, PREDICTING, {name: one for name, one in state.items() if name not in copies}))


@pytest.mark.parametrize(
    ("copy", "original"),
    [("embed_tokens.weight", "model.embed_tokens.weight"), ("shared_head.head.weight", "lm_head.weight")],
)
def test_multi_token_prediction_with_another_embedding_is_an_error(
    copy: str, original: str, state: Weights, pg_collection: Groups, tmp_path: Path
) -> None:
    changed = state[original].clone()
    changed[95, 31] += 1
    write(tmp_path, PREDICTING, state | {f"{EXTRA}{copy}": changed})
    with pytest.raises(WeightsError) as error:
        load_weights([build_bridge_model(PREDICTING, pg_collection)], tmp_path, pg_collection)
    assert str(error.value).startswith(f"{tmp_path}/model.safetensors: {EXTRA}{copy}: differs from {original}, ")
    assert "tie_word_embeddings" not in str(error.value)


def test_layers_that_config_json_does_not_mention_are_an_error(state: Weights, tmp_path: Path) -> None:
    write(tmp_path, MODELS["deepseek_v3"], state)
    with pytest.raises(WeightsError, match=rf"{EXTRA}.*: unknown"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("case", "changes", "left_out"),
    [
        ("qwen2", {"model_type": "llama"}, "decoder.layers.1.self_attention.linear_qkv.bias"),
        ("qwen3", {"model_type": "llama"}, "decoder.layers.0.self_attention.q_layernorm.weight"),
        ("llama", {"tie_word_embeddings": True}, "output_layer.weight"),
        ("t5, 1.0", {"num_layers": 1}, "encoder_num_layers"),
    ],
)
def test_weights_that_the_model_lacks_are_an_error(
    case: str, changes: dict[str, Any], left_out: str, pg_collection: Groups, tmp_path: Path
) -> None:
    """A document of a similar model takes all parameters from the folder, but not all of the folder."""
    build_transformers_model(MODELS[case]).save_pretrained(tmp_path)
    with pytest.raises(WeightsError) as error:
        load_weights([build_bridge_model(MODELS[case] | changes, pg_collection)], tmp_path, pg_collection)
    assert left_out in {problem.path for problem in error.value.problems}


@pytest.mark.parametrize("case", ["llama 3.2, tied", "gpt2", "t5, 1.0"])
def test_tied_output_layer_that_differs_is_an_error(case: str, pg_collection: Groups, tmp_path: Path) -> None:
    model = build_transformers_model(MODELS[case])
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tensors["lm_head.weight"][-1, -1] += 1
    write(tmp_path, MODELS[case], tensors)
    with pytest.raises(WeightsError) as error:
        load_weights([build_bridge_model(MODELS[case], pg_collection)], tmp_path, pg_collection)
    (problem,) = error.value.problems
    assert (problem.path, problem.file) == ("lm_head.weight", f"{tmp_path}/model.safetensors")
    assert "set tie_word_embeddings to false" in problem.message


def test_tied_output_layer_that_is_equal_is_loaded(pg_collection: Groups, tmp_path: Path) -> None:
    case = MODELS["llama 3.2, tied"]
    model = build_transformers_model(case)
    write(tmp_path, case, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    built = build_bridge_model(case, pg_collection)
    load_weights([built], tmp_path, pg_collection)
    embedding = list_tensors(built, pg_collection)["embedding.word_embeddings.weight"]
    assert torch.equal(embedding, model.state_dict()["lm_head.weight"])


@pytest.mark.parametrize("keeps_exact", [True, False])
def test_parameters_in_fp8_are_loaded_and_saved(keeps_exact: bool, pg_collection: Groups, tmp_path: Path) -> None:
    case = MODELS["llama"]
    build_transformers_model(case).save_pretrained(tmp_path)
    built = build_bridge_model(case, pg_collection)
    layer = built.decoder.layers[0].mlp.linear_fc1
    parameter: Any = quantize(layer, "weight", keeps_exact=keeps_exact)
    load_weights([built], tmp_path, pg_collection)
    save_weights([built], tmp_path / "saved", pg_collection, model=ModelConfig.from_dict(from_hf(case).data))
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    exact = read_weights(open_folder(tmp_path))[name]
    rounded = exact.to(torch.float8_e4m3fn).float()
    assert torch.equal(parameter.float(), rounded)
    if keeps_exact:
        assert torch.equal(parameter.get_high_precision_init_val(), exact)
    assert torch.equal(read_weights(open_folder(tmp_path / "saved"))[name], rounded)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_another_default_device_changes_nothing(case: str, pg_collection: Groups, tmp_path: Path) -> None:
    """That of a training script may be its GPU."""
    build_transformers_model(MODELS[case]).save_pretrained(tmp_path)
    built = build_bridge_model(MODELS[case], pg_collection)
    with torch.device("meta"):
        load_weights([built], tmp_path, pg_collection)
        config = ModelConfig.from_dict(from_hf(MODELS[case]).data)
        save_weights([built], tmp_path / "saved", pg_collection, model=config)
    expected, saved = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "saved"))
    assert [name for name in saved if not torch.equal(saved[name], expected[name])] == []


def test_rows_of_gates_in_another_order_are_refused(pg_collection: Groups, tmp_path: Path) -> None:
    """A fused kernel of Transformer Engine reads them so; Megatron-Core reorders its input where it is missing."""
    case = MODELS["qwen3_moe"]
    build_transformers_model(case).save_pretrained(tmp_path)
    config: Any = ModelConfig.from_dict(from_hf(case).data)
    config.transformer.moe_mlp_glu_interleave_size = 8
    config.finalize()
    built = config.get_builder_cls()(config).build_model(pg_collection)
    with pytest.raises(WeightsError, match=r"^transformer\.moe_mlp_glu_interleave_size: is set, .*: set it to null$"):
        load_weights([built], tmp_path, pg_collection)
    with pytest.raises(WeightsError, match=r"^transformer\.moe_mlp_glu_interleave_size: is set, "):
        save_weights([built], tmp_path / "saved", pg_collection, model=config)


def test_weights_in_8_bits_are_not_loaded_from_the_meta_device(pg_collection: Groups, tmp_path: Path) -> None:
    build_transformers_model(MODELS["llama"]).save_pretrained(tmp_path)
    with on_meta():
        built = build_bridge_model(MODELS["llama"], pg_collection)
    built.config.fp8_param = True
    with pytest.raises(WeightsError, match=r"^transformer\.fp8_param: .*set transformer\.init_model_with_meta_device"):
        load_weights([built], tmp_path, pg_collection)
    built.config.fp8_param = False
    load_weights([built], tmp_path, pg_collection)
