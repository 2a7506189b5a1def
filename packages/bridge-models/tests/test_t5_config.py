"""The configuration of a T5: defaults, checks and documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.T5 import t5_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import relu

from bridge.config import Document, ModelConfig, load_config
from bridge.models.errors import ModelConfigError
from bridge.models.t5 import T5ModelBuilder, T5ModelConfig

Transformer = Callable[..., TransformerConfig]

T5Factory = Callable[..., T5ModelConfig]


def test_outer_defaults_match_megatron_except_tied_embeddings(transformer: Transformer) -> None:
    own = {field.name for field in fields(T5ModelConfig)} - {field.name for field in fields(ModelConfig)}
    config = T5ModelConfig(transformer=transformer())
    assert {name: getattr(config, name) for name in own - {"transformer"}} == {
        "encoder_num_layers": None,
        "encoder_ffn_hidden_size": None,
        "encoder_num_attention_heads": None,
        "encoder_kv_channels": None,
        "encoder_layer_spec": None,
        "decoder_layer_spec": None,
        "vocab_size": None,
        "make_vocab_size_divisible_by": 128,
        "should_pad_vocab": False,
        "seq_length": 512,
        "fp16_lm_cross_entropy": False,
        "parallel_output": True,
        "share_embeddings_and_output_weights": True,
        "position_embedding_type": "learned_absolute",
        "rotary_percent": 1.0,
        "seq_len_interpolation_factor": None,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    }


def test_the_config_names_its_builder_and_exposes_transformer_fields(t5: T5Factory) -> None:
    config = t5()
    assert config.get_builder_cls() is T5ModelBuilder
    config.hidden_dropout = 0.25
    assert config.transformer.hidden_dropout == 0.25
    assert not {field.name for field in fields(T5ModelConfig)} & {field.name for field in fields(TransformerConfig)}


def test_the_encoder_config_is_the_decoder_config_with_its_own_sizes(t5: T5Factory) -> None:
    config = t5(
        num_layers=3, normalization="RMSNorm", outer={"encoder_num_layers": 1, "encoder_num_attention_heads": 2}
    )
    encoder = config.encoder_transformer
    changed = {
        field.name
        for field in fields(TransformerConfig)
        if getattr(encoder, field.name) is not getattr(config.transformer, field.name)
    }
    assert changed == {"num_layers", "num_attention_heads", "num_query_groups", "output_layer_init_method"}
    assert (encoder.num_layers, encoder.num_attention_heads, encoder.num_query_groups) == (1, 2, 2)
    encoder.num_layers = 7
    assert (config.num_layers, config.encoder_transformer.num_layers) == (3, 1)


def test_the_encoder_is_initialised_for_its_own_depth(t5: T5Factory, pg_collection: ProcessGroupCollection) -> None:
    outer = {"encoder_num_layers": 32}
    config = t5(num_layers=2, hidden_size=64, outer=outer)
    model = T5ModelBuilder(config).build_model(pg_collection)
    for stack, layers in ((model.encoder, 32), (model.decoder, 2)):
        for part in (stack.layers[0].self_attention.linear_proj, stack.layers[0].mlp.linear_fc2):
            # The output matrices of a transformer: 0.02 / sqrt(2 x layers), as in GPT-2.
            assert part.weight.std().item() == pytest.approx(0.02 / (2 * layers) ** 0.5, rel=0.1)
    own = t5(num_layers=2, output_layer_init_method=torch.nn.init.ones_, outer=outer)
    assert own.encoder_transformer.output_layer_init_method is torch.nn.init.ones_


@pytest.mark.parametrize(
    ("outer", "inner", "message"),
    [
        ({"vocab_size": None}, {}, "vocab_size is not set"),
        ({"vocab_size": 97}, {"tensor_model_parallel_size": 2}, "vocab_size 97 .* 2: set should_pad_vocab"),
        ({"encoder_num_layers": 0}, {}, "encoder_num_layers: must be at least 1, got 0"),
        ({}, {"num_query_groups": 2}, "num_query_groups: must equal num_attention_heads = 4, got 2"),
        (
            {"position_embedding_type": "relative", "encoder_num_attention_heads": 2},
            {},
            "must equal transformer.num_attention_heads = 4 .* got 2",
        ),
        (
            {"position_embedding_type": "rope", "encoder_kv_channels": 4},
            {},
            "must equal transformer.kv_channels = 8 .* got 4",
        ),
        ({"position_embedding_type": "relative", "relative_attention_num_buckets": 3}, {}, "at least 4"),
        (
            {"position_embedding_type": "relative", "relative_attention_max_distance": 16},
            {},
            "max_distance: must be greater than .* = 16, got 16",
        ),
        ({}, {"cuda_graph_impl": "local"}, "use_te_rng_tracker"),
    ],
)
def test_invalid_models_are_refused(t5: T5Factory, outer: dict[str, Any], inner: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        t5(outer=outer, **inner).finalize()


def test_encoder_heads_may_differ_without_shared_rotary_embeddings(t5: T5Factory) -> None:
    t5(outer={"encoder_num_attention_heads": 2, "encoder_kv_channels": 4}).finalize()


ROUND_TRIPS: dict[str, tuple[type[TransformerConfig], dict[str, Any], dict[str, Any]]] = {
    "the encoder's sizes": (
        TransformerConfig,
        {"activation_func": relu},
        {
            "encoder_num_layers": 6,
            "encoder_ffn_hidden_size": 48,
            "encoder_num_attention_heads": 2,
            "encoder_kv_channels": 16,
        },
    ),
    "relative positions": (
        TransformerConfig,
        {"normalization": "RMSNorm", "softmax_scale": 1.0},
        {
            "position_embedding_type": "relative",
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
        },
    ),
    "rotary positions": (
        TransformerConfig,
        {"params_dtype": torch.bfloat16, "bf16": True},
        {"position_embedding_type": "rope", "rotary_percent": 0.5, "seq_len_interpolation_factor": 2.0},
    ),
    "the rest": (
        TransformerConfig,
        {},
        {
            "seq_length": 64,
            "fp16_lm_cross_entropy": True,
            "parallel_output": False,
            "share_embeddings_and_output_weights": False,
            "should_pad_vocab": True,
            "make_vocab_size_divisible_by": 64,
        },
    ),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_documents_keep_every_field(t5: T5Factory, tmp_path: Path, case: str) -> None:
    cls, inner, outer = ROUND_TRIPS[case]
    config = t5(cls, outer=outer, **inner)
    file = tmp_path / "model.yaml"
    file.write_text(Document.of(config).to_yaml())
    for read in (ModelConfig.from_dict(json.loads(json.dumps(config.as_dict()))), load_config(file)):
        assert repr(read) == repr(config)


def test_layer_specs_are_written_and_read_back(t5: T5Factory) -> None:
    config = t5(
        outer={
            "encoder_layer_spec": t5_spec.encoder_model_with_local_spec(),
            "decoder_layer_spec": t5_spec.decoder_model_with_local_spec(),
        }
    )
    read = ModelConfig.from_dict(json.loads(json.dumps(config.as_dict())))
    assert repr(read) == repr(config)
