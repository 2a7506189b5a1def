"""The layer specs of a T5: given or chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.T5 import t5_spec
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from bridge.models.backend import choice
from bridge.models.backend.attention import TorchAttention
from bridge.models.backend.norms import TorchRMSNorm
from bridge.models.errors import LayerSpecError, UnsupportedError
from bridge.models.t5 import T5ModelBuilder, T5ModelConfig

T5Factory = Callable[..., T5ModelConfig]

without_te = pytest.mark.skipif(HAVE_TE, reason="says what happens where Transformer Engine is not installed")

VOCAB = 96


def build(config: T5ModelConfig, pg_collection: ProcessGroupCollection) -> Any:
    return T5ModelBuilder(config).build_model(pg_collection)


class OtherAttention(DotProductAttention):
    """A stand-in for the attention of another backend."""


def with_other_attention(layer: ModuleSpec) -> ModuleSpec:
    """Replace the attention of a layer by OtherAttention."""
    parts: Any = layer.submodules
    for name in ("self_attention", "cross_attention"):
        if isinstance(attention := getattr(parts, name), ModuleSpec):
            submodules: Any = attention.submodules
            submodules.core_attention = OtherAttention
    return layer


def attention_classes(model: Any) -> dict[str, list[type]]:
    cross = [type(layer.cross_attention.core_attention) for layer in model.decoder.layers]
    both = {stack: getattr(model, stack).layers for stack in ("encoder", "decoder")}
    return {
        stack: [type(layer.self_attention.core_attention) for layer in layers] for stack, layers in both.items()
    } | {"cross": cross}


@without_te
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_default_layers_are_pytorch_layers(
    pg_collection: ProcessGroupCollection, t5: T5Factory, implementation: str
) -> None:
    model = build(t5(transformer_impl=implementation, normalization="RMSNorm"), pg_collection)
    ours = [TorchAttention] * 2
    assert attention_classes(model) == {"encoder": ours, "decoder": ours, "cross": ours}
    norms = [module for name, module in model.named_modules() if "layernorm" in name and list(module.parameters())]
    assert {type(norm) for norm in norms} == {TorchRMSNorm}
    assert len(norms) == 2 * 2 + 1 + 2 * 3 + 1


def test_given_layers_are_used(pg_collection: ProcessGroupCollection, t5: T5Factory) -> None:
    asked = []

    def encoder(config: T5ModelConfig) -> TransformerBlockSubmodules:
        asked.append(config)
        layers = [with_other_attention(t5_spec.encoder_model_with_local_spec()) for _ in range(3)]
        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=t5_spec.LNImpl)

    config = t5(outer={"encoder_layer_spec": encoder})
    assert attention_classes(build(config, pg_collection)) == {
        "encoder": [OtherAttention] * 3,
        "decoder": [TorchAttention] * 2,
        "cross": [TorchAttention] * 2,
    }
    assert asked == [config]
    config = t5(outer={"decoder_layer_spec": with_other_attention(t5_spec.decoder_model_with_local_spec())})
    assert attention_classes(build(config, pg_collection))["cross"] == [OtherAttention] * 2


def test_local_self_and_cross_attention_are_replaced_in_given_layers(
    pg_collection: ProcessGroupCollection, t5: T5Factory
) -> None:
    given = with_other_attention(t5_spec.decoder_model_with_local_spec())
    before = repr(given)
    config = t5(outer={"decoder_layer_spec": given}, attention_backend=AttnBackend.local)
    assert attention_classes(build(config, pg_collection)) == dict.fromkeys(
        ("encoder", "decoder", "cross"), [TorchAttention] * 2
    )
    assert repr(given) == before


@pytest.mark.parametrize("field", ["encoder_layer_spec", "decoder_layer_spec"])
@pytest.mark.parametrize("given", [lambda config: None, "local"])
def test_invalid_specs_are_refused(
    pg_collection: ProcessGroupCollection, t5: T5Factory, field: str, given: object
) -> None:
    with pytest.raises(LayerSpecError, match=field):
        build(t5(outer={field: given}), pg_collection)


class FakeModule:
    """A stand-in for a module of Transformer Engine, which needs a GPU."""


@without_te
@pytest.mark.parametrize("backend", [AttnBackend.auto, AttnBackend.local])
def test_with_transformer_engine_megatron_layers_are_used(
    pg_collection: ProcessGroupCollection, t5: T5Factory, monkeypatch: pytest.MonkeyPatch, backend: AttnBackend
) -> None:
    from bridge.models.t5 import layers as t5_layers

    monkeypatch.setattr(choice, "HAVE_TE", True)
    parts = [name for name in vars(t5_spec) if name.startswith("TE")]
    for name in parts:
        monkeypatch.setattr(t5_spec, name, type(name, (FakeModule,), {}))
    config = t5(outer={"encoder_num_layers": 3}, attention_backend=backend)
    encoder, decoder = t5_layers.encoder_layer_spec(config), t5_layers.decoder_layer_spec(config)
    expected = [
        t5_spec.get_t5_encoder_with_transformer_engine_block_spec(3),
        t5_spec.get_t5_decoder_with_transformer_engine_block_spec(2),
    ]
    te, pytorch = repr(t5_spec.TEDotProductAttention), repr(TorchAttention)
    wanted = [repr(spec).replace(te, pytorch) if backend == AttnBackend.local else repr(spec) for spec in expected]
    assert [repr(encoder), repr(decoder)] == wanted


HETEROGENEOUS = {"num_layers": 4}  # as many as the blocks of the fixture

UNSUPPORTED: dict[str, tuple[type[TransformerConfig], dict[str, Any], str]] = {
    "experts": (TransformerConfig, {"num_moe_experts": 2, "add_bias_linear": False}, "num_moe_experts to null"),
    "latent attention": (MLATransformerConfig, {"multi_latent_attention": True}, "embed a plain TransformerConfig"),
    "blocks": (HeterogeneousTransformerConfig, HETEROGENEOUS, "embed a plain TransformerConfig"),
    "query and key norms": (TransformerConfig, {"qk_layernorm": True}, "qk_layernorm and .* to false"),
    "L2-normalised queries and keys": (TransformerConfig, {"qk_l2_norm": True}, "qk_l2_norm to false"),
    "windows": (TransformerConfig, {"window_size": (4, 0)}, "window_size to null"),
    "fusions": (TransformerConfig, {"use_transformer_engine_op_fuser": True}, "use_transformer_engine_op_fuser"),
    "multi-token prediction": (TransformerConfig, {"mtp_num_layers": 1}, "mtp_num_layers to null"),
    "µP": (TransformerConfig, {"use_mup": True}, "use_mup to false"),
    "gates": (TransformerConfig, {"attention_output_gate": True}, "attention_output_gate to false"),
    "inference": (
        TransformerConfig,
        {"transformer_impl": "inference_optimized", "normalization": "RMSNorm", "add_bias_linear": False},
        "transformer_impl to transformer_engine or local",
    ),
    "linear attention": (
        TransformerConfig,
        {"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": 2},
        "experimental_attention_variant to null",
    ),
    "persistent norms": (TransformerConfig, {"persist_layer_norm": True}, "persist_layer_norm to false"),
}


@without_te
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_ignored_options_are_refused(pg_collection: ProcessGroupCollection, t5: T5Factory, case: str) -> None:
    cls, inner, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedError, match=f"(?s)not supported by.*{message}"):
        build(t5(cls, **inner), pg_collection)


def test_options_are_accepted_with_given_layers(pg_collection: ProcessGroupCollection, t5: T5Factory) -> None:
    outer = {
        "encoder_layer_spec": with_other_attention(t5_spec.encoder_model_with_local_spec()),
        "decoder_layer_spec": with_other_attention(t5_spec.decoder_model_with_local_spec()),
    }
    build(t5(outer=outer, window_size=(4, 0)), pg_collection)


@without_te
def test_megatron_local_t5_layers_still_lack_final_norm_and_relative_positions(
    pg_collection: ProcessGroupCollection, t5: T5Factory
) -> None:
    """If this fails, Megatron's local layers can replace Bridge's."""
    config = t5()
    model = T5Model(
        config=config.transformer,
        encoder_config=config.transformer,
        transformer_encoder_layer_spec=cast(ModuleSpec, t5_spec.get_t5_encoder_with_local_block_spec(2)),
        transformer_decoder_layer_spec=cast(ModuleSpec, t5_spec.get_t5_decoder_with_local_block_spec(2)),
        vocab_size=VOCAB,
        max_sequence_length=16,
        position_embedding_type="relative",
        pg_collection=pg_collection,
    )
    assert model.encoder.final_layernorm is None
    tokens = torch.arange(6).view(1, 6)
    with pytest.raises(AssertionError, match="Attention bias is not supported"):
        model(tokens, tokens, None, None, None)
