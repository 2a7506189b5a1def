"""The build: from a function that builds a stage to the wrapped stages of this rank."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

import torch
from megatron.core.fp8_utils import correct_amax_history_if_needed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.utils import log_single_rank

from bridge.builders import Hook, compose_hooks
from bridge.config import ModelConfig
from bridge.dist.checks.agreement import agree_in_groups, collect_facts, collect_versions, is_alone
from bridge.dist.checks.preflight import Rule, Setup, check
from bridge.dist.checks.rules import RULES
from bridge.dist.checks.rules.layers import describe_rounding
from bridge.dist.checks.rules.machine import describe_slowdown
from bridge.dist.checks.stages import check_optimizer_instances, check_torch
from bridge.dist.engine.environment import inspect_process
from bridge.dist.engine.groups import get_embedding_ranks, get_layout
from bridge.dist.engine.layer_names import check_layer_names
from bridge.dist.engine.meta import NothingInitialised, initialise_stages, load_while_wrapping
from bridge.dist.engine.options import BuildOptions
from bridge.dist.engine.precision import wrap_mixed_precision
from bridge.dist.engine.release import remember_cuda_graphs
from bridge.dist.engine.replicas import check_copies, is_tied, list_user_hooks
from bridge.dist.engine.stages import BuildStage, build_stages
from bridge.dist.engine.tensor_parallel_attributes import set_default_attributes
from bridge.dist.engine.wrap.data_parallel import wrap_data_parallel
from bridge.dist.wrapper import Wrapper

logger = logging.getLogger(__name__)


def build_distributed(
    build_stage: BuildStage[MegatronModule],
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    *,
    options: BuildOptions,
    pre_wrap_hook: Hook,
    post_wrap_hook: Hook,
    model: ModelConfig | None = None,
    rules: Sequence[Rule] = (),
) -> list[MegatronModule]:
    """Run the whole build: agreement of ranks, pre-flight checks, stages, hooks, placement, precision, wrapping.

    ``model``, the whole configuration, and ``rules``, those of its family, are used only for agreement and checks. The
    effects of hooks are checked if ``model`` has any.

    Raises:
        AgreementError: The ranks would build different models.
        PreflightError: The configuration does not fit the process groups or the wrapper.
        CopyError: A pre-wrap hook left copies of a parameter different on ranks that hold it.
        BuilderContractError: Layers of different pipeline stages have the same name.
        HookError: See ``compose_hooks``.
    """
    if not is_alone():  # first: a rank with another configuration would hang in the collectives below
        agree_in_groups(
            collect_facts(config=model or config, options=options, versions=collect_versions()), pg_collection
        )
    layout = get_layout(config, pg_collection)
    setup = Setup(
        transformer=config,
        layout=layout,
        options=options,
        model=model,
        groups=pg_collection,
        embedding_ranks=get_embedding_ranks(pg_collection),
        environment=inspect_process(),
    )
    check(setup, (*RULES, *rules))
    for warning in filter(None, (describe_slowdown(setup), describe_rounding(setup))):
        log_single_rank(logger, logging.WARNING, warning)
    check_torch(options)
    check_optimizer_instances(pg_collection, options)
    with contextlib.ExitStack() as stack:
        if config.init_model_with_meta_device:
            stack.enter_context(torch.device("meta"))
            if not config.perform_initialization:
                stack.enter_context(NothingInitialised())
        built = build_stages(
            build_stage,
            pg_collection,
            vp_size=config.virtual_pipeline_model_parallel_size,
            model_type=options.model_type,
        )
    remember_cuda_graphs(built)
    tied = is_tied(built)  # before the hooks, which may untie it
    is_sharded_from_meta = config.init_model_with_meta_device and options.shards_weights
    with load_while_wrapping() if is_sharded_from_meta else contextlib.nullcontext():
        stages = compose_hooks([pre_wrap_hook])(list(built))
    if model is not None and (hooks := list_user_hooks(model.pre_wrap_hooks)):
        check_copies(stages, pg_collection, tied=tied, hooks=hooks)
    check_layer_names(stages, pg_collection)
    return compose_hooks([post_wrap_hook])(prepare_stages(stages, config, pg_collection, options))


def prepare_stages(
    stages: list[MegatronModule],
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    options: BuildOptions,
) -> list[MegatronModule]:
    """Move built stages to the device, and apply mixed precision and the data-parallel wrapper."""
    set_default_attributes(stages)
    _log_parameters(stages, pg_collection)  # before wrapping: FSDP leaves each rank only a part

    on_meta = config.init_model_with_meta_device
    if not (on_meta or options.wrapper is Wrapper.TORCH_FSDP2):  # FSDP2 moves the stages itself
        _move_to_device(stages)
    stages = wrap_mixed_precision(
        stages,
        config,
        options.mixed_precision_wrapper,
        one_precision=options.wrapper is Wrapper.TORCH_FSDP2,
    )
    if on_meta and not options.shards_weights:
        initialise_stages(stages, pg_collection)
    correct_amax_history_if_needed(list(stages))  # casting changed the amax history of FP8 modules
    if options.wrapper is Wrapper.NONE:
        return stages
    return wrap_data_parallel(stages, pg_collection, options)


def _move_to_device(stages: Sequence[MegatronModule]) -> None:
    """Move the stages to this rank's CUDA device (under the CPU runtime they are already there)."""
    for stage in stages:
        stage.cuda(torch.cuda.current_device())


def _log_parameters(stages: list[MegatronModule], pg_collection: ProcessGroupCollection) -> None:
    """Log the number of parameters, once for each pair of tensor and pipeline rank."""
    if pg_collection.dp.rank() == 0 and pg_collection.cp.rank() == 0:
        parameters = sum(parameter.numel() for stage in stages for parameter in stage.parameters())
        coordinates = (pg_collection.tp.rank(), pg_collection.pp.rank())
        logger.info("parameters on (tensor, pipeline) rank %s: %s", coordinates, f"{parameters:,}")
