"""Mamba and hybrid models on one process; test_backend_layouts.py and tests/test_matrix.py cover layouts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig
from ranks import run_ranks
from torch.nn.functional import softplus
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from bridge.config import ModelConfig
from bridge.dist.cpu import cpu_runtime
from bridge.dist.engine.weights import draw_weights
from bridge.models.backend.attention import TorchAttention
from bridge.models.backend.mixer import TorchMambaMixer, WrappableMambaMixer, has_mamba_kernels
from bridge.models.errors import LayerSpecError, ModelConfigError, UnsupportedError
from bridge.models.mamba import MambaModelBuilder, MambaModelConfig
from bridge.models.mamba.layers import default_stack_spec, pytorch_stack_spec, stack_spec

HybridFactory = Callable[..., MambaModelConfig]


@pytest.fixture(scope="module", autouse=True)
def _on_cpu(pg_collection: ProcessGroupCollection) -> Iterator[None]:
    with cpu_runtime():
        yield


@pytest.fixture(scope="session")
def hybrid(transformer: Callable[..., Any]) -> HybridFactory:
    """Return a function that makes small hybrid configs from a pattern and fields of the transformer."""

    def make(pattern: str | None = "M*-E", *, outer: dict[str, Any] | None = None, **given: Any) -> MambaModelConfig:
        sizes: dict[str, Any] = {
            "num_layers": len(pattern.replace("|", "")) if pattern else 2,
            "is_hybrid_model": True,
            "mamba_state_dim": 8,
            "mamba_head_dim": 8,
            "mamba_num_groups": 2,
            "num_moe_experts": 2,
            "moe_grouped_gemm": True,
            "add_bias_linear": False,
            "use_cpu_initialization": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        return MambaModelConfig(
            transformer=transformer(**sizes | given),
            **{"hybrid_layer_pattern": pattern, "vocab_size": 96, "seq_length": 32} | (outer or {}),
        )

    return make


def build(config: MambaModelConfig, groups: ProcessGroupCollection) -> Any:
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return MambaModelBuilder(config).build_model(groups)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    return found


# --- Layers


def test_each_symbol_gives_its_layer(hybrid: HybridFactory, pg_collection: ProcessGroupCollection) -> None:
    layers = build(hybrid("M*-E"), pg_collection).decoder.layers
    assert isinstance(layers[0].mixer, TorchMambaMixer)
    parts = [{name.split(".")[0] for name, _ in layer.named_parameters()} for layer in layers]
    assert parts == [
        {"mixer", "norm"},
        {"input_layernorm", "self_attention"},
        {"pre_mlp_layernorm", "mlp"},
        {"pre_mlp_layernorm", "mlp"},
    ]
    assert hasattr(layers[3].mlp, "router")
    assert not hasattr(layers[2].mlp, "router")


def test_without_a_pattern_all_layers_are_mamba(hybrid: HybridFactory, pg_collection: ProcessGroupCollection) -> None:
    layers = build(hybrid(None), pg_collection).decoder.layers
    assert [isinstance(layer.mixer, TorchMambaMixer) for layer in layers] == [True, True]


@pytest.mark.parametrize("pattern", ["M", "*", "M*-E"])
def test_the_model_is_causal(hybrid: HybridFactory, pg_collection: ProcessGroupCollection, pattern: str) -> None:
    model = build(hybrid(pattern), pg_collection)
    tokens = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[:, 11] += 1
    difference = (logits(model, tokens) - logits(model, changed % 96)).abs().amax(dim=(0, 2))
    assert difference[:11].max() < 1e-6
    assert difference[11:].max() > 1e-4


def test_the_mixer_matches_transformers(hybrid: HybridFactory, pg_collection: ProcessGroupCollection) -> None:
    # Megatron orders the projections like the published code of Mamba-2, and so does transformers.
    bridge_mixer = build(hybrid("M"), pg_collection).decoder.layers[0].mixer
    config = Mamba2Config(
        num_heads=8, head_dim=8, hidden_size=32, state_size=8, expand=2, n_groups=2, chunk_size=16, use_bias=False
    )
    transformers_mixer: Any = Mamba2Mixer(config, layer_idx=0)
    weights = {name.replace("conv1d_", "conv1d."): value for name, value in bridge_mixer.state_dict().items()}
    transformers_mixer.load_state_dict({name: value for name, value in weights.items() if value is not None})
    x = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(3))
    found, _ = bridge_mixer(x.transpose(0, 1).contiguous())
    torch.testing.assert_close(found.transpose(0, 1), transformers_mixer(x), rtol=1e-4, atol=1e-5)


def test_evaluation_matches_training(hybrid: HybridFactory, pg_collection: ProcessGroupCollection) -> None:
    tokens = torch.randint(96, (1, 20), generator=torch.Generator().manual_seed(2))
    trained = logits(build(hybrid("MM"), pg_collection), tokens)
    # Without the memory-efficient path, Megatron's mixer computes the steps separately.
    scored = logits(build(hybrid("MM", use_mamba_mem_eff_path=False), pg_collection), tokens)
    torch.testing.assert_close(scored, trained)


def test_packed_sequences_and_generation_are_refused(
    hybrid: HybridFactory, pg_collection: ProcessGroupCollection
) -> None:
    mixer = build(hybrid("M"), pg_collection).decoder.layers[0].mixer
    x = torch.zeros(4, 1, 32)
    with pytest.raises(UnsupportedError, match="packed sequences: install mamba-ssm"):
        mixer(x, packed_seq_params=PackedSeqParams(qkv_format="thd"))
    with pytest.raises(UnsupportedError, match="token-by-token generation"):
        mixer._ssm_prefill(x, conv_state=torch.zeros(1), ssm_state=torch.zeros(1))


def test_megatron_layers_still_need_missing_libraries(
    hybrid: HybridFactory, pg_collection: ProcessGroupCollection
) -> None:
    # If these succeed, megatron-core has changed: remove TorchMambaMixer's context and TorchHybridStack.
    config = hybrid("M")
    assert not has_mamba_kernels()
    with pytest.raises(ImportError, match="MambaSSM is not installed"):
        MambaMixer(config.transformer, mamba_mixer.MambaMixerSubmodules(), 32, pg_collection=pg_collection)
    spec = pytorch_stack_spec(config.transformer)
    config.hybrid_stack_spec = dataclasses.replace(spec, module=HybridStack)
    with pytest.raises(Exception, match=r"(?i)transformer.?engine|TENorm"):
        build(config, pg_collection)


def test_installed_kernels_are_used(
    hybrid: HybridFactory, pg_collection: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the choice is tested; no kernel runs.
    monkeypatch.setattr(mamba_mixer, "HAVE_MAMBA_SSM", True)
    monkeypatch.setattr(mamba_mixer, "causal_conv1d_fn", lambda: None)
    spec: Any = stack_spec(hybrid("M"))
    assert spec.submodules.mamba_layer.submodules.mixer.module is WrappableMambaMixer
    monkeypatch.setattr(mamba_mixer, "causal_conv1d_fn", None)
    spec = stack_spec(hybrid("M"))
    assert spec.submodules.mamba_layer.submodules.mixer.module is TorchMambaMixer


def test_replaced_parameters_get_gradients(hybrid: HybridFactory, pg_collection: ProcessGroupCollection) -> None:
    mixer = build(hybrid("M"), pg_collection).decoder.layers[0].mixer
    names = ["A_log", "D", "dt_bias", "conv1d_weight", "conv1d_bias"]
    for name in names:  # like torch FSDP2
        setattr(mixer, name, torch.nn.Parameter(getattr(mixer, name).detach().clone()))
    x = torch.randn(8, 1, 32, generator=torch.Generator().manual_seed(3))
    forward_of_megatron = super(WrappableMambaMixer, mixer).forward
    forward_of_megatron(x)[0].square().sum().backward()
    assert [getattr(mixer, name).grad for name in names] == [None] * 5  # if this fails, remove the lookup
    mixer(x)[0].square().sum().backward()
    assert all(getattr(mixer, name).grad.abs().max() > 0 for name in names)


def test_initial_vectors_are_within_megatrons_ranges(
    hybrid: HybridFactory, pg_collection: ProcessGroupCollection
) -> None:
    model = build(hybrid("M", mamba_num_heads=512, mamba_head_dim=4), pg_collection)
    mixer = model.decoder.layers[0].mixer
    built = {name: getattr(mixer, name).detach().clone() for name in mixer.initialisers}
    draw_weights([model], pg_collection, vocab_size=96)
    drawn = {name: getattr(mixer, name).detach() for name in mixer.initialisers}
    for name, before in built.items():
        assert not torch.equal(drawn[name], before)
        torch.testing.assert_close(drawn[name].mean(), before.mean(), rtol=0.05, atol=0.05)
        torch.testing.assert_close(drawn[name].std(), before.std(), rtol=0.1, atol=0)
    # Ranges of the initial values: decay rates 1 to 16, time steps 0.001 to 0.1, and a convolution of width 4.
    assert {round(bound.item()) for bound in drawn["A_log"].exp().aminmax()} == {1, 16}
    smallest, largest = softplus(drawn["dt_bias"]).aminmax()
    assert 0.001 <= smallest < 0.0011
    assert 0.09 < largest <= 0.1
    assert 0.49 < drawn["conv1d_weight"].abs().max() <= 0.5


def train_on_long_sequences() -> tuple[int, list[float], list[float | None]]:
    """Train a hybrid on sequences of 4,096 tokens; return the number of parameters, losses and gradient norms."""
    from bridge.config import Document
    from bridge.dist import create_process_groups
    from bridge.dist.job import BuildJob
    from bridge.dist.run.execute import build_and_train
    from bridge.dist.train.step import TrainOptions
    from bridge.dist.train.text import find_default_text
    from bridge.dist.wrapper import Wrapper

    sizes = {"hidden_size": 384, "ffn_hidden_size": 1024, "moe_ffn_hidden_size": 512, "mamba_head_dim": 64}
    overrides = [f"transformer.{name}={size}" for name, size in sizes.items()]
    document = Document.load("hybrid-tiny", [*overrides, "transformer.mamba_state_dim=64", "seq_length=4096"])
    options = TrainOptions(steps=1, text=find_default_text(), seq_length=4096, global_batch_size=1)
    job = BuildJob(document=document.data, wrapper=Wrapper.DDP, training=options)
    config = ModelConfig.from_dict(job.document)
    layout = job.check(config, 1)
    run = build_and_train(job, config, layout, create_process_groups(layout))
    parameters = sum(parameter.numel() for parameter in run.stages[0].parameters())
    return parameters, [step.loss for step in run.steps], [step.grad_norm for step in run.steps]


def test_a_sequence_of_4096_tokens_trains() -> None:
    ((parameters, losses, grad_norms),) = run_ranks(train_on_long_sequences, 1)
    assert parameters > 10_000_000
    assert losses == [pytest.approx(math.log(256), rel=0.1)]
    assert all(norm is not None and 0 < norm < 100 for norm in grad_norms)


# --- Stack specs


def count_layers(config: MambaModelConfig) -> ModuleSpec:
    assert config.transformer.num_layers == 1
    return pytorch_stack_spec(config.transformer)


def test_a_stack_spec_may_be_a_value_or_a_function(
    hybrid: HybridFactory, pg_collection: ProcessGroupCollection
) -> None:
    spec = pytorch_stack_spec(hybrid("M").transformer)
    for given in (spec, lambda: spec, count_layers, default_stack_spec, partial(count_layers)):
        model = build(hybrid("M", outer={"hybrid_stack_spec": given}), pg_collection)
        assert type(model.decoder.layers[0].mixer) is TorchMambaMixer


@pytest.mark.parametrize("backend", [AttnBackend.auto, AttnBackend.local])
def test_local_attention_is_replaced_in_a_given_stack(
    hybrid: HybridFactory, pg_collection: ProcessGroupCollection, backend: AttnBackend
) -> None:
    spec = pytorch_stack_spec(hybrid("M*").transformer)
    layer = spec.submodules.attention_layer
    attention = layer.submodules.self_attention
    parts = dataclasses.replace(attention.submodules, core_attention=DotProductAttention)
    parts = dataclasses.replace(layer.submodules, self_attention=dataclasses.replace(attention, submodules=parts))
    parts = dataclasses.replace(spec.submodules, attention_layer=dataclasses.replace(layer, submodules=parts))
    given = {"hybrid_stack_spec": dataclasses.replace(spec, submodules=parts)}
    model = build(hybrid("M*", attention_backend=backend, outer=given), pg_collection)
    expected = TorchAttention if backend is AttnBackend.local else DotProductAttention
    assert type(model.decoder.layers[1].self_attention.core_attention) is expected


@pytest.mark.parametrize(
    ("given", "says"),
    [(lambda: None, "returned None: it must return"), ("x", "hybrid_stack_spec is 'x': set it to a ModuleSpec")],
)
def test_invalid_stack_specs_are_refused(
    hybrid: HybridFactory, pg_collection: ProcessGroupCollection, given: Any, says: str
) -> None:
    with pytest.raises(LayerSpecError, match=says):
        build(hybrid("M", outer={"hybrid_stack_spec": given}), pg_collection)


def test_layers_that_need_transformer_engine_are_refused(
    hybrid: HybridFactory, pg_collection: ProcessGroupCollection
) -> None:
    with pytest.raises(ModelConfigError, match=r"gated delta net \(G\): they require Transformer Engine") as error:
        build(hybrid("M*GM"), pg_collection)
    assert str(error.value).endswith("\n  M*GM\n    ^")
    with pytest.raises(UnsupportedError, match="multi-token prediction"):
        build(hybrid("MM", num_layers=2, mtp_num_layers=1, outer={"hybrid_layer_pattern": "MM/M"}), pg_collection)


# --- Configuration


@pytest.mark.parametrize(
    ("pattern", "given", "says"),
    [
        ("M*", {"num_layers": 3}, "has 2 layers, but transformer.num_layers = 3"),
        ("ME", {"num_moe_experts": None}, "set transformer.num_moe_experts"),
        ("MM", {"mtp_num_layers": 1}, "has 0 MTP depths .*, but transformer.mtp_num_layers = 1"),
        ("MMM", {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}, "do not divide into 2 equal"),
        ("M|M|M", {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}, "3 stages, the pipeline has 2"),
        (
            "MMM",
            {
                "pipeline_model_parallel_size": 2,
                "pipeline_dtype": torch.float32,
                "num_layers_in_first_pipeline_stage": 1,
            },
            "hybrid models do not support transformer.num_layers_in_first_pipeline_stage",
        ),
        ("M", {"mamba_head_dim": 24}, r"must divide 2 \* hidden_size = 64, got 24"),
        ("M", {"mamba_num_groups": 3}, "mamba_num_groups: must divide the number of Mamba heads, 8, got 3"),
        ("M", {"mamba_state_dim": 0}, "mamba_state_dim: must be at least 1, got 0"),
        ("M", {"is_hybrid_model": False}, "is_hybrid_model: must be true"),
        ("M+", {}, r"multi_latent_attention: is false, but .* has latent attention \(\+ or D\)"),
        ("M*", {"experimental_attention_variant": "dsa"}, r"is dsa, but hybrid_layer_pattern M\* has no such layer"),
    ],
)
def test_invalid_models_are_refused(hybrid: HybridFactory, pattern: str, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelConfigError, match=says):
        hybrid(pattern, **given).finalize()


def test_plain_attention_in_an_mla_transformer_is_refused() -> None:
    transformer = MLATransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, multi_latent_attention=True, is_hybrid_model=True
    )
    config = MambaModelConfig(transformer=transformer, vocab_size=96, hybrid_layer_pattern="M*")
    with pytest.raises(ModelConfigError, match=r"multi_latent_attention: is true, but .* has plain attention \(\*\)"):
        config.validate()


def build_virtual_stages() -> list[tuple[list[int], list[str]]]:
    """Build two virtual stages on each of two ranks; return the numbers and the first modules of their layers."""
    from bridge.config import load_config
    from bridge.dist import Layout, create_process_groups
    from bridge.dist.engine.placement import list_layer_indices

    split = {
        "hybrid_layer_pattern": "M|*-E|M|-",
        "transformer.num_layers": 6,
        "transformer.pipeline_model_parallel_size": 2,
        "transformer.virtual_pipeline_model_parallel_size": 2,
        "transformer.overlap_p2p_comm": "true",
        "transformer.batch_p2p_comm": "false",
        "transformer.pipeline_dtype": "torch.float32",
    }
    config: Any = load_config("hybrid-tiny", [f"{name}={value}" for name, value in split.items()])
    groups = create_process_groups(Layout.of(config.transformer, 2))
    model_parallel_cuda_manual_seed(1)
    stages = config.get_builder_cls()(config).build_distributed_models(groups, wrap_with_ddp=False)
    return [
        (list_layer_indices(stage), [next(iter(layer.named_children()))[0] for layer in stage.decoder.layers])
        for stage in stages
    ]


def test_uneven_virtual_stages_get_their_layers() -> None:
    # Layers go to the first virtual stages of all ranks, then to the second ones.
    found = run_ranks(build_virtual_stages, 2)
    assert [[numbers for numbers, _ in stages] for stages in found] == [[[0], [4]], [[1, 2, 3], [5]]]
    assert [[parts for _, parts in stages] for stages in found] == [
        [["mixer"], ["mixer"]],
        [["input_layernorm", "input_layernorm", "input_layernorm"], ["input_layernorm"]],
    ]


def test_documents_keep_every_field(hybrid: HybridFactory) -> None:
    config = hybrid("M*-E", outer={"hybrid_stack_spec": default_stack_spec, "rotary_base": 500})
    written = json.loads(json.dumps(config.as_dict()))
    assert written["_target_"] == "bridge.models.mamba.MambaModelConfig"
    read = ModelConfig.from_dict(written)
    assert isinstance(read, MambaModelConfig)
    assert read.hybrid_stack_spec is default_stack_spec
    assert read.as_dict() == written


def test_older_field_names_are_migrated(hybrid: HybridFactory) -> None:
    document = hybrid("MM", outer={"hybrid_stack_spec": default_stack_spec}).as_dict()
    document["hybrid_override_pattern"] = document.pop("hybrid_layer_pattern")
    document["mamba_stack_spec"] = document.pop("hybrid_stack_spec")
    document |= {"hybrid_attention_ratio": 0.0, "hybrid_mlp_ratio": 0.0}
    document["_version_"] = 1
    read = ModelConfig.from_dict(document)
    assert isinstance(read, MambaModelConfig)
    assert read.hybrid_layer_pattern == "MM"
    assert read.hybrid_stack_spec is default_stack_spec
    with pytest.raises(Exception, match=r"hybrid_mlp_ratio(.|\n)*pattern_from_ratios"):
        ModelConfig.from_dict(document | {"hybrid_mlp_ratio": 0.5})
