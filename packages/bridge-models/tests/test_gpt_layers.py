"""The layer specs of a GPT: given, chosen, and for multi-token prediction."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_local_submodules,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm, WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.models import gpt as megatron_gpt
from megatron.training.models.gpt import GPTModelConfig as MegatronGPTConfig

from bridge.models.backend import choice
from bridge.models.backend.attention import TorchAttention
from bridge.models.backend.norms import TorchNorm
from bridge.models.backend.provider import with_pytorch_attention, with_pytorch_layers
from bridge.models.errors import LayerSpecError, UnsupportedError
from bridge.models.gpt import GPTModelBuilder, GPTModelConfig
from bridge.models.gpt import layers as gpt_layers

GPT = Callable[..., GPTModelConfig]

Transformer = Callable[..., TransformerConfig]

without_te = pytest.mark.skipif(HAVE_TE, reason="says what happens where Transformer Engine is not installed")


class OtherAttention(DotProductAttention):
    """A stand-in for the attention of another backend."""


def other_spec() -> ModuleSpec:
    spec = get_gpt_layer_local_spec()
    parts: Any = spec.submodules
    parts.self_attention.submodules.core_attention = OtherAttention
    return spec


def attention_classes(config: GPTModelConfig, pg_collection: ProcessGroupCollection) -> list[type]:
    model: Any = GPTModelBuilder(config).build_model(pg_collection)
    return [type(layer.self_attention.core_attention) for layer in model.decoder.layers]


def test_a_given_spec_is_used(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    config = gpt(outer={"transformer_layer_spec": other_spec()})
    assert attention_classes(config, pg_collection) == [OtherAttention] * 4


def test_a_function_of_the_config_may_return_the_spec(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    asked = []

    def spec(config: GPTModelConfig) -> ModuleSpec:
        asked.append(config)
        return other_spec()

    config = gpt(outer={"transformer_layer_spec": spec})
    assert attention_classes(config, pg_collection) == [OtherAttention] * 4
    assert asked == [config]
    assert asked[0] is config


def test_a_spec_function_may_take_the_virtual_stage(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    asked = []

    def spec(config: GPTModelConfig, vp_stage: int | None) -> ModuleSpec:
        asked.append(vp_stage)
        return other_spec()

    two = {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "pipeline_dtype": torch.float32,
    }
    builder = GPTModelBuilder(gpt(outer={"transformer_layer_spec": spec}, **two))
    for vp_stage in (1, 0):
        builder.build_model(pg_collection, vp_stage=vp_stage)
    assert asked == [1, 0]


def test_a_partial_may_return_the_spec(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    spec = partial(gpt_layers.default_layer_spec, pp_rank=0)
    config = gpt(outer={"transformer_layer_spec": spec})
    assert attention_classes(config, pg_collection) == [TorchAttention] * 4


@pytest.mark.parametrize("given", [lambda config: None, lambda config: DotProductAttention, "local"])
def test_invalid_specs_are_refused(pg_collection: ProcessGroupCollection, gpt: GPT, given: object) -> None:
    with pytest.raises(LayerSpecError, match="transformer_layer_spec"):
        GPTModelBuilder(gpt(outer={"transformer_layer_spec": given})).build_model(pg_collection)


def test_local_attention_is_replaced_in_a_copy(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    spec = other_spec()
    before = repr(spec)
    config = gpt(outer={"transformer_layer_spec": spec}, attention_backend=AttnBackend.local)
    assert attention_classes(config, pg_collection) == [TorchAttention] * 4
    assert repr(spec) == before


def test_local_attention_is_replaced_in_every_layer_of_a_block(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    block = TransformerBlockSubmodules(layer_specs=[other_spec() for _ in range(4)], layer_norm=L2Norm)
    config = gpt(outer={"transformer_layer_spec": lambda config: block}, attention_backend=AttnBackend.local)
    assert attention_classes(config, pg_collection) == [TorchAttention] * 4
    assert repr(block.layer_specs) == repr([other_spec() for _ in range(4)])


def test_layers_without_attention_are_unchanged(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    backends = AttnBackend.auto, AttnBackend.local
    configs = [gpt(HeterogeneousTransformerConfig, attention_backend=backend) for backend in backends]
    specs = [gpt_layers.layer_spec(config, vp_stage=None, pp_rank=0) for config in configs]
    assert repr(specs[0]) == repr(specs[1])


def test_experts_take_precedence_over_heterogeneous_blocks(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    config = gpt(HeterogeneousTransformerConfig, num_moe_experts=2, moe_ffn_hidden_size=16, add_bias_linear=False)
    model: Any = GPTModelBuilder(config).build_model(pg_collection)
    assert all(isinstance(layer.mlp, MoELayer) for layer in model.decoder.layers)


def test_qk_l2_norm_is_applied(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    # megatron.training ignores qk_l2_norm for local layers that are all equal.
    model: Any = GPTModelBuilder(gpt(qk_l2_norm=True)).build_model(pg_collection)
    assert all(isinstance(layer.self_attention.q_layernorm, L2Norm) for layer in model.decoder.layers)


def test_without_multi_token_prediction_there_is_no_spec(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    config = gpt()
    spec = gpt_layers.layer_spec(config, vp_stage=None, pp_rank=0)
    assert gpt_layers.mtp_block_spec(config, spec, vp_stage=None, pp_rank=0) is None


@pytest.mark.parametrize(("frequency", "experts"), [([0, 0, 0, 1], True), ([1, 1, 1, 0], False)])
def test_multi_token_prediction_repeats_the_last_decoder_layer(
    pg_collection: ProcessGroupCollection, gpt: GPT, frequency: list[int], experts: bool
) -> None:
    moe = {"num_moe_experts": 2, "moe_ffn_hidden_size": 16, "add_bias_linear": False, "moe_layer_freq": frequency}
    model: Any = GPTModelBuilder(gpt(mtp_num_layers=1, **moe)).build_model(pg_collection)
    assert isinstance(model.mtp.layers[0].mtp_model_layer.mlp, MoELayer) == experts


class OtherLayer(TransformerLayer):
    """A layer given by the user."""


@pytest.mark.parametrize("as_block", [False, True])
def test_multi_token_prediction_repeats_a_given_layer(
    pg_collection: ProcessGroupCollection, gpt: GPT, as_block: bool
) -> None:
    layer = ModuleSpec(module=OtherLayer, submodules=get_gpt_layer_local_submodules())
    given = TransformerBlockSubmodules([layer] * 2, layer_norm=WrappedTorchNorm) if as_block else layer
    outer = {"transformer_layer_spec": (lambda _: given) if as_block else given, "position_embedding_type": "rope"}
    model = GPTModelBuilder(gpt(num_layers=2, mtp_num_layers=1, outer=outer)).build_model(pg_collection)
    (depth,) = model.mtp.layers
    assert type(depth.mtp_model_layer) is type(model.decoder.layers[-1]) is OtherLayer
    # The given layer is used unchanged; only the modules around it are Bridge's.
    assert type(depth.mtp_model_layer.self_attention.core_attention) is DotProductAttention
    assert isinstance(depth.hnorm, TorchNorm)


def test_a_stage_without_layers_predicts_with_the_default_layer(
    pg_collection: ProcessGroupCollection, gpt: GPT
) -> None:
    moe = {"num_moe_experts": 2, "moe_ffn_hidden_size": 16, "add_bias_linear": False, "moe_layer_freq": [1, 1, 1, 0]}
    config = gpt(mtp_num_layers=1, **moe)
    empty = TransformerBlockSubmodules(layer_specs=[])
    block = gpt_layers.mtp_block_spec(config, empty, vp_stage=None, pp_rank=0)
    assert block is not None
    assert block.layer_specs is not None
    layer: Any = block.layer_specs[0].submodules
    plain = with_pytorch_layers(get_gpt_layer_local_spec(num_experts=2), grouped_experts=False)
    assert repr(layer.mtp_model_layer) == repr(plain)


class MarkedProvider(LocalSpecProvider):
    """A provider of local modules, except the attention, which marks its use."""

    def core_attention(self) -> type:
        return OtherAttention


@pytest.fixture
def fake_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that Transformer Engine, which needs a GPU, is installed: only the choice of layers is real."""
    monkeypatch.setattr(choice, "HAVE_TE", True)
    monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", MarkedProvider)


