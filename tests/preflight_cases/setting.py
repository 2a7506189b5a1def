"""What the cases of pre-flight rules are made of: tiny models with a layout, a wrapper and an environment."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig

from bridge.dist import BuildOptions, Layout
from bridge.dist.checks.preflight import Environment
from bridge.dist.layout import CONFIG_FIELDS
from bridge.models.gpt import GPTModelConfig
from bridge.models.mamba import MambaModelConfig
from bridge.models.t5 import T5ModelConfig

VOCAB = 256
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
TENSOR_PARALLEL = {"tp": 2}
CONTEXT_PARALLEL = {"cp": 2}
HOPPER = (9, 0)


def on_gpu(compute_capability: tuple[int, int] = HOPPER, **variables: str) -> Environment:
    return Environment(compute_capability=compute_capability, variables=variables)


def connections(number: int, compute_capability: tuple[int, int] = HOPPER) -> Environment:
    return on_gpu(compute_capability, CUDA_DEVICE_MAX_CONNECTIONS=str(number))


PREDICTING = {"mtp_num_layers": 1}
ROPE = {"position_embedding_type": "rope"}
