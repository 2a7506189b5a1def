"""The parts of the cases: tiny models with a layout, a wrapper and an environment."""

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
    """A tiny model, by default a GPT, with its layout, its wrapper and its environment."""

    family: type[GPTModelConfig | MambaModelConfig | T5ModelConfig] = GPTModelConfig
    sizes: dict[str, int] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)
    assigned: dict[str, Any] = field(default_factory=dict)
    """Assigned to the transformer configuration afterwards, because its constructor would refuse these values."""
    model: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=lambda: DDP)
    environment: Environment = field(default_factory=Environment)
    embedding_ranks: list[int] | None = None

    def make_config(self) -> GPTModelConfig | MambaModelConfig | T5ModelConfig:
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
        for name, value in self.assigned.items():
            setattr(config, name, value)
        return self.family(transformer=config, **{"vocab_size": VOCAB, "seq_length": 16} | self.model)

    def make_layout(self, world_size: int) -> Layout:
        ranks = math.prod(self.sizes.get(name, 1) for name in ("tp", "pp", "cp"))
        etp = self.transformer.get("expert_tensor_parallel_size")
        return Layout(**self.sizes, etp=etp, dp=world_size // ranks)

    def make_options(self) -> BuildOptions:
        return BuildOptions(ddp_config=DistributedDataParallelConfig(**self.ddp), **self.flags)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A setting that a rule refuses, the same setting with the advice applied, and the outcome without the rule.

    ``error`` is a part of the error message. It is None if training continues: with the same losses and gradient norms
    if the option ``is_ignored``, otherwise with different ones.
    """

    refused: Setting
    advised: Setting
    error: str | None = None
    is_ignored: bool = False
    world_size: int = 2
    needs_own_processes: bool = False
    """Whether the other ranks would wait for the one that fails, or the processes cannot run other cases afterwards."""


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
OVERLAPPED_P2P = {"num_layers": 4, "batch_p2p_comm": False, "overlap_p2p_comm": True}
TENSOR_PARALLEL = {"tp": 2}
CONTEXT_PARALLEL = {"cp": 2}
HOPPER = (9, 0)


def on_gpu(compute_capability: tuple[int, int] = HOPPER, **variables: str) -> Environment:
    return Environment(compute_capability=compute_capability, variables=variables)


def connections(number: int, compute_capability: tuple[int, int] = HOPPER) -> Environment:
    return on_gpu(compute_capability, CUDA_DEVICE_MAX_CONNECTIONS=str(number))


PREDICTING = {"mtp_num_layers": 1}
ROPE = {"position_embedding_type": "rope"}