EXPERTS = {"num_moe_experts": 2, "moe_ffn_hidden_size": 16, "add_bias_linear": False}


def test_megatron_specs_still_norm_uncompressed_queries(transformer: Transformer) -> None:
    parts: Any = get_gpt_layer_local_spec(qk_layernorm=True, multi_latent_attention=True).submodules
    config: Any = transformer(MLATransformerConfig, q_lora_rank=None, qk_layernorm=True)
    with pytest.raises(ValueError, match="q_lora_rank is None"):
        QKNormConfigResolver(config, parts.self_attention.submodules).resolve()


@without_te
@pytest.mark.usefixtures("fake_transformer_engine")
def test_transformer_engine_norms_of_uncompressed_queries_are_refused(gpt: GPT) -> None:
    config = gpt(MLATransformerConfig, q_lora_rank=None, qk_layernorm=True)
    with pytest.raises(UnsupportedError, match=r"set transformer\.transformer_impl to local"):
        gpt_layers.layer_spec(config, vp_stage=None, pp_rank=0)


@without_te
@pytest.mark.usefixtures("fake_transformer_engine")
@pytest.mark.parametrize("modelopt", [False, True])
@pytest.mark.parametrize(
    "inner",
    [{}, {"qk_layernorm": True}, EXPERTS, {**EXPERTS, "mtp_num_layers": 1}, {"mtp_num_layers": 1}],
)
def test_with_transformer_engine_layers_match_megatron_training(
    pg_collection: ProcessGroupCollection, transformer: Transformer, inner: dict[str, Any], modelopt: bool
) -> None:
    outer: dict[str, Any] = {"vocab_size": 96, "restore_modelopt_state": modelopt}
    megatron_config = MegatronGPTConfig(transformer=transformer(**inner), **outer)
    config = GPTModelConfig(transformer=transformer(**inner), **outer)
    expected = megatron_gpt.default_layer_spec(megatron_config, 0)
    chosen = gpt_layers.layer_spec(config, vp_stage=None, pp_rank=0)
    assert repr(chosen) == repr(expected)
    assert repr(gpt_layers.mtp_block_spec(config, chosen, vp_stage=None, pp_rank=0)) == repr(
        megatron_gpt.mtp_block_spec(megatron_config, expected)
    )


