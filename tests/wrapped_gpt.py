"""Build a tiny GPT of Megatron's layers with any options of the wrappers, and train it for a few steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig

from bridge.config import ModelConfig
from bridge.dist import DistributedModelBuilder, Layout, create_process_groups, destroy_process_groups
from bridge.dist.engine.weights import draw_weights
from bridge.dist.train.step import TrainOptions, train
from bridge.dist.train.text import Text, find_default_text

VOCAB = 256
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}
BF16 = {"bf16": True}
EXPERTS = {"num_moe_experts": 2, "add_bias_linear": False, "moe_router_load_balancing_type": "none"}
SHARDED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 2_000}


@dataclass(kw_only=True)
class GptConfig(ModelConfig):
    builder: ClassVar[str] = f"{__name__}.GptBuilder"
    transformer: TransformerConfig
    tied: bool = False


class GptBuilder(DistributedModelBuilder[GPTModel, GptConfig]):
    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        config = self._model_config.transformer
        return GPTModel(
            config,
            get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False),
            vocab_size=VOCAB,
            max_sequence_length=16,
            pre_process=bool(pre_process),
            post_process=bool(post_process),
            share_embeddings_and_output_weights=self._model_config.tied,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )


@dataclass(kw_only=True)
class Case:
    """Options of one build of a tiny GPT. Parameters whose names start with ``frozen`` are frozen before wrapping."""

    transformer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    frozen: str | None = None
    tied: bool = False
    drawn: bool = True
    seed_by_rank: bool = False

    @property
    def config(self) -> GptConfig:
        defaults: dict[str, Any] = {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        return GptConfig(transformer=TransformerConfig(**defaults | self.transformer), tied=self.tied)


def fsdp(strategy: str = "optim_grads_params", *, ddp: dict[str, Any] | None = None, **case: Any) -> Case:
    options = SHARDED | {"data_parallel_sharding_strategy": strategy, "gradient_reduce_div_fusion": False}
    return Case(ddp=options | (ddp or {}), flags={"use_megatron_fsdp": True}, **case)


def fsdp2(**case: Any) -> Case:
    return Case(flags={"use_torch_fsdp2": True}, **case)


class Run(NamedTuple):
    """The results of a case on one rank."""

    losses: list[float]
    grad_norms: list[float | None]


class Built(NamedTuple):
    stages: list[Any]  # wrapped stages, whose class depends on the wrapper
    groups: ProcessGroupCollection
    layout: Layout


@contextmanager
def build_case(case: Case, *, instances: int = 1) -> Iterator[Built]:
    """Create process groups and build a case, with weights initialised by name or by Megatron."""
    config = case.config
    layout = Layout.of(config.transformer, torch.distributed.get_world_size())
    groups = create_process_groups(layout, optimizer_instances=instances)
    model_parallel_cuda_manual_seed(1 + case.seed_by_rank * groups.dp.rank(), force_reset_rng=True)

    def prepare(stages: list[MegatronModule]) -> list[MegatronModule]:
        if case.drawn:
            draw_weights(stages, groups, vocab_size=VOCAB)
        for name, parameter in stages[0].named_parameters():
            if case.frozen is not None and name.startswith(case.frozen):
                parameter.requires_grad_(False)
        return stages

    config.pre_wrap_hooks.append(prepare)
    try:
        ddp_config = DistributedDataParallelConfig(**case.ddp)
        yield Built(GptBuilder(config).build_distributed_models(groups, ddp_config, **case.flags), groups, layout)
    finally:
        destroy_process_groups()


def train_built(case: Built, *, steps: int = 2) -> Run:
    text = Text.read(find_default_text(), vocab_size=VOCAB)
    options = TrainOptions(steps=steps, text=find_default_text(), seq_length=16, global_batch_size=4)
    taken = list(train(list(case.stages), case.groups, case.layout, text=text, options=options))
    return Run([step.loss for step in taken], [step.grad_norm for step in taken])


def train_cases(cases: dict[str, Case], instances: int = 1) -> dict[str, Run]:
    """Train each case on this rank from the same weights."""
    runs = {}
    for name, case in cases.items():
        with build_case(case, instances=instances) as stages:
            runs[name] = train_built(stages)
    return runs


def assert_equal(run: Run, expected: Run, *, rel: float = 1e-5) -> None:
    assert run.losses == pytest.approx(expected.losses, rel=rel)
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=10 * rel)
