"""The flags of a distributed build as one checked, frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.transformer.module import Float16Module

from bridge.builders import MixedPrecisionWrapper
from bridge.dist.errors import OptionsError


class Wrapper(StrEnum):
    """What a stage is wrapped with for data parallelism."""

    NONE = "none"
    DDP = "ddp"
    MEGATRON_FSDP = "megatron-fsdp"
    TORCH_FSDP2 = "torch-fsdp2"


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How the stages of this rank are wrapped; the parameters of ``ModelBuilder.build_distributed_models`` by name.

    Raises:
        OptionsError: On contradictory options, when the value is made, so before anything is built.
    """

    ddp_config: DistributedDataParallelConfig | None = None
    overlap_param_gather_with_optimizer_step: bool = False
    use_megatron_fsdp: bool = False
    use_torch_fsdp2: bool = False
    wrap_with_ddp: bool = True
    data_parallel_random_init: bool = True
    mixed_precision_wrapper: MixedPrecisionWrapper | None = Float16Module
    model_type: ModelType = ModelType.encoder_or_decoder

    def __post_init__(self) -> None:
        if self.use_megatron_fsdp and self.use_torch_fsdp2:
            raise OptionsError(
                "use_megatron_fsdp and use_torch_fsdp2 are both True: a stage has one data-parallel wrapper, choose one"
            )
        if self.wrap_with_ddp and self.ddp_config is None:
            raise OptionsError(
                "wrap_with_ddp is True but ddp_config is None: "
                "pass a DistributedDataParallelConfig, or wrap_with_ddp=False for bare stages"
            )

    @property
    def wrapper(self) -> Wrapper:
        """The data-parallel wrapper that these options ask for."""
        if not self.wrap_with_ddp:
            return Wrapper.NONE
        if self.use_megatron_fsdp:
            return Wrapper.MEGATRON_FSDP
        return Wrapper.TORCH_FSDP2 if self.use_torch_fsdp2 else Wrapper.DDP
