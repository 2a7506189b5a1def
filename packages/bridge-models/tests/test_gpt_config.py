"""The configuration of a GPT: defaults, access to transformer fields, checks and documents."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.activations import squared_relu
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from bridge.config import ConfigError, Document, ModelConfig, load_config
from bridge.models.errors import ModelConfigError
from bridge.models.gpt import GPTModelBuilder, GPTModelConfig
from bridge.models.gpt.layers import default_layer_spec

GPT = Callable[..., GPTModelConfig]
Transformer = Callable[..., TransformerConfig]


def test_defaults(transformer: Transformer) -> None:
    config = GPTModelConfig(transformer=transformer())
    expected = {
        "transformer_layer_spec": None,
        "vocab_size": None,
        "make_vocab_size_divisible_by": 128,
        "should_pad_vocab": False,
        "seq_length": 1024,
        "fp16_lm_cross_entropy": False,
        "parallel_output": True,
        "share_embeddings_and_output_weights": False,
        "position_embedding_type": "learned_absolute",
        "rotary_percent": 1.0,
        "rotary_base": 10000,
        "rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "scatter_embedding_sequence_parallel": True,
        "seq_len_interpolation_factor": None,
        "tp_comm_overlap_cfg": None,
        "use_arbitrary_attention_mask": None,
    }
    own = {field.name for field in fields(GPTModelConfig)} - {field.name for field in fields(ModelConfig)}
    assert {name: getattr(config, name) for name in own - {"transformer"}} == expected


def test_the_config_names_its_builder(gpt: GPT) -> None:
    assert gpt().get_builder_cls() is GPTModelBuilder


def test_outer_and_transformer_fields_are_disjoint() -> None:
    assert not {field.name for field in fields(GPTModelConfig)} & {field.name for field in fields(TransformerConfig)}


def test_transformer_fields_are_readable(gpt: GPT) -> None:
    config = gpt(hidden_size=32)
    assert config.hidden_size == 32
    assert config.ffn_hidden_size == 128


def test_assigning_a_transformer_field_changes_only_the_transformer(gpt: GPT) -> None:
    config = gpt()
    before = dict(vars(config))
    config.hidden_dropout = 0.25
    assert config.transformer.hidden_dropout == 0.25
    assert vars(config) == before


def test_an_own_field_is_not_written_to_the_transformer(gpt: GPT) -> None:
    config = gpt()
    config.seq_length = 512
    assert config.seq_length == 512
    assert not hasattr(config.transformer, "seq_length")


def test_reading_an_unknown_name_is_an_error_naming_it(gpt: GPT) -> None:
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = gpt().no_such_field


def test_assigning_an_unknown_name_suggests_a_field(gpt: GPT) -> None:
    config = gpt()
    with pytest.raises(AttributeError, match=r"hidden_dropuot.*hidden_dropout"):
        config.hidden_dropuot = 0.1
    with pytest.raises(AttributeError, match=r"vocabsize.*vocab_size"):
        config.vocabsize = 5


def test_mla_owns_the_rotary_fields(transformer: Transformer) -> None:
    config = GPTModelConfig(transformer=transformer(MLATransformerConfig, rotary_base=50000, rotary_percent=0.5))
    assert (config.rotary_base, config.rotary_percent) == (50000, 0.5)
    config.rotary_base = 70000
    assert vars(config.transformer)["rotary_base"] == 70000


def test_two_values_for_a_shared_field_are_an_error(transformer: Transformer) -> None:
    mla = transformer(MLATransformerConfig, rotary_base=50000)
    with pytest.raises(ConfigError, match="rotary_base"):
        GPTModelConfig(transformer=mla, rotary_base=10000)
    assert vars(mla)["rotary_base"] == 50000


def test_mla_keeps_its_own_rotary_defaults(transformer: Transformer) -> None:
    GPTModelConfig(transformer=transformer(MLATransformerConfig))
    assert GPTModelConfig(transformer=transformer()).rotary_base == 10000


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_independent(gpt: GPT, duplicate: Callable[[GPTModelConfig], GPTModelConfig]) -> None:
    config = gpt()
    twin = duplicate(config)
    twin.hidden_dropout = 0.75
    assert twin.transformer.hidden_dropout == 0.75
    assert config.transformer.hidden_dropout == 0.1


def test_six_layers_do_not_split_into_two_by_two_chunks(gpt: GPT) -> None:
    config = gpt(num_layers=6, **pipeline(2, 2))
    with pytest.raises(ModelConfigError, match=r"num_layers 6 .* 4 chunks.* 2 x .* 2"):
        config.finalize()


def test_eight_layers_split_into_two_by_two_chunks(gpt: GPT) -> None:
    gpt(num_layers=8, **pipeline(2, 2)).finalize()


@given(num_layers=st.integers(1, 24), pp=st.integers(1, 6), vp=st.none() | st.integers(1, 4))
def test_layers_are_accepted_when_megatron_can_place_them(gpt: GPT, num_layers: int, pp: int, vp: int | None) -> None:
    config = gpt(num_layers=num_layers, **pipeline(pp, vp))
    try:
        get_num_layers_to_build(config.transformer, vp_stage=0, pp_rank=0)
    except AssertionError:
        with pytest.raises(ModelConfigError, match="is not divisible by"):
            config.finalize()
    else:
        config.finalize()


@pytest.mark.parametrize(
    "split",
    [
        {"num_layers": 7, "num_layers_in_first_pipeline_stage": 3},
        {"num_layers": 7, "num_layers_in_last_pipeline_stage": 3},
        {"num_layers": 5, "account_for_embedding_in_pipeline_split": True},
        {"num_layers": 5, "account_for_loss_in_pipeline_split": True},
        {"num_layers": 5, "pipeline_model_parallel_layout": "Ettt|ttL"},
    ],
)
def test_uneven_splits_are_left_to_megatron(gpt: GPT, split: dict[str, Any]) -> None:
    gpt(**split, **pipeline(2, None)).finalize()


def test_cuda_graphs_require_the_transformer_engine_rng_tracker(gpt: GPT) -> None:
    config = gpt(cuda_graph_impl="local")
    with pytest.raises(ModelConfigError, match="use_te_rng_tracker"):
        config.finalize()
    config.use_te_rng_tracker = True
    config.finalize()


@dataclass
class FinalizingTransformerConfig(TransformerConfig):
    finalized: int = 0

    def finalize(self) -> None:
        self.finalized += 1


def test_finalize_calls_finalize_of_the_transformer(gpt: GPT) -> None:
    config = gpt(FinalizingTransformerConfig)
    config.finalize()
    assert config.finalized == 1
    config.validate()
    assert config.finalized == 1


@pytest.mark.parametrize(
    ("outer", "inner", "message"),
    [
        ({"vocab_size": None}, {}, "vocab_size is not set"),
        ({"vocab_size": 97}, {"tensor_model_parallel_size": 2}, "vocab_size 97 .* 2: set should_pad_vocab"),
        ({"position_embedding_type": "mrope"}, {}, "mrope_section"),
        ({"position_embedding_type": "yarn"}, {}, r"yarn_\*"),
        (
            {},
            {
                "mtp_num_layers": 1,
                "experimental_attention_variant": "gated_delta_net",
                "linear_attention_freq": 2,
            },
            "mtp_num_layers 1 .* gated_delta_net",
        ),
        (
            {},
            {"mtp_num_layers": 1, "pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
            "learned_absolute positions and pipeline parallelism",
        ),
    ],
)
def test_invalid_models_are_refused(gpt: GPT, outer: dict[str, Any], inner: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        gpt(outer=outer, **inner).validate()


def test_a_padded_vocabulary_is_divisible(gpt: GPT) -> None:
    config = gpt(outer={"vocab_size": 97, "should_pad_vocab": True}, tensor_model_parallel_size=2)
    config.validate()
    assert config.padded_vocab_size == 256


ROUND_TRIPS: dict[str, tuple[type[TransformerConfig], dict[str, Any], dict[str, Any]]] = {
    "multi-latent attention": (MLATransformerConfig, {"rotary_base": 50000.0}, {"position_embedding_type": "rope"}),
    "experts": (
        TransformerConfig,
        {"num_moe_experts": 4, "moe_layer_freq": [0, 1, 1, 1], "add_bias_linear": False},
        {},
    ),
    "heterogeneous": (HeterogeneousTransformerConfig, {}, {}),
    "multi-token prediction": (TransformerConfig, {"mtp_num_layers": 2}, {}),
    "layer spec function": (TransformerConfig, {}, {"transformer_layer_spec": default_layer_spec}),
    "explicit stages": (
        TransformerConfig,
        {"pipeline_model_parallel_layout": "Ettt|tL", "pipeline_model_parallel_size": 2, "pipeline_dtype": torch.half},
        {},
    ),
    "window": (TransformerConfig, {"window_size": (8, 0), "attention_backend": AttnBackend.unfused}, {}),
    "megatron's activation": (TransformerConfig, {"activation_func": squared_relu}, {}),
    "initialiser": (TransformerConfig, {"init_method": partial(torch.nn.init.uniform_, a=-0.1, b=0.1)}, {}),
    "overlap settings": (TransformerConfig, {}, {"tp_comm_overlap_cfg": {"qkv_fprop": {"method": "ring_exchange"}}}),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_documents_keep_every_field(gpt: GPT, tmp_path: Path, case: str) -> None:
    cls, inner, outer = ROUND_TRIPS[case]
    config = gpt(cls, outer=outer, **inner)
    file = tmp_path / "model.yaml"
    file.write_text(Document.of(config).to_yaml())
    for read in (ModelConfig.from_dict(json.loads(json.dumps(config.as_dict()))), load_config(file)):
        assert isinstance(read, GPTModelConfig)
        assert type(read.transformer) is cls
        assert comparable_text(read) == comparable_text(config)


def comparable_text(config: GPTModelConfig) -> str:
    """Return the config as text, with the input of its pipeline layout, whose repr is an address."""
    layout = config.pipeline_model_parallel_layout
    return repr(config).replace(repr(layout), str(layout and layout.input_data))


def pipeline(pp: int, vp: int | None) -> dict[str, Any]:
    return {
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp,
        "pipeline_dtype": torch.float32,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vocab_size", "256", r"\$\.vocab_size: expected an integer, got '256'"),
        ("seq_length", None, r"\$\.seq_length: expected an integer, got null"),
        ("rotary_percent", "1", r"\$\.rotary_percent: expected a number, got '1'"),
        ("hidden_size", "8", r"\$\.transformer\.hidden_size: expected an integer, got '8'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(name: str, value: Any, message: str) -> None:
    config = GPTModelConfig(
        transformer=TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2), vocab_size=8
    )
    config.validate()
    setattr(config, name, value)
    with pytest.raises(ModelConfigError, match=message):
        config.validate()
