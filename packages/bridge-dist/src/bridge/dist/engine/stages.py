"""Build the pipeline stages of this rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model

from bridge.dist.engine.tensor_parallel_attributes import mark_split_parameters

StageT = TypeVar("StageT", bound=MegatronModule, covariant=True)


class BuildStage(Protocol[StageT]):
    """The signature of ``ModelBuilder.build_model``."""

    def __call__(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> StageT: ...


def build_stages(
    build_stage: BuildStage[StageT],
    pg_collection: ProcessGroupCollection,
    *,
    vp_size: int | None,
    model_type: ModelType = ModelType.encoder_or_decoder,
) -> list[StageT]:
    """Build every stage of this rank, first to last.

    Args:
        build_stage: Builds one stage.
        pg_collection: The process groups of this rank. ``pp`` gives its position in the pipeline.
        vp_size: Virtual pipeline stages per rank. The result is a single stage if it is None or pp = 1.
        model_type: Set on each stage.

    Returns:
        ``vp_size`` stages, or one. Only the first stage of the whole pipeline has ``pre_process``, only the last one
        ``post_process``.
    """
    first, last = is_pp_first_stage(pg_collection.pp), is_pp_last_stage(pg_collection.pp)
    if vp_size is None or pg_collection.pp.size() == 1:
        stages = [build_stage(pg_collection, pre_process=first, post_process=last)]
    else:
        stages = [
            build_stage(
                pg_collection,
                pre_process=first and vp_stage == 0,
                post_process=last and vp_stage == vp_size - 1,
                vp_stage=vp_stage,
            )
            for vp_stage in range(vp_size)
        ]
    for stage in stages:
        mark_split_parameters(stage)
        setattr(stage, "model_type", model_type)  # noqa: B010 - mypy: MegatronModule does not declare `model_type`
    return stages


def unwrap(stage: MegatronModule) -> MegatronModule:
    """Return the model of a stage, without its wrappers.

    Megatron-FSDP has two wrappers, and ``unwrap_model`` of megatron-core 0.19.2 removes only the outer one.
    """
    model: MegatronModule = unwrap_model(stage)
    while isinstance(model, MegatronFSDP):
        model = unwrap_model(model.module)
    return model


def strip_wrappers(name: str) -> str:
    """Return the name that a parameter of a wrapped stage has in the model."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def identify_layers(stages: Sequence[MegatronModule]) -> str:
    """Return which layers the stages use: ``transformer_engine``, or ``pytorch`` if none is of Transformer Engine."""
    kinds = {kind for stage in stages for module in stage.modules() for kind in type(module).__mro__}
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    return "transformer_engine" if "transformer_engine" in packages else "pytorch"
