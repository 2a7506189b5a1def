"""ModelBuilder, the abstract class that builds the pipeline stages of a model from its configuration."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar, get_args, get_origin

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.module import Float16Module

from bridge.config import ModelConfig
from bridge.config.schema.registry_state import register_builder

ModelT = TypeVar("ModelT", bound=MegatronModule)
BuildConfigT = TypeVar("BuildConfigT", bound=ModelConfig)

MixedPrecisionWrapper = Callable[[Any, MegatronModule], MegatronModule]


class ModelBuilder(ABC, Generic[ModelT, BuildConfigT]):
    """Builds models of type ``ModelT`` from a configuration of type ``BuildConfigT``.

    A builder is a factory without side effects: it does not change its configuration, and two calls build the same
    model twice. Defining a concrete subclass registers it, so that ``_builder_`` in a document can name it.
    """

    def __init__(self, model_config: BuildConfigT) -> None:
        accepted = accepted_config(type(self))
        if not isinstance(model_config, accepted):
            raise TypeError(
                f"{type(self).__name__} expects a {accepted.__name__}, got {type(model_config).__name__}: "
                "use the builder that get_builder_cls() of this configuration returns"
            )
        # Annotated, because type checkers would narrow it to what isinstance found.
        self._model_config: BuildConfigT = model_config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not inspect.isabstract(cls):
            register_builder(cls, accepted_config(cls))

    @abstractmethod
    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> ModelT:
        """Build one pipeline stage, neither wrapped nor moved to a device.

        Args:
            pg_collection: The process groups of this rank.
            pre_process: Whether the stage holds the embedding; None: decided by its position in the pipeline.
            post_process: Whether the stage holds the output layer; None: decided by its position in the pipeline.
            vp_stage: Index of the virtual pipeline stage; None without a virtual pipeline.
        """

    @abstractmethod
    def build_distributed_models(
        self,
        pg_collection: ProcessGroupCollection,
        ddp_config: DistributedDataParallelConfig | None = None,
        overlap_param_gather_with_optimizer_step: bool = False,
        use_megatron_fsdp: bool = False,
        use_torch_fsdp2: bool = False,
        wrap_with_ddp: bool = True,
        data_parallel_random_init: bool = True,
        mixed_precision_wrapper: MixedPrecisionWrapper | None = Float16Module,
        model_type: ModelType = ModelType.encoder_or_decoder,
    ) -> list[ModelT]:
        """Build all stages of this rank and wrap them for training.

        Args:
            pg_collection: The process groups of this rank.
            ddp_config: Options of the data-parallel wrapper, not modified. Required if ``wrap_with_ddp`` is true.
            overlap_param_gather_with_optimizer_step: Put all parameters of a stage into one bucket, which that overlap
                requires.
            use_megatron_fsdp: Wrap with Megatron-FSDP instead of DDP.
            use_torch_fsdp2: Wrap with torch FSDP2 instead of DDP.
            wrap_with_ddp: Whether to apply a data-parallel wrapper.
            data_parallel_random_init: Broadcast the weights of the first data-parallel rank to the others.
            mixed_precision_wrapper: Wraps each stage if the configuration sets fp16 or bf16; None: no stage is wrapped.
            model_type: Set on each stage as ``model_type``.

        Returns:
            One element per virtual pipeline stage; a single element without a virtual pipeline.
        """


def accepted_config(builder: type) -> type[ModelConfig]:
    """Return the configuration class that a builder class accepts; ModelConfig if it declares none.

    It is read from the generic bases of the class: ``class B(ModelBuilder[Model, Config])`` accepts ``Config``.
    """
    for cls in builder.__mro__:
        for base in getattr(cls, "__orig_bases__", ()):
            for argument in get_args(base) if _is_builder(get_origin(base)) else ():
                if isinstance(argument, type) and issubclass(argument, ModelConfig):
                    return argument
    return ModelConfig


def _is_builder(origin: object) -> bool:
    return isinstance(origin, type) and issubclass(origin, ModelBuilder)
