"""Checks that need built stages, process groups or the installed version of torch.

Pre-flight rules check the configuration earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from bridge.dist.checks.preflight import Options
from bridge.dist.errors import PreflightError
from bridge.dist.internals import TESTED_THROUGHOUT, TORCH
from bridge.dist.wrapper import Wrapper

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import MegatronModule


def check_torch(options: Options) -> None:
    """Check that the installed torch is not too old for the wrapper.

    Raises:
        PreflightError: It is too old.
    """
    if options.wrapper is Wrapper.TORCH_FSDP2 and TORCH < TESTED_THROUGHOUT:
        needs = f"needs torch 2.11 or later, not {torch.__version__}"
        raise PreflightError([f"{options.wrapper} {needs}: wrap with ddp or megatron-fsdp"])


def check_optimizer_instances(pg_collection: ProcessGroupCollection, options: Options) -> None:
    """Check that the process groups match the number of instances of the distributed optimizer.

    Raises:
        PreflightError: They do not.
    """
    within = getattr(pg_collection, "intra_dp_cp", None)
    if options.ddp_config is None or not options.ddp_config.use_distributed_optimizer or within is None:
        return
    wanted = options.ddp_config.num_distributed_optimizer_instances
    there = pg_collection.dp_cp.size() // within.size()
    if wanted != there:
        raise PreflightError(
            [
                f"num_distributed_optimizer_instances is {wanted}, the process groups were made for {there}: "
                "use the same number in both places"
            ]
        )


def check_stages(stages: Sequence[MegatronModule], options: Options) -> None:
    """Check that the wrapper can train the built stages.

    Raises:
        PreflightError: The stages are known to fail with this wrapper.
    """
    assert options.ddp_config is not None
    modules = [module for stage in stages for module in stage.modules()]
    tied = any(getattr(module, "share_embeddings_and_output_weights", False) for module in modules)
    if tied and options.wrapper is Wrapper.TORCH_FSDP2:
        # Seen in megatron-core 0.19.2: the tied weight is sharded in one of its uses only.
        raise PreflightError(["torch FSDP2 fails with tied embeddings: untie them, or wrap with ddp or megatron-fsdp"])
    if options.wrapper is Wrapper.MEGATRON_FSDP and any("_weight_mask" in module._buffers for module in modules):
        # Seen in megatron-core 0.19.2 with nvidia-modelopt 0.47: the process dies.
        raise PreflightError(["Megatron-FSDP crashes with weights that ModelOpt masks (sparsity): wrap with ddp"])
    frozen = not all(parameter.requires_grad for stage in stages for parameter in stage.parameters())
    strategy = options.ddp_config.data_parallel_sharding_strategy
    if frozen and options.wrapper is Wrapper.MEGATRON_FSDP and strategy == "optim":
        # Seen in megatron-core 0.19.2: an AttributeError in the first step, which looks for their gradients.
        raise PreflightError(
            [
                "Megatron-FSDP fails with frozen parameters when data_parallel_sharding_strategy is optim: "
                "choose optim_grads, optim_grads_params or no_shard, or wrap with ddp"
            ]
        )
