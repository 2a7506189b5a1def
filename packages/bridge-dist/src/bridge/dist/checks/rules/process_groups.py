"""Rules about process groups and buffers that must be created before the build."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@rule(observed_in=MEGATRON)
def weight_shards(setup: Setup) -> Iterator[str]:
    """Without process groups of their own, weights are split by tensor parallelism alone: the option is silently
    ignored.
    """
    config = setup.transformer
    splits = [("tensor_parallel_num_weight_shards", config.gtp_weight_remat_size, "tensor_model_parallel_size")]
    if config.num_moe_experts:
        experts = ("expert_tensor_parallel_num_weight_shards", config.expert_gtp_weight_remat_size)
        splits.append((*experts, "expert_tensor_parallel_size"))
    for name, parts, usual in splits:
        if parts > 1:
            yield (
                f"{name} gives each tensor-parallel rank {parts} weight shards, which need process groups and "
                f"optimizers that Bridge does not create: set it to None, or raise {usual}"
            )


@rule(observed_in=MEGATRON)
def context_parallelism_in_two_levels(setup: Setup) -> Iterator[str]:
    """Transformer Engine's attention gets None as its process groups. Attention in PyTorch silently communicates in
    another way.
    """
    config = setup.transformer
    kinds = config.cp_comm_type if isinstance(config.cp_comm_type, list) else [config.cp_comm_type]
    is_hierarchical = config.hierarchical_context_parallel_sizes or "a2a+p2p" in kinds
    has_groups = setup.groups is not None and setup.groups.hcp is not None
    if setup.layout.cp > 1 and is_hierarchical and not has_groups:
        yield (
            "hierarchical context parallelism needs process groups that Bridge does not create: set "
            "hierarchical_context_parallel_sizes to None, and cp_comm_type to p2p, all_gather or a2a"
        )


@rule(observed_in=MEGATRON)
def hybrid_context_parallelism(setup: Setup) -> Iterator[str]:
    """It needs process groups of every size, and samples that state how many ranks share them: the first step raises an
    IndexError.
    """
    if setup.transformer.hybrid_context_parallel:
        yield (
            "hybrid_context_parallel needs process groups and samples that Bridge does not create: set it to False, "
            "and use one context_parallel_size for all samples"
        )


@rule(observed_in=MEGATRON)
def pipeline_backend(setup: Setup) -> Iterator[str]:
    """Process groups have the backend of the world, and messages are sent through it, whatever the configuration
    says.
    """
    backend, groups = setup.transformer.pipeline_model_parallel_comm_backend, setup.groups
    has_backend = groups is not None and _get_backend(groups.pp) == backend
    if setup.layout.pp > 1 and backend not in (None, "nccl") and not has_backend:
        yield (
            f"pipeline_model_parallel_comm_backend is {backend}, but the pipeline's process group has the backend of "
            "the world: set it to None, or create the group with that backend"
        )


@rule(observed_in=MEGATRON)
def ring_exchange(setup: Setup) -> Iterator[str]:
    """It needs a custom build of torch: the first step raises an AttributeError."""
    missing = not setup.environment.has_ring_exchange
    if setup.layout.pp > 1 and setup.transformer.use_ring_exchange_p2p and missing:
        yield "this build of torch has no ring_exchange: set use_ring_exchange_p2p = False"


@rule(observed_in=MEGATRON)
def tensor_parallel_overlap(setup: Setup) -> Iterator[str]:
    """Transformer Engine asserts in the first forward pass that its buffers exist. Layers in PyTorch silently overlap
    nothing.
    """
    if setup.layout.tp > 1 and setup.transformer.tp_comm_overlap and not setup.environment.has_user_buffers:
        yield (
            "tp_comm_overlap needs buffers of Transformer Engine that have not been created: set it to False, or call "
            "transformer_engine.pytorch.module.base.initialize_ub before the build"
        )


@rule(observed_in=MEGATRON)
def batch_invariant_kernels(setup: Setup) -> Iterator[str]:
    """Layers report batch invariance, but call the standard kernels."""
    if setup.transformer.batch_invariant_mode and not setup.environment.is_batch_invariant:
        yield (
            "batch_invariant_mode needs Megatron's batch-invariant kernels, which are not enabled: set it to False, "
            "or call enable_batch_invariant_mode of "
            "megatron.core.transformer.custom_layers.batch_invariant_kernels first"
        )


def _get_backend(group: ProcessGroup) -> str:
    import torch.distributed  # heavy; already imported if there is a process group

    return str(torch.distributed.get_backend(group))


RULES: tuple[Rule, ...] = (
    weight_shards,
    context_parallelism_in_two_levels,
    hybrid_context_parallelism,
    pipeline_backend,
    ring_exchange,
    tensor_parallel_overlap,
    batch_invariant_kernels,
)
