"""Each pre-flight rule refuses a setup; what it says to set passes; without the rule, it fails or trains wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from ranks import RankError, run_ranks

from bridge.dist import BuildOptions, Layout, create_process_groups, destroy_process_groups
from bridge.dist.checks import preflight, rules
from bridge.dist.checks.preflight import Environment
from bridge.dist.checks.rules import machine, process_groups
from bridge.dist.engine import build
from bridge.dist.engine.weights import draw_weights
from bridge.dist.engine.wrap import data_parallel
from bridge.dist.errors import PreflightError
from bridge.dist.job import make_builder
from bridge.dist.layout import CONFIG_FIELDS
from bridge.dist.train.step import TrainOptions, train
from bridge.dist.train.text import Text, default_text
from bridge.models.gpt import GPTModelBuilder, GPTModelConfig
from bridge.models.mamba import MambaModelBuilder, MambaModelConfig
from bridge.models.t5 import T5ModelBuilder, T5ModelConfig

FAMILIES = (GPTModelBuilder, MambaModelBuilder, T5ModelBuilder)
"""The builders that have rules of their own."""
VOCAB = 256
TRAINING = TrainOptions(steps=2, text=default_text(), seq_length=16, global_batch_size=4)
MEGATRON_FSDP = {"use_megatron_fsdp": True}
TORCH_FSDP2 = {"use_torch_fsdp2": True}
DDP = {"wrap_with_ddp": True}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A tiny model, a GPT unless another family is named, how it is split, and how it is wrapped."""

    family: type[GPTModelConfig | MambaModelConfig | T5ModelConfig] = GPTModelConfig
    sizes: dict[str, int] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    """Assigned after the transformer's configuration was made, whose constructor would refuse it."""
    model: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=lambda: DDP)
    environment: Environment = field(default_factory=Environment)
    embedding_ranks: list[int] | None = None

    def config(self) -> GPTModelConfig | MambaModelConfig | T5ModelConfig:
        transformer: dict[str, Any] = {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "is_hybrid_model": self.family is MambaModelConfig,
            "mamba_state_dim": 8,
            "mamba_head_dim": 8,
            "mamba_num_groups": 2,
        }
        transformer |= {CONFIG_FIELDS[name]: size for name, size in self.sizes.items()}
        if self.sizes.get("pp", 1) > 1:
            transformer["pipeline_dtype"] = torch.float32
        config = TransformerConfig(**transformer | self.transformer)
        for name, value in self.changed.items():
            setattr(config, name, value)
        return self.family(transformer=config, **{"vocab_size": VOCAB, "seq_length": 16} | self.model)

    def layout(self, world_size: int) -> Layout:
        ranks = math.prod(self.sizes.get(name, 1) for name in ("tp", "pp", "cp"))
        etp = self.transformer.get("expert_tensor_parallel_size")
        return Layout(**self.sizes, etp=etp, dp=world_size // ranks)

    def options(self) -> BuildOptions:
        return BuildOptions(ddp_config=DistributedDataParallelConfig(**self.ddp), **self.flags)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a rule refuses, the same with what it says to set, and what comes of it without the rule.

    ``fails`` is a part of the error; None where training goes on, with other losses or gradient norms; or, where it is
    ``passed_over``, with the same, as if it had not been asked for.
    """

    refused: Setting
    advised: Setting
    fails: str | None = None
    passed_over: bool = False
    world_size: int = 2
    alone: bool = False
    """Not all ranks fail alike, so that the others wait; or the processes are spoilt for other cases."""


def megatron_fsdp(**ddp: Any) -> dict[str, Any]:
    usual = {
        "use_megatron_fsdp": True,
        "use_distributed_optimizer": True,
        "data_parallel_sharding_strategy": "optim_grads_params",
        "gradient_reduce_div_fusion": False,
    }
    return {"ddp": usual | ddp, "flags": MEGATRON_FSDP}


PIPELINE = {"pp": 2}
EXPERTS = {"num_moe_experts": 4, "moe_router_load_balancing_type": "none", "add_bias_linear": False}
EXPERT_PARALLEL = {"sizes": {"ep": 2}, "transformer": EXPERTS}
INTERLEAVED = {"pp": 2, "vp": 2}
ASYNCHRONOUS = {"num_layers": 4, "batch_p2p_comm": False, "overlap_p2p_comm": True}
TWO_INSTANCES = {"use_distributed_optimizer": True, "num_distributed_optimizer_instances": 2}
UNTIED = {"share_embeddings_and_output_weights": False}
RELATIVE = {"position_embedding_type": "relative"}
TENSOR_PARALLEL = {"tp": 2}
CONTEXT_PARALLEL = {"cp": 2}
OVERLAP = {"tp_comm_overlap": True, "sequence_parallel": True}
FLASH = {"attention_backend": AttnBackend.flash, "flash_attention_version": 3}
GRAPHS = {"cuda_graph_impl": "full_iteration", "use_te_rng_tracker": True}
OFFLOADING = {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]}
DETERMINISTIC = {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
HOPPER = (9, 0)


def on_gpu(compute_capability: tuple[int, int] = HOPPER, **variables: str) -> Environment:
    return Environment(compute_capability=compute_capability, variables=variables)


def connections(number: int, compute_capability: tuple[int, int] = HOPPER) -> Environment:
    return on_gpu(compute_capability, CUDA_DEVICE_MAX_CONNECTIONS=str(number))


PREDICTING = {"mtp_num_layers": 1}
ROPE = {"position_embedding_type": "rope"}
CASES: dict[str, Case] = {
    "embedding-group": Case(
        refused=Setting(
            sizes=PIPELINE,
            transformer=PREDICTING | {"pipeline_model_parallel_layout": "Ettm|L"},
            model=ROPE,
            embedding_ranks=[0, 1],
        ),
        advised=Setting(
            sizes=PIPELINE,
            transformer=PREDICTING | {"pipeline_model_parallel_layout": "Ettm|L"},
            model=ROPE,
            embedding_ranks=[0],
        ),
    ),
    "groups-fit-configuration": Case(
        # Each stage builds all layers: there are twice as many.
        refused=Setting(sizes=PIPELINE, changed={"pipeline_model_parallel_size": 1}),
        advised=Setting(sizes=PIPELINE),
    ),
    "values-fit": Case(
        refused=Setting(changed={"num_query_groups": 3}),
        advised=Setting(changed={"num_query_groups": 2}),
        fails="3 does not divide num_attention_heads = 4",
    ),
    "heads-divide": Case(
        refused=Setting(sizes={"tp": 2}, changed={"num_attention_heads": 3, "num_query_groups": 1}),
        advised=Setting(sizes={"tp": 2}),
        fails="3 is not divisible by 2",
    ),
    "feed-forward-divides": Case(
        refused=Setting(sizes={"tp": 2}, transformer={"ffn_hidden_size": 33}),
        advised=Setting(sizes={"tp": 2}, transformer={"ffn_hidden_size": 34}),
        fails="33 is not divisible by 2",
    ),
    "experts-divide": Case(
        refused=Setting(sizes={"ep": 2}, transformer=EXPERTS | {"num_moe_experts": 3}),
        advised=Setting(**EXPERT_PARALLEL),
        fails="AssertionError",
    ),
    "layers-divide": Case(
        refused=Setting(sizes=PIPELINE, transformer={"num_layers": 3}),
        advised=Setting(sizes=PIPELINE),
        fails="num_layers 3 does not divide",
    ),
    "interleaving-on-two-ranks": Case(
        refused=Setting(sizes=INTERLEAVED, transformer={"num_layers": 4, "batch_p2p_comm": True}),
        advised=Setting(sizes=INTERLEAVED, transformer=ASYNCHRONOUS),
    ),
    "interleaving-group-size": Case(
        refused=Setting(sizes=INTERLEAVED, transformer=ASYNCHRONOUS | {"microbatch_group_size_per_vp_stage": 1}),
        advised=Setting(sizes=INTERLEAVED, transformer=ASYNCHRONOUS | {"microbatch_group_size_per_vp_stage": 2}),
        fails="ValueError: The number of contiguous micro-batches",
    ),
    "overlapped-and-batched-messages": Case(
        refused=Setting(sizes=INTERLEAVED, transformer=ASYNCHRONOUS | {"batch_p2p_comm": True}),
        advised=Setting(sizes=INTERLEAVED, transformer=ASYNCHRONOUS),
        fails="ValueError: Can not use both",
    ),
    "overlapped-messages-without-interleaving": Case(
        refused=Setting(sizes=PIPELINE, transformer=ASYNCHRONOUS),
        advised=Setting(sizes=PIPELINE, transformer=ASYNCHRONOUS | {"overlap_p2p_comm": False}),
        fails="ValueError: Non-interleaved",
    ),
    "pipeline-dtype": Case(
        refused=Setting(sizes=PIPELINE, transformer={"pipeline_dtype": torch.bfloat16}),
        advised=Setting(sizes=PIPELINE),
        fails="RankError: rank 1 was killed: SIGABRT",
        alone=True,
    ),
    "experts-without-sequence-parallelism": Case(
        refused=Setting(sizes={"tp": 2}, transformer=EXPERTS),
        advised=Setting(sizes={"tp": 2}, transformer=EXPERTS | {"sequence_parallel": True}),
        fails="ValueError: During training, performance may degrade",
    ),
    "meta-device-and-cpu-initialization": Case(
        refused=Setting(transformer={"init_model_with_meta_device": True, "use_cpu_initialization": True}),
        advised=Setting(transformer={"use_cpu_initialization": True}),
    ),
    "weight-shards": Case(
        refused=Setting(transformer={"tensor_parallel_num_weight_shards": 2}), advised=Setting(), passed_over=True
    ),
    "context-parallelism-in-two-levels": Case(
        refused=Setting(
            sizes=CONTEXT_PARALLEL,
            transformer={"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [1, 2]},
        ),
        advised=Setting(sizes=CONTEXT_PARALLEL, transformer={"cp_comm_type": "a2a"}),
        passed_over=True,
    ),
    "hybrid-context-parallelism": Case(
        refused=Setting(transformer={"hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 16}),
        advised=Setting(sizes=CONTEXT_PARALLEL),
        fails="IndexError",
    ),
    "pipeline-backend": Case(
        refused=Setting(sizes=PIPELINE, transformer={"pipeline_model_parallel_comm_backend": "ucc"}),
        advised=Setting(sizes=PIPELINE),
        passed_over=True,
    ),
    "ring-exchange": Case(
        refused=Setting(sizes=PIPELINE, transformer={"use_ring_exchange_p2p": True}),
        advised=Setting(sizes=PIPELINE),
        fails="AttributeError: module 'torch.distributed' has no attribute 'ring_exchange'",
    ),
    "tensor-parallel-overlap": Case(
        refused=Setting(sizes=TENSOR_PARALLEL, transformer=OVERLAP),
        advised=Setting(sizes=TENSOR_PARALLEL, transformer=OVERLAP, environment=Environment(has_user_buffers=True)),
        passed_over=True,
    ),
    "batch-invariant-kernels": Case(
        refused=Setting(transformer=FLASH | {"batch_invariant_mode": True}),
        advised=Setting(
            transformer=FLASH | {"batch_invariant_mode": True}, environment=Environment(is_batch_invariant=True)
        ),
        passed_over=True,
        alone=True,
    ),
    "cuda-graphs": Case(
        refused=Setting(transformer=GRAPHS),
        advised=Setting(transformer=GRAPHS | {"cuda_graph_impl": "none"}),
        passed_over=True,
    ),
    "nccl-buffers": Case(refused=Setting(ddp={"nccl_ub": True}), advised=Setting(), fails="Error: "),
    "parameter-gather-without-distributed-optimizer": Case(
        refused=Setting(ddp={"overlap_param_gather": True, "overlap_grad_reduce": True}),
        advised=Setting(
            ddp={"overlap_param_gather": True, "overlap_grad_reduce": True, "use_distributed_optimizer": True}
        ),
        fails="TypeError: 'NoneType' object is not iterable",
    ),
    "instances-without-distributed-optimizer": Case(
        refused=Setting(ddp={"num_distributed_optimizer_instances": 2}),
        advised=Setting(ddp=TWO_INSTANCES),
        fails="AssertionError: Partial DistOpt",
    ),
    "average-of-per-token-loss": Case(
        refused=Setting(ddp={"average_in_collective": True}, transformer={"calculate_per_token_loss": True}),
        advised=Setting(transformer={"calculate_per_token_loss": True}),
        fails="AssertionError: Cannot average",
    ),
    "fp32-reduce-scatter": Case(
        refused=Setting(ddp=TWO_INSTANCES | {"reduce_scatter_with_fp32_accumulation": True}),
        advised=Setting(ddp={"use_distributed_optimizer": True, "reduce_scatter_with_fp32_accumulation": True}),
        fails="AssertionError: RS w/ FP32 accumulation not supported",
    ),
    "custom-fsdp": Case(
        refused=Setting(ddp={"use_custom_fsdp": True}), advised=Setting(**megatron_fsdp()), passed_over=True
    ),
    "torch-fsdp2-experts": Case(
        refused=Setting(**EXPERT_PARALLEL, flags=TORCH_FSDP2),
        advised=Setting(**EXPERT_PARALLEL),
        alone=True,
    ),
    "torch-fsdp2-tied-embeddings": Case(
        refused=Setting(model={"share_embeddings_and_output_weights": True}, flags=TORCH_FSDP2),
        advised=Setting(flags=TORCH_FSDP2),
        fails="mixed torch.Tensor and DTensor",
    ),
    "torch-fsdp2-distributed-optimizer": Case(
        refused=Setting(ddp={"use_distributed_optimizer": True}, flags=TORCH_FSDP2),
        advised=Setting(flags=TORCH_FSDP2),
        fails="TypeError: 'method' object is not iterable",
    ),
    "megatron-fsdp-pipeline": Case(
        refused=Setting(sizes=PIPELINE, **megatron_fsdp()), advised=Setting(**megatron_fsdp()), fails="EinopsError"
    ),
    "megatron-fsdp-distributed-optimizer": Case(
        refused=Setting(**megatron_fsdp(use_distributed_optimizer=False)), advised=Setting(**megatron_fsdp())
    ),
    "megatron-fsdp-fp16": Case(
        refused=Setting(**megatron_fsdp(), transformer={"fp16": True}),
        advised=Setting(**megatron_fsdp(), transformer={"bf16": True}),
        fails="AttributeError: 'NoneType' object has no attribute 'data'",
    ),
    "megatron-fsdp-average": Case(
        refused=Setting(**megatron_fsdp(average_in_collective=True)),
        advised=Setting(**megatron_fsdp()),
        fails="AttributeError: 'NoneType' object has no attribute 'size'",
    ),
    "megatron-fsdp-fused-division": Case(
        refused=Setting(**megatron_fsdp(gradient_reduce_div_fusion=True)),
        advised=Setting(**megatron_fsdp()),
        fails="RuntimeError: Cannot use ReduceOp.PREMUL_SUM",
    ),
    "megatron-fsdp-single-experts": Case(
        refused=Setting(**EXPERT_PARALLEL, **megatron_fsdp()),
        advised=Setting(transformer=EXPERTS, **megatron_fsdp()),
    ),
    "megatron-fsdp-strategy": Case(
        refused=Setting(**megatron_fsdp(data_parallel_sharding_strategy="full")),
        advised=Setting(**megatron_fsdp()),
        fails="AssertionError",
    ),
    "megatron-fsdp-instances": Case(
        refused=Setting(
            **megatron_fsdp(data_parallel_sharding_strategy="optim", num_distributed_optimizer_instances=2)
        ),
        advised=Setting(**megatron_fsdp(num_distributed_optimizer_instances=2)),
        world_size=4,
    ),
    "megatron-fsdp-outer-sharding": Case(
        refused=Setting(**megatron_fsdp(outer_dp_sharding_strategy="optim", num_distributed_optimizer_instances=2)),
        advised=Setting(**megatron_fsdp(num_distributed_optimizer_instances=2)),
        world_size=4,
    ),
    "mamba-heads-divide": Case(
        refused=Setting(family=MambaModelConfig, sizes={"tp": 2}, transformer={"mamba_num_groups": 1}),
        advised=Setting(family=MambaModelConfig, sizes={"tp": 2}),
        fails="AssertionError: ngroups must be evenly divisible by tp_size",
    ),
    "mamba-params-dtype": Case(
        refused=Setting(family=MambaModelConfig, transformer={"bf16": True}),
        advised=Setting(family=MambaModelConfig, transformer={"bf16": True, "params_dtype": torch.bfloat16}),
        fails="mixed dtype",
    ),
    "t5-pipeline": Case(
        refused=Setting(family=T5ModelConfig, sizes=PIPELINE),
        advised=Setting(family=T5ModelConfig),
        fails="UnsupportedError: T5 cannot be split",
    ),
    "t5-context-parallelism": Case(
        refused=Setting(family=T5ModelConfig, sizes={"cp": 2}),
        advised=Setting(family=T5ModelConfig),
        fails="UnsupportedError: attention under context parallelism",
    ),
    "t5-encoder-divides": Case(
        refused=Setting(family=T5ModelConfig, sizes={"tp": 2}, model={"encoder_ffn_hidden_size": 33}),
        advised=Setting(family=T5ModelConfig, sizes={"tp": 2}, model={"encoder_ffn_hidden_size": 34}),
        fails="33 is not divisible by 2",
    ),
    "t5-torch-fsdp2-learned-positions": Case(
        refused=Setting(family=T5ModelConfig, model=UNTIED, flags=TORCH_FSDP2),
        advised=Setting(family=T5ModelConfig, model=UNTIED | RELATIVE, flags=TORCH_FSDP2),
        fails="TypeError: Invariant encountered",
    ),
    "t5-recomputed-relative-positions": Case(
        refused=Setting(
            family=T5ModelConfig,
            model=RELATIVE,
            transformer={"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        ),
        advised=Setting(family=T5ModelConfig, model=RELATIVE),
        fails="RuntimeError: Trying to backward through the graph a second time",
    ),
}

MODELOPT = {"restore_modelopt_state": True}
SHOWN_ELSEWHERE: dict[str, Case] = {
    "connections-of-split-layers": Case(
        refused=Setting(sizes=TENSOR_PARALLEL, environment=connections(8)),
        advised=Setting(sizes=TENSOR_PARALLEL, environment=connections(1)),
    ),
    "connections-of-fsdp": Case(
        refused=Setting(flags=TORCH_FSDP2, environment=connections(1)),
        advised=Setting(flags=TORCH_FSDP2, environment=on_gpu()),
    ),
    "deterministic-libraries": Case(
        refused=Setting(
            transformer={"deterministic_mode": True}, environment=on_gpu(**DETERMINISTIC | {"NCCL_ALGO": "Ring,Tree"})
        ),
        advised=Setting(transformer={"deterministic_mode": True}, environment=on_gpu(**DETERMINISTIC)),
    ),
    "offloaded-weights": Case(
        refused=Setting(transformer=OFFLOADING, environment=on_gpu()),
        advised=Setting(transformer=OFFLOADING, environment=on_gpu(NVTE_CPU_OFFLOAD_V1="1")),
    ),
    "torch-fsdp2-fused-gradients": Case(
        refused=Setting(transformer={"gradient_accumulation_fusion": True}, flags=TORCH_FSDP2),
        advised=Setting(flags=TORCH_FSDP2),
    ),
    "torch-fsdp2-quantized-parameters": Case(
        refused=Setting(transformer={"fp8": "hybrid", "fp8_param": True}, flags=TORCH_FSDP2),
        advised=Setting(transformer={"fp8": "hybrid"}, flags=TORCH_FSDP2),
    ),
    "megatron-fsdp-grouped-parameters": Case(
        refused=Setting(**megatron_fsdp(), changed={"moe_single_grouped_weight": True}),
        advised=Setting(**megatron_fsdp()),
    ),
    "modelopt-virtual-pipeline": Case(
        refused=Setting(sizes=INTERLEAVED, transformer=ASYNCHRONOUS, model=MODELOPT),
        advised=Setting(sizes=PIPELINE, transformer={"num_layers": 4}, model=MODELOPT),
    ),
    "modelopt-meta-device": Case(
        refused=Setting(transformer={"init_model_with_meta_device": True}, model=MODELOPT),
        advised=Setting(model=MODELOPT),
    ),
    "modelopt-experts": Case(
        refused=Setting(sizes={"tp": 2, "ep": 2}, transformer=EXPERTS | {"sequence_parallel": True}, model=MODELOPT),
        advised=Setting(sizes={"ep": 2}, transformer=EXPERTS, model=MODELOPT),
        world_size=4,
    ),
    "recomputed-mlp-with-biases": Case(
        refused=Setting(transformer={"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
        advised=Setting(
            transformer={"recompute_granularity": "selective", "recompute_modules": ["mlp"], "add_bias_linear": False}
        ),
    ),
    "pipeline-layout": Case(
        refused=Setting(sizes=PIPELINE, changed={"pipeline_model_parallel_layout": "Et|L"}),
        advised=Setting(sizes=PIPELINE, changed={"pipeline_model_parallel_layout": "Et|tL"}),
    ),
    "predictions-beside-the-embedding": Case(
        refused=Setting(
            sizes=INTERLEAVED,
            transformer=PREDICTING | ASYNCHRONOUS | {"pipeline_model_parallel_layout": "Et|tt|tm|L"},
            model=ROPE,
        ),
        advised=Setting(
            sizes=INTERLEAVED,
            transformer=PREDICTING | ASYNCHRONOUS | {"pipeline_model_parallel_layout": "Et|tt|t|mL"},
            model=ROPE,
        ),
    ),
    "sequences-without-tensor-parallelism": Case(
        refused=Setting(changed={"sequence_parallel": True}),
        advised=Setting(sizes=TENSOR_PARALLEL, transformer={"sequence_parallel": True}),
    ),
    "expert-parallelism-without-experts": Case(
        refused=Setting(
            sizes={"ep": 2}, changed={"num_moe_experts": None, "moe_ffn_hidden_size": None}, transformer=EXPERTS
        ),
        advised=Setting(sizes={"ep": 2}, transformer=EXPERTS),
    ),
    "biases-of-split-experts": Case(
        refused=Setting(
            sizes={"tp": 2}, transformer=EXPERTS | {"sequence_parallel": True}, changed={"add_bias_linear": True}
        ),
        advised=Setting(sizes={"tp": 2}, transformer=EXPERTS | {"sequence_parallel": True}),
    ),
    "uneven-pipeline": Case(
        refused=Setting(
            sizes=PIPELINE, transformer={"num_layers": 4}, changed={"num_layers_in_first_pipeline_stage": 5}
        ),
        advised=Setting(sizes=PIPELINE, transformer={"num_layers": 4, "num_layers_in_first_pipeline_stage": 3}),
    ),
    "vocabulary-divides": Case(
        refused=Setting(sizes=TENSOR_PARALLEL, model={"vocab_size": VOCAB + 1}),
        advised=Setting(sizes=TENSOR_PARALLEL, model={"vocab_size": VOCAB + 1, "should_pad_vocab": True}),
    ),
    "predictions-in-a-pipeline": Case(
        refused=Setting(sizes=PIPELINE, transformer={"mtp_num_layers": 1}),
        advised=Setting(sizes=PIPELINE, transformer={"mtp_num_layers": 1}, model={"position_embedding_type": "rope"}),
    ),
    "hybrid-stages": Case(
        refused=Setting(
            family=MambaModelConfig,
            sizes=PIPELINE,
            transformer={"num_layers": 4},
            model={"hybrid_layer_pattern": "M|M|MM"},
        ),
        advised=Setting(
            family=MambaModelConfig,
            sizes=PIPELINE,
            transformer={"num_layers": 4},
            model={"hybrid_layer_pattern": "MM|MM"},
        ),
    ),
    "mamba-offloading": Case(
        refused=Setting(family=MambaModelConfig, transformer={"cpu_offloading": True, "cpu_offloading_num_layers": 1}),
        advised=Setting(family=MambaModelConfig),
    ),
}
"""Of the rules whose ``not_shown`` says why no process here shows what comes of it without them."""
EVERY_CASE = CASES | SHOWN_ELSEWHERE


def every_rule() -> list[preflight.Rule]:
    found = [*rules.RULES, *(rule for family in FAMILIES for rule in family.rules)]
    return list(dict.fromkeys(found))  # some are of several families


def test_every_rule_has_its_case() -> None:
    assert sorted(CASES) == sorted(rule.name for rule in every_rule() if rule.not_shown is None)
    assert sorted(SHOWN_ELSEWHERE) == sorted(rule.name for rule in every_rule() if rule.not_shown is not None)


def test_every_rule_says_why() -> None:
    assert all(rule.why for rule in every_rule())


def problems(setting: Setting, world_size: int) -> list[str]:
    """What the check finds."""
    config = setting.config()
    setup = preflight.Setup(
        transformer=config.transformer,
        layout=setting.layout(world_size),
        options=setting.options(),
        model=config,
        environment=setting.environment,
        embedding_ranks=setting.embedding_ranks,
    )
    try:
        preflight.check(setup, (*rules.RULES, *make_builder(config).rules))
    except PreflightError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("name", EVERY_CASE)
def test_refused_by_this_rule_alone(name: str) -> None:
    found = problems(EVERY_CASE[name].refused, EVERY_CASE[name].world_size)
    assert [problem.rpartition(" ")[2] for problem in found] == [f"[{name}]"]


@pytest.mark.parametrize("name", EVERY_CASE)
def test_what_it_says_to_set_passes(name: str) -> None:
    assert problems(EVERY_CASE[name].advised, EVERY_CASE[name].world_size) == []


def setup_of(setting: Setting, groups: ProcessGroupCollection | None = None) -> preflight.Setup:
    return preflight.Setup(
        transformer=setting.config().transformer,
        layout=setting.layout(4),
        options=setting.options(),
        groups=groups,
        environment=setting.environment,
    )


CONNECTIONS: dict[str, tuple[Setting, str | None]] = {
    "nothing is split": (Setting(environment=connections(8)), None),
    "Blackwell": (Setting(sizes=TENSOR_PARALLEL, environment=connections(8, (10, 0))), None),
    "no GPU": (Setting(sizes=TENSOR_PARALLEL), None),
    "FSDP goes before": (Setting(sizes=TENSOR_PARALLEL, flags=TORCH_FSDP2, environment=connections(8)), None),
    "context parallelism": (Setting(sizes=CONTEXT_PARALLEL, environment=connections(8)), "= 1, not 8"),
    "Megatron-FSDP on Blackwell": (
        Setting(**megatron_fsdp(), environment=connections(1, (10, 0))),
        "megatron-fsdp overlaps nothing with CUDA_DEVICE_MAX_CONNECTIONS = 1",
    ),
}


@pytest.mark.parametrize("name", CONNECTIONS)
def test_connections_to_a_gpu(name: str) -> None:
    setting, problem = CONNECTIONS[name]
    found = [one for rule in rules.RULES for one in rule.problems(setup_of(setting))]
    assert len(found) == (problem is not None)
    assert all(problem in one for one in found if problem)


def test_where_the_number_of_connections_is_not_set_a_warning_says_so() -> None:
    warning = machine.warning(setup_of(Setting(sizes=TENSOR_PARALLEL, environment=on_gpu())))
    assert warning is not None
    assert warning.startswith("CUDA_DEVICE_MAX_CONNECTIONS is not set")
    for environment in (connections(1), on_gpu((10, 0)), Environment()):
        assert machine.warning(setup_of(Setting(sizes=TENSOR_PARALLEL, environment=environment))) is None


def groups_that_were_made() -> tuple[list[str], list[str]]:
    """On each rank: what is said of a pipeline's backend, and of context parallelism in two levels."""
    parallel_state.initialize_model_parallel(context_parallel_size=4, hierarchical_context_parallel_sizes=[2, 2])
    groups = ProcessGroupCollection.use_mpu_process_groups()
    backend = Setting(sizes=PIPELINE, transformer={"pipeline_model_parallel_comm_backend": "gloo"})
    levels = Setting(sizes={"cp": 4}, transformer={"cp_comm_type": "a2a+p2p"})
    return (
        list(process_groups.pipeline_backend.problems(setup_of(backend, groups))),
        list(process_groups.context_parallelism_in_two_levels.problems(setup_of(levels, groups))),
    )


def test_groups_that_somebody_made_are_taken() -> None:
    assert run_ranks(groups_that_were_made, 4) == [([], [])] * 4


class Run(NamedTuple):
    """Losses and gradient norms by step."""

    losses: list[float]
    grad_norms: list[float | None]


def unchecked(settings: list[Setting]) -> list[Run | str]:
    """On each rank: train each setting without the checks; what came of it, or the error."""
    build.RULES = ()
    data_parallel.check_stages = lambda *_: None  # it finds tied embeddings a second time, of any builder
    outcomes: list[Run | str] = []
    for setting in settings:
        try:
            outcomes.append(trained(setting))
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        destroy_process_groups()  # whose threads would add up
    return outcomes


def trained(setting: Setting) -> Run:
    config, layout = setting.config(), setting.layout(torch.distributed.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_distributed_optimizer_instances=setting.ddp.get("num_distributed_optimizer_instances", 1),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)

    def draw(stages: list[MegatronModule]) -> list[MegatronModule]:
        draw_weights(stages, groups, vocab_size=VOCAB)
        return stages

    config.pre_wrap_hooks.append(draw)
    builder: Any = config.get_builder_cls()(config)
    type(builder).rules = ()
    stages = builder.build_distributed_models(groups, DistributedDataParallelConfig(**setting.ddp), **setting.flags)
    text = Text.read(TRAINING.text, vocab_size=VOCAB)
    steps = list(train(stages, groups, layout, text=text, options=TRAINING, forward_step=builder.forward_step))
    return Run([step.loss for step in steps], [step.grad_norm for step in steps])


@pytest.fixture(scope="module")
def one_process() -> dict[str, Run]:
    """What the models of the cases that train wrong give on one process."""
    names = [name for name, case in CASES.items() if case.fails is None]
    outcomes = run_ranks(unchecked, 1, [_of_one_process(CASES[name].refused) for name in names])[0]
    assert all(isinstance(outcome, Run) for outcome in outcomes), outcomes
    return dict(zip(names, (outcome for outcome in outcomes if isinstance(outcome, Run)), strict=True))


def _of_one_process(setting: Setting) -> Setting:
    """The same model, whole."""
    of_model = ("num_layers", *EXPERTS, *PREDICTING)
    transformer = {name: value for name, value in setting.transformer.items() if name in of_model}
    return Setting(family=setting.family, transformer=transformer, model=setting.model)


@pytest.fixture(scope="module")
def together() -> dict[str, list[Run | str]]:
    """What came of the cases, by rank: those that every rank fails alike share the processes."""
    found: dict[str, list[Run | str]] = {}
    for world_size in (2, 4):
        names = [name for name, case in CASES.items() if case.world_size == world_size and not case.alone]
        by_rank = run_ranks(unchecked, world_size, [CASES[name].refused for name in names], timeout=240)
        found |= {name: [rank[index] for rank in by_rank] for index, name in enumerate(names)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_without_the_rule(name: str, together: dict[str, list[Run | str]], one_process: dict[str, Run]) -> None:
    case = CASES[name]
    outcomes = together[name] if name in together else _outcomes_alone(case)
    if case.fails is not None:
        assert any(isinstance(outcome, str) and case.fails in outcome for outcome in outcomes), outcomes
        return
    expected = one_process[name]
    for outcome in outcomes:
        assert isinstance(outcome, Run), outcome
        same_losses = outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        same_norms = outcome.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
        assert (same_losses and same_norms) == case.passed_over


def _outcomes_alone(case: Case) -> list[Run | str]:
    try:
        return [rank[0] for rank in run_ranks(unchecked, case.world_size, [case.refused], timeout=30)]
    except RankError as error:
        return [f"RankError: {error}"]


@preflight.rule()
def no_small_vocabulary(setup: preflight.Setup) -> Iterator[str]:
    """A rule of one family of models."""
    if getattr(setup.model, "vocab_size", VOCAB) < VOCAB:
        yield f"vocab_size is less than {VOCAB}: set it to {VOCAB}"


class ParticularBuilder(GPTModelBuilder):
    rules = (no_small_vocabulary,)


def build_particular(vocab_size: int) -> list[str]:
    """On each rank: build with the family's own rule; the problems that it finds."""
    config = Setting().config()
    assert isinstance(config, GPTModelConfig)
    config.vocab_size = vocab_size
    groups = create_process_groups(Layout())
    model_parallel_cuda_manual_seed(1)
    try:
        ParticularBuilder(config).build_distributed_models(groups, wrap_with_ddp=False)
    except PreflightError as error:
        return list(error.problems)
    finally:
        destroy_process_groups()
    return []


def test_a_family_of_models_has_rules_of_its_own() -> None:
    assert run_ranks(build_particular, 1, VOCAB - 1) == [
        ["vocab_size is less than 256: set it to 256 [no-small-vocabulary]"]
    ]
    assert run_ranks(build_particular, 1, VOCAB) == [[]]
