"""megatron.training and Bridge build equal models from each other's files: parameters have the same names and shapes.

The models of the installed megatron.training are built on one process without Transformer Engine, from its local layers
(`transformer_impl: local`). It has no local layers for hybrid models, and those for multi-latent attention fail in
megatron-core 0.19.2 (DotProductAttention has no argument k_channels). These models get Bridge's layers; the tests then
compare the order, number and sizes of the layers, the embedding, the norm and the output layer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any, cast

import pytest
import yaml
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from bridge.config import Document, ModelConfig
from bridge.config.canonical import canonicalize
from bridge.config.foreign.run_config import to_run_config
from bridge.config.megatron_lm import to_megatron_lm
from bridge.dist.cpu import cpu_runtime
from bridge.models.gpt import GPTModelConfig
from bridge.models.gpt.layers import layer_spec
from bridge.models.mamba import MambaModelConfig
from bridge.models.mamba.layers import stack_spec

pytest.importorskip("omegaconf")
megatron_gpt = pytest.importorskip("megatron.training.models.gpt")
megatron_hybrid = pytest.importorskip("megatron.training.models.hybrid")
arguments = pytest.importorskip("megatron.training.arguments")

from megatron.core.models.T5.t5_model import T5Model  # noqa: E402
from megatron.core.models.T5.t5_spec import (  # noqa: E402
    get_t5_decoder_with_local_block_spec,
    get_t5_encoder_with_local_block_spec,
)
from megatron.training.argument_utils import (  # noqa: E402
    core_transformer_config_from_args,
    gpt_config_from_args,
    hybrid_config_from_args,
)
from megatron.training.config.instantiate_utils import instantiate  # noqa: E402
from megatron.training.config.yaml_utils import safe_yaml_representers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def _cpu() -> Iterator[None]:
    with cpu_runtime():
        model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
        yield


SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "use_cpu_initialization": True,
    "transformer_impl": "local",
    "attention_backend": "unfused",
    "add_bias_linear": False,
}
TOP: dict[str, Any] = {"vocab_size": 100, "should_pad_vocab": True, "seq_length": 32, "position_embedding_type": "rope"}


def make_config(cls: Any, transformer: Any = TransformerConfig, *, top: dict[str, Any], **given: Any) -> Any:
    from megatron.core.transformer.enums import AttnBackend

    values = SMALL | {"attention_backend": AttnBackend.unfused} | given
    return cls(transformer=transformer(**values), **TOP | top)


def silu() -> Any:
    import torch

    return torch.nn.functional.silu


def make_configs(gpt: Any, hybrid: Any) -> dict[str, Any]:
    """Return configs of all families, of the classes of Bridge or megatron.training."""
    mla = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16}
    experts = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32, "moe_layer_freq": [0, 1], "moe_router_topk": 2}
    return {
        "dense": make_config(
            gpt,
            top={"share_embeddings_and_output_weights": True},
            activation_func=silu(),
            gated_linear_unit=True,
            num_query_groups=2,
            ffn_hidden_size=96,
        ),
        "learned": make_config(gpt, top={"position_embedding_type": "learned_absolute"}, add_bias_linear=True),
        "moe": make_config(gpt, top={}, moe_shared_expert_intermediate_size=48, **experts),
        "mla": make_config(gpt, MLATransformerConfig, top={}, multi_latent_attention=True, **mla),
        "hybrid": make_config(
            hybrid,
            top={"hybrid_layer_pattern": "M*-ME", "position_embedding_type": "none"},
            num_layers=5,
            hidden_size=128,
            mamba_num_groups=2,
            is_hybrid_model=True,
            num_moe_experts=4,
            moe_ffn_hidden_size=32,
        ),
    }


NAMES = ["dense", "learned", "moe", "mla", "hybrid"]


def parameter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def build_shapes(config: Any, groups: ProcessGroupCollection) -> dict[str, tuple[int, ...]]:
    if isinstance(config, megatron_hybrid.HybridModelConfig):
        bridge_config = MambaModelConfig(
            transformer=config.transformer, hybrid_layer_pattern=config.hybrid_layer_pattern, vocab_size=100
        )
        config = replace(config, hybrid_stack_spec=stack_spec(bridge_config))
    elif isinstance(config, megatron_gpt.GPTModelConfig) and config.transformer.multi_latent_attention:
        gpt = GPTModelConfig(transformer=config.transformer, vocab_size=100)
        config = replace(config, transformer_layer_spec=layer_spec(gpt, vp_stage=None, pp_rank=0))
    return parameter_shapes(config.get_builder_cls()(config).build_model(groups, True, True))


def write_run_config(config: Any) -> Any:
    """Return the run_config.yaml that megatron.training writes, parsed."""
    with safe_yaml_representers():
        return yaml.safe_load(yaml.safe_dump({"model": config.as_dict(), "train": {"train_iters": 5}}))


@pytest.mark.parametrize("name", NAMES)
def test_megatron_training_builds_written_run_configs(name: str, pg_collection: ProcessGroupCollection) -> None:
    bridge_config = make_configs(GPTModelConfig, MambaModelConfig)[name]
    written = yaml.safe_load(Document(to_run_config(canonicalize(bridge_config.as_dict())).data).to_yaml())
    megatron_config = instantiate(written)
    megatron_config.builder = written["_builder_"]
    assert type(megatron_config).__module__.startswith("megatron.training.models.")
    assert build_shapes(megatron_config, pg_collection) == build_shapes(bridge_config, pg_collection)


@pytest.mark.parametrize("name", NAMES)
def test_run_configs_of_megatron_training_are_built(name: str, pg_collection: ProcessGroupCollection) -> None:
    megatron_config = make_configs(megatron_gpt.GPTModelConfig, megatron_hybrid.HybridModelConfig)[name]
    document = Document(write_run_config(megatron_config))
    document.check()
    overrides = ["transformer.activation_func=silu"] if megatron_config.transformer.gated_linear_unit else []
    document.override(overrides)
    bridge_config = document.config()
    assert type(bridge_config).__module__.startswith("bridge.models.")
    assert build_shapes(bridge_config, pg_collection) == build_shapes(megatron_config, pg_collection)


# Arguments of Megatron-LM.

COMMON_ARGUMENTS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 64 "
    "--micro-batch-size 1 --train-iters 1 --lr 1e-4 --vocab-size 100 --use-cpu-initialization "
    "--transformer-impl local --attention-backend unfused "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm "
)
COMMANDS = {
    "gpt2": "",
    "llama": (
        "--swiglu --group-query-attention --num-query-groups 2 --normalization RMSNorm --disable-bias-linear "
        "--position-embedding-type rope --rotary-base 500000 --use-rope-scaling --bf16 "
        "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --norm-epsilon 1e-6 "
        "--no-rope-fusion --init-method-std 0.01"
    ),
    "moe": (
        "--num-experts 4 --moe-ffn-hidden-size 32 --moe-layer-freq [0]+[1] --moe-router-topk 2 --disable-bias-linear "
        "--moe-shared-expert-intermediate-size 48 --squared-relu --use-rotary-position-embeddings --no-rope-fusion "
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"
    ),
    "mla": (
        "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 "
        "--v-head-dim 16 --position-embedding-type rope --rope-type rope --disable-bias-linear --no-rope-fusion"
    ),
    "yarn": (
        "--position-embedding-type yarn --rotary-scaling-factor 32 --yarn-original-max-position-embeddings 16 "
        "--yarn-beta-fast 16 --swiglu"
    ),
    "hybrid": (
        "--hybrid-layer-pattern M*-M --mamba-num-groups 1 --position-embedding-type none --disable-bias-linear --bf16 "
        "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec"
    ),
}


def parse_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, common: str = COMMON_ARGUMENTS
) -> Any:
    args = parse_words((common + command).split(), monkeypatch, capsys)
    args.padded_vocab_size = 128  # the setup of training sets it from the tokenizer
    return args


def parse_words(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    args = arguments.parse_args()
    arguments.validate_args(args)
    capsys.readouterr()
    return args


def is_equal(value: Any, other: Any) -> bool:
    if isinstance(value, partial) and isinstance(other, partial):
        return (value.func, value.args, value.keywords) == (other.func, other.args, other.keywords)
    return bool(value == other) and type(value) is type(other)


def differing_values(config: Any, other: Any) -> dict[str, Any]:
    """Return different values of fields that both configs have; Megatron-LM sets attributes that are not fields."""
    names = vars(config).keys() & {one.name for one in fields(other)} - {"transformer"}
    pairs = {name: (getattr(config, name), getattr(other, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if not is_equal(*pair)}


@pytest.mark.parametrize("name", COMMANDS)
def test_converted_megatron_arguments_build_the_model_of_megatron(
    name: str,
    pg_collection: ProcessGroupCollection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = parse_command(COMMANDS[name], monkeypatch, capsys)
    data = json.loads(json.dumps(vars(args), default=str))
    document = Document(data)
    document.check()
    bridge_config: Any = document.config()
    args.spec = None  # it names layers of Transformer Engine, which megatron.training cannot import here
    megatron_config = (hybrid_config_from_args if name == "hybrid" else gpt_config_from_args)(args)
    assert vars(megatron_config.transformer).keys() <= {one.name for one in fields(bridge_config.transformer)}
    assert differing_values(megatron_config.transformer, bridge_config.transformer) == {}
    assert differing_values(megatron_config, bridge_config).keys() <= {"extra_checkpoint_metadata"}
    assert build_shapes(bridge_config, pg_collection) == build_shapes(megatron_config, pg_collection)
    assert ModelConfig.from_dict(bridge_config.as_dict()).as_dict() == bridge_config.as_dict()


# Layouts, and values for every kind of option: switches, negated switches, lists, enumerations, patterns.
LAYOUTS = {
    "llama-3.1-8b": "",
    "llama-3.1-70b": (
        "tensor_model_parallel_size=2 pipeline_model_parallel_size=4 virtual_pipeline_model_parallel_size=5 "
        "sequence_parallel=true overlap_p2p_comm=true batch_p2p_comm=false pipeline_dtype=bfloat16 "
        "recompute_granularity=selective recompute_modules=[core_attn,mlp]"
    ),
    "mixtral-8x7b": (
        "moe_router_load_balancing_type=[aux_loss,seq_aux_loss] moe_aux_loss_coeff=[0.01,0.001] "
        "bias_activation_fusion=true"
    ),
    "deepseek-v3": "attention_backend=unfused mtp_num_layers=1",
    "gpt2-124m": "layernorm_epsilon=1e-6",
    "gpt-oss-20b": "window_attn_skip_freq=[1,0,0,1] num_layers=4",
    "qwen2.5-7b": "fp16=true bf16=false params_dtype=float16",
}
DERIVED = ["pipeline_dtype", "cp_comm_type", "use_cpu_initialization", "yarn_mscale", "yarn_mscale_all_dim"]
DERIVED += ["tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"]


@pytest.mark.parametrize("preset", LAYOUTS)
def test_written_arguments_make_the_config_of_megatron(
    preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = Document.load(preset, [f"transformer.{override}" for override in LAYOUTS[preset].split()])
    if preset == "qwen2.5-7b":
        document.override(["should_pad_vocab=true", "make_vocab_size_divisible_by=64"])
    words = [word for argument in to_megatron_lm(document.data).words for word in argument]
    transformer = document.data["transformer"]
    monkeypatch.setenv("WORLD_SIZE", str(8 if "tensor_model_parallel_size" in transformer else 1))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # The checks ask for these.
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("megatron.training.arguments.get_device_arch_version", lambda: 9)
    args = parse_words([*words, "--micro-batch-size", "1", "--train-iters", "1"], monkeypatch, capsys)
    there: Any = gpt_config_from_args(args)
    here: Any = document.config()
    no_effect = {"deallocate_pipeline_outputs", "inference_sampling_seed"}
    no_effect |= {"add_qkv_bias"} if here.transformer.add_bias_linear else set()
    if preset == "gpt2-124m":  # the next test
        no_effect |= {"activation_func", "bias_activation_fusion"}
    found = {
        name
        for name, (value, other) in differing_values(there.transformer, here.transformer).items()
        # Megatron-LM derives some values that are not set, and has integers where the document has floats.
        if not (name in DERIVED and other in (None, False)) and value != other
    }
    assert found <= no_effect
    assert differing_values(there, here).keys() <= {"extra_checkpoint_metadata", "make_vocab_size_divisible_by"}


def test_values_are_replaced_by_others_that_compute_the_same() -> None:
    import torch
    from megatron.core.fusions.fused_bias_gelu import bias_gelu
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn  # megatron-core 0.19.2

    values = torch.linspace(-4, 4, 101)
    expected = torch.nn.functional.gelu(values, approximate="tanh")
    torch.testing.assert_close(bias_gelu(torch.zeros_like(values), values), expected, rtol=0, atol=1e-6)
    factors = {yarn._yarn_get_concentration_factor(32.0, *given) for given in ((None, None), (1.0, 0.0))}
    assert len(factors) == 1


def test_converted_t5_arguments_build_the_model_of_megatron(
    pg_collection: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """megatron.training has no config for T5, so its model is built as in pretrain_t5.py of Megatron-LM."""
    command = "--encoder-num-layers 3 --decoder-num-layers 2 --decoder-seq-length 16 --vocab-extra-ids 100"
    args = parse_command(command, monkeypatch, capsys, common=COMMON_ARGUMENTS.replace("--num-layers 2", ""))
    bridge_config: Any = Document(json.loads(json.dumps(vars(args), default=str))).config()
    decoder = core_transformer_config_from_args(args)
    encoder = replace(decoder, num_layers=args.encoder_num_layers)
    megatron_config = T5Model(
        config=decoder,
        encoder_config=encoder,
        transformer_encoder_layer_spec=cast(Any, get_t5_encoder_with_local_block_spec(args.encoder_num_layers)),
        transformer_decoder_layer_spec=cast(Any, get_t5_decoder_with_local_block_spec(args.decoder_num_layers)),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        pg_collection=pg_collection,
    )
    # Megatron-LM includes the encoder's layers in the initialisation of the decoder.
    assert differing_values(decoder, bridge_config.transformer).keys() <= {"num_layers", "output_layer_init_method"}
    # In megatron-core 0.19.2, the final norm of a block exists only in Transformer Engine.
    norms = {
        f"{stack}.final_layernorm.{part}": (64,) for stack in ("encoder", "decoder") for part in ("weight", "bias")
    }
    assert build_shapes(bridge_config, pg_collection) == parameter_shapes(megatron_config) | norms
    assert not norms.keys() & parameter_shapes(megatron_config).keys()
