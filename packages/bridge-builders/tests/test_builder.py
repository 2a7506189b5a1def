"""The interface of model builders, and their registration for documents."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from megatron.core.enums import ModelType
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.module import Float16Module

from bridge.builders import BuildConfigT, ModelBuilder, ModelT, accepted_config
from bridge.config import ModelConfig


@dataclass
class BlockConfig(ModelConfig):
    builder: ClassVar[str] = f"{__name__}.BlockBuilder"
    width: int = 1


@dataclass
class WideBlockConfig(BlockConfig):
    pass


@dataclass
class OtherConfig(ModelConfig):
    builder: ClassVar[str] = f"{__name__}.Nowhere"


class BlockBuilder(ModelBuilder[MegatronModule, BlockConfig]):
    def build_model(self, *args: Any, **kwargs: Any) -> MegatronModule:
        raise NotImplementedError

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[MegatronModule]:
        raise NotImplementedError


class DerivedBlockBuilder(BlockBuilder):
    pass


class ConcreteBase(ModelBuilder[ModelT, BuildConfigT]):
    def build_model(self, *args: Any, **kwargs: Any) -> ModelT:
        raise NotImplementedError

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[ModelT]:
        raise NotImplementedError


class ThroughBase(ConcreteBase[MegatronModule, WideBlockConfig]):
    pass


def test_signatures_match_megatron_training() -> None:
    """Callers pass these parameters by name and by position: names, order and defaults must be the same."""
    empty = inspect.Parameter.empty
    assert _parameter_defaults(ModelBuilder.build_model) == [
        ("self", empty),
        ("pg_collection", empty),
        ("pre_process", None),
        ("post_process", None),
        ("vp_stage", None),
    ]
    assert _parameter_defaults(ModelBuilder.build_distributed_models) == [
        ("self", empty),
        ("pg_collection", empty),
        ("ddp_config", None),
        ("overlap_param_gather_with_optimizer_step", False),
        ("use_megatron_fsdp", False),
        ("use_torch_fsdp2", False),
        ("wrap_with_ddp", True),
        ("data_parallel_random_init", True),
        ("mixed_precision_wrapper", Float16Module),
        ("model_type", ModelType.encoder_or_decoder),
    ]
    assert ModelBuilder.__abstractmethods__ == {"build_model", "build_distributed_models"}


def test_parameter_order_matches_the_installed_megatron_training() -> None:
    from megatron.training.models.base import ModelBuilder as MegatronModelBuilder

    for method in ("build_model", "build_distributed_models"):
        bridge, megatron = getattr(ModelBuilder, method), getattr(MegatronModelBuilder, method)
        assert [name for name, _ in _parameter_defaults(bridge)] == [name for name, _ in _parameter_defaults(megatron)]


def test_a_builder_keeps_its_configuration_and_rejects_another_class() -> None:
    config = WideBlockConfig()
    assert BlockBuilder(config)._model_config is config
    with pytest.raises(TypeError, match="BlockBuilder expects a BlockConfig, got OtherConfig"):
        BlockBuilder(OtherConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("builder", "config"),
    [(BlockBuilder, BlockConfig), (DerivedBlockBuilder, BlockConfig), (ThroughBase, WideBlockConfig)],
)
def test_config_class_is_inferred_from_the_generic_bases(builder: type, config: type) -> None:
    assert accepted_config(builder) is config


def test_defining_a_builder_registers_it_for_documents() -> None:
    document = BlockConfig(width=3).as_dict() | {"_builder_": f"{__name__}.DerivedBlockBuilder"}
    config = ModelConfig.from_dict(document)
    assert config.get_builder_cls() is DerivedBlockBuilder
    assert BlockConfig().get_builder_cls() is BlockBuilder
    with pytest.raises(ValueError, match="WideBlockConfig"):
        ModelConfig.from_dict(document | {"_builder_": f"{__name__}.ThroughBase"})


def _parameter_defaults(function: Any) -> list[tuple[str, Any]]:
    return [(name, parameter.default) for name, parameter in inspect.signature(function).parameters.items()]
