"""The options of a distributed build, checked when they are created."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.transformer.module import Float16Module

from bridge.builders import MixedPrecisionWrapper
from bridge.dist.errors import OptionsError
from bridge.dist.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options by which the stages of a rank are wrapped, named like those of ``build_distributed_models``.

    ``use_layer_wise_distributed_optimizer`` and ``use_layer_wise_param_layout`` are described in
    ``DistributedModelBuilder``, the others in ``ModelBuilder``.

    Raises:
        OptionsError: The options contradict each other.
    """

    ddp_config: DistributedDataParallelConfig | None = None
    overlap_param_gather_with_optimizer_step: bool = False
    use_megatron_fsdp: bool = False
    use_torch_fsdp2: bool = False
    wrap_with_ddp: bool = True
    data_parallel_random_init: bool = True
    mixed_precision_wrapper: MixedPrecisionWrapper | None = Float16Module
    model_type: ModelType = ModelType.encoder_or_decoder
    use_layer_wise_distributed_optimizer: bool = False
    use_layer_wise_param_layout: bool = True

    def __post_init__(self) -> None:
        if self.use_megatron_fsdp and self.use_torch_fsdp2:
            raise OptionsError(
                "use_megatron_fsdp and use_torch_fsdp2 are both True, but a stage has one wrapper: set one to False"
            )
        if self.wrap_with_ddp and self.ddp_config is None:
            raise OptionsError(
                "wrap_with_ddp is True but ddp_config is None: "
                "pass a DistributedDataParallelConfig, or wrap_with_ddp=False for unwrapped stages"
            )
        if self.ddp_config is not None and self.ddp_config.use_megatron_fsdp and not self.use_megatron_fsdp:
            raise OptionsError(
                "ddp_config.use_megatron_fsdp is True but use_megatron_fsdp is False: set both to the same value "
                "(Megatron's optimizer reads the first and would look for buffers that the wrapper does not have)"
            )
        if self.use_layer_wise_distributed_optimizer:
            self._check_layer_wise()

    def _check_layer_wise(self) -> None:
        if self.wrapper is not Wrapper.DDP:
            raise OptionsError(
                f"use_layer_wise_distributed_optimizer needs the ddp wrapper, got {self.wrapper}: "
                "wrap with ddp, or set it to False"
            )
        assert self.ddp_config is not None
        if self.ddp_config.use_distributed_optimizer and not self.use_layer_wise_param_layout:
            raise OptionsError(
                "use_layer_wise_distributed_optimizer without use_layer_wise_param_layout needs the whole gradients on "
                "each rank: set ddp_config.use_distributed_optimizer to False, or use_layer_wise_param_layout to True"
            )

    @property
    def wrapper(self) -> Wrapper:
        """The data-parallel wrapper that these options select."""
        if not self.wrap_with_ddp:
            return Wrapper.NONE
        if self.use_megatron_fsdp:
            return Wrapper.MEGATRON_FSDP
        return Wrapper.TORCH_FSDP2 if self.use_torch_fsdp2 else Wrapper.DDP

    @property
    def shards_weights(self) -> bool:
        """Whether the wrapper shards every weight over the data-parallel ranks."""
        if self.wrapper is Wrapper.MEGATRON_FSDP:
            assert self.ddp_config is not None
            return self.ddp_config.data_parallel_sharding_strategy == "optim_grads_params"
        return self.wrapper is Wrapper.TORCH_FSDP2

    @property
    def has_layer_wise_layout(self) -> bool:
        """Whether DDP's buffers are laid out so that each parameter is whole on one rank, for Muon."""
        return self.use_layer_wise_distributed_optimizer and self.use_layer_wise_param_layout
