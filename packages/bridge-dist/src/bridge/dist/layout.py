"""A cluster layout: how many ranks share each kind of parallelism, and the process groups that follow from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed
import torch.distributed.distributed_c10d
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from bridge.dist.agreement import LONGEST_WAIT, agree_in_world, facts
from bridge.dist.documents import CONFIG_FIELDS
from bridge.dist.errors import LayoutError
from bridge.dist.internals import clear_sharding_caches
from bridge.dist.wrap import release_sharded_models


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of tensor, pipeline, virtual pipeline, context, expert, expert-tensor and data parallelism.

    A world holds ``tp * cp * dp * pp`` ranks. For expert layers the same ranks are ``etp * ep`` times their own data
    parallelism times ``pp``; ``etp`` is ``tp`` unless it is given.

    Raises:
        LayoutError: A size is not positive, or the expert sizes do not divide the ranks of a pipeline stage.
    """

    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        assert self.etp is not None
        for name, size in asdict(self).items():
            if size < 1:
                raise LayoutError(f"{name}={size}: a parallel size is at least 1")
        stage, expert = self.tp * self.cp * self.dp, self.etp * self.ep
        if stage % expert:
            raise LayoutError(
                f"etp x ep = {self.etp} x {self.ep} = {expert} does not divide the {stage} ranks of a pipeline stage "
                f"(tp x cp x dp = {self.tp} x {self.cp} x {self.dp}): choose ep and etp so that it does"
            )

    @classmethod
    def of(cls, config: TransformerConfig, world_size: int, *, dp: int | None = None) -> Layout:
        """Return the layout of a configuration on ``world_size`` ranks.

        Args:
            config: Gives every size but dp.
            world_size: Number of ranks.
            dp: The data-parallel size that is expected, if one is.

        Raises:
            LayoutError: ``world_size`` is not a multiple of tp x pp x cp, or leaves another dp than the expected one.
        """
        tp, pp, cp = (getattr(config, CONFIG_FIELDS[name]) for name in ("tp", "pp", "cp"))
        model = tp * pp * cp
        needed = f"tp x pp x cp = {tp} x {pp} x {cp} = {model}"
        if world_size % model:
            raise LayoutError(
                f"{world_size} ranks do not fit {needed}: start a multiple of {model} ranks, or lower tp, pp or cp"
            )
        if dp is not None and world_size != model * dp:
            raise LayoutError(
                f"{world_size} ranks do not fit {needed} with dp = {dp}: "
                f"that takes {model * dp} ranks (dp is {world_size // model} with {world_size})"
            )
        return cls(
            tp=tp,
            pp=pp,
            vp=config.virtual_pipeline_model_parallel_size or 1,
            cp=cp,
            ep=config.expert_model_parallel_size,
            etp=config.expert_tensor_parallel_size,
            dp=world_size // model,
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        """The sizes above one, such as ``tp2 pp2``; ``one rank`` when there are none; etp where it is not tp."""
        sizes = asdict(self)
        if self.etp == self.tp:
            del sizes["etp"]
        return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one rank"


def says_how_to_split(config: TransformerConfig) -> bool:
    """Whether a configuration gives the layers of pipeline stages itself, so that they need not divide evenly."""
    return bool(
        config.pipeline_model_parallel_layout is not None
        or config.num_layers_in_first_pipeline_stage is not None
        or config.num_layers_in_last_pipeline_stage is not None
        or config.account_for_embedding_in_pipeline_split
        or config.account_for_loss_in_pipeline_split
    )


def create_process_groups(
    layout: Layout, *, timeout: timedelta = LONGEST_WAIT, optimizer_instances: int = 1
) -> ProcessGroupCollection:
    """Create Megatron's process groups for a layout in the initialised world, and return this rank's.

    Collective: every rank calls it with the same layout. The world may be of any backend, the fake one too.

    Args:
        layout: The sizes.
        timeout: How long a collective of any of these groups may wait for the other ranks.
        optimizer_instances: Copies of the distributed optimizer's state, each sharded over its own part of the
            data-parallel ranks.

    Raises:
        AgreementError: The ranks do not all ask for this layout.
        LayoutError: The world has another size than the layout, or its data-parallel ranks do not divide into the
            optimizer instances.
    """
    agree_in_world(facts(layout=layout, optimizer_instances=optimizer_instances))
    world_size = torch.distributed.get_world_size()
    if world_size != layout.world_size:
        raise LayoutError(f"the layout {layout} takes {layout.world_size} ranks, the world has {world_size}")
    if (layout.dp * layout.cp) % optimizer_instances:
        raise LayoutError(
            f"{optimizer_instances} optimizer instances do not divide the {layout.dp * layout.cp} ranks of "
            f"dp x cp = {layout.dp} x {layout.cp}: choose a divisor"
        )
    fake = torch.distributed.get_backend() == "fake"
    global _existing
    _existing = frozenset(_all_groups())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 and layout.pp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_distributed_optimizer_instances=optimizer_instances,
        create_gloo_process_groups=not fake,  # gloo would look for the other ranks
        distributed_timeout_minutes=timeout / timedelta(minutes=1),  # type: ignore[arg-type]  # fractions are fine
    )
    if not fake:
        # Megatron-core 0.19.2 gives none to the gloo group of the experts' data parallelism.
        for group in _all_groups():
            if group not in _existing:
                _set_timeout(timeout, group)
    groups: ProcessGroupCollection = ProcessGroupCollection.use_mpu_process_groups()
    return groups


def destroy_process_groups() -> None:
    """Destroy Megatron's process groups, and those that were made after them, as FSDP does; the world stays."""
    parallel_state.destroy_model_parallel()  # which forgets them only
    release_sharded_models()
    # megatron-core 0.19.2 remembers what these computed, with the module: its group, and under Megatron-FSDP by way of
    # its hooks the whole model.
    for rotary in (RotaryEmbedding, YarnRotaryEmbedding):
        rotary.forward.cache_clear()
    for group in _all_groups():
        if group not in _existing and group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    clear_sharding_caches()


# Public, and the other deprecated, in torch 2.15; not there in 2.6.
_set_timeout = getattr(torch.distributed, "set_timeout", None) or torch.distributed.distributed_c10d._set_pg_timeout

_existing: frozenset[torch.distributed.ProcessGroup] = frozenset()
"""The groups that were there before Megatron's."""


def _all_groups() -> list[torch.distributed.ProcessGroup]:
    return list(torch.distributed.distributed_c10d._world.pg_map)