@without_te
@pytest.mark.usefixtures("fake_transformer_engine")
@pytest.mark.parametrize(("implementation", "attention"), [("transformer_engine", True), ("local", False)])
def test_local_layers_are_used_on_request(
    pg_collection: ProcessGroupCollection, gpt: GPT, implementation: str, attention: bool
) -> None:
    spec = gpt_layers.layer_spec(gpt(transformer_impl=implementation), vp_stage=None, pp_rank=0)
    assert ("OtherAttention" in repr(spec)) == attention


def test_layers_follow_the_given_rank(pg_collection: ProcessGroupCollection, gpt: GPT) -> None:
    moe = {"num_moe_experts": 2, "moe_ffn_hidden_size": 16, "add_bias_linear": False, "moe_layer_freq": [0, 0, 1, 1]}
    config = gpt(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, **moe)
    expected = get_gpt_decoder_block_spec(config.transformer, use_transformer_engine=False, pp_rank=1)
    assert repr(gpt_layers.default_layer_spec(config, pp_rank=1)) == repr(
        with_pytorch_layers(expected, grouped_experts=False)
    )
    assert repr(gpt_layers.default_layer_spec(config, pp_rank=0)) != repr(expected)


def test_attention_with_submodules_is_not_replaced() -> None:
    layer = other_spec()
    attention: Any = cast(Any, layer.submodules).self_attention
    attention.submodules.core_attention = ModuleSpec(module=OtherAttention, submodules=object())
    assert repr(with_pytorch_attention(layer)) == repr(layer)
    attention.submodules.core_attention = ModuleSpec(module=OtherAttention)
    swapped: Any = with_pytorch_attention([layer])[0].submodules
    assert swapped.self_attention.submodules.core_attention is TorchAttention
    assert attention.submodules.core_attention.module is OtherAttention
