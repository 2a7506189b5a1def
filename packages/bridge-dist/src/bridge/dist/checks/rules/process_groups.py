"""What needs process groups or buffers that somebody else must make first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@rule(seen=MEGATRON)
def weight_shards(setup: Setup) -> Iterator[str]:
    """Without process groups of their own, weights are not split further than tensor parallelism splits them: training
    goes on as if it had not been asked for.
    """
    config = setup.transformer
    splits = [("tensor_parallel_num_weight_shards", config.gtp_weight_remat_size, "tensor_model_parallel_size")]
    if config.num_moe_experts:
        experts = ("expert_tensor_parallel_num_weight_shards", config.expert_gtp_weight_remat_size)
        splits.append((*experts, "expert_tensor_parallel_size"))
    for name, parts, usual in splits:
        if parts > 1:
            yield (
                f"weights in {parts} shards a tensor-parallel rank need process groups and optimizers that Bridge does "
                f"not make: set {name} to None, or raise {usual}"
            )


@rule(seen=MEGATRON)
def context_parallelism_in_two_levels(setup: Setup) -> Iterator[str]:
    """Transformer Engine's attention gets None for its groups; attention in PyTorch communicates otherwise and does not
    say so.
    """
    config = setup.transformer
    kinds = config.cp_comm_type if isinstance(config.cp_comm_type, list) else [config.cp_comm_type]
    asked = config.hierarchical_context_parallel_sizes or "a2a+p2p" in kinds
    made = setup.groups is not None and setup.groups.hcp is not None
    if setup.layout.cp > 1 and asked and not made:
        yield (
            "context parallelism in two levels needs process groups that Bridge does not make: set "
            "hierarchical_context_parallel_sizes to None, and cp_comm_type to p2p, all_gather or a2a"
        )


@rule(seen=MEGATRON)
def hybrid_context_parallelism(setup: Setup) -> Iterator[str]:
    """It takes groups of every size, and samples that say how many ranks share them: an IndexError in the first
    step.
    """
    if setup.transformer.hybrid_context_parallel:
        yield (
            "hybrid_context_parallel needs process groups and samples that Bridge does not make: set it to False, "
            "and context_parallel_size for all samples alike"
        )


@rule(seen=MEGATRON)
def pipeline_backend(setup: Setup) -> Iterator[str]:
    """Process groups are of the world's backend, and messages go by it, whatever the configuration says."""
    backend, groups = setup.transformer.pipeline_model_parallel_comm_backend, setup.groups
    made = groups is not None and _backend_of(groups.pp) == backend
    if setup.layout.pp > 1 and backend not in (None, "nccl") and not made:
        yield (
            f"pipeline_model_parallel_comm_backend is {backend}, but the pipeline's process group is of the world's "
            "backend: set it to None, or make the group so"
        )


@rule(seen=MEGATRON)
def ring_exchange(setup: Setup) -> Iterator[str]:
    """An AttributeError in the first step: it needs a custom build of torch."""
    missing = not setup.environment.has_ring_exchange
    if setup.layout.pp > 1 and setup.transformer.use_ring_exchange_p2p and missing:
        yield "this torch has no ring_exchange: set use_ring_exchange_p2p = False"


@rule(seen=MEGATRON)
def tensor_parallel_overlap(setup: Setup) -> Iterator[str]:
    """Transformer Engine asserts in the first forward pass that its buffers were made; layers in PyTorch overlap
    nothing, and do not say so.
    """
    if setup.layout.tp > 1 and setup.transformer.tp_comm_overlap and not setup.environment.has_user_buffers:
        yield (
            "tp_comm_overlap communicates through buffers of Transformer Engine that nobody has made: set it to False, "
            "or call transformer_engine.pytorch.module.base.initialize_ub before the build"
        )


@rule(seen=MEGATRON)
def batch_invariant_kernels(setup: Setup) -> Iterator[str]:
    """Layers say that they are batch-invariant, but the kernels that they call are the usual ones."""
    if setup.transformer.batch_invariant_mode and not setup.environment.is_batch_invariant:
        yield (
            "batch_invariant_mode needs Megatron's own kernels switched on: set it to False, or call "
            "enable_batch_invariant_mode of megatron.core.transformer.custom_layers.batch_invariant_kernels first"
        )


def _backend_of(group: ProcessGroup) -> str:
    import torch.distributed  # heavy, and loaded already where there is a group

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
