"""Kinds of layers and how they are initialised."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule
from bridge.dist.wrapper import Wrapper


@rule(seen=MEGATRON)
def experts_without_sequence_parallelism(setup: Setup) -> Iterator[str]:
    """Layers with experts raise a ValueError in the first forward pass of training."""
    config, wrapper = setup.transformer, setup.options.wrapper
    if config.num_moe_experts and setup.layout.tp > 1 and not config.sequence_parallel and wrapper is not Wrapper.NONE:
        yield "a model with experts does not train with tp > 1 alone: set sequence_parallel = True, or tp = 1"


@rule(seen=MEGATRON)
def meta_device_and_cpu_initialization(setup: Setup) -> Iterator[str]:
    """Parallel layers end on the meta device without an initialiser, and losses are NaN."""
    if setup.transformer.init_model_with_meta_device and setup.transformer.use_cpu_initialization:
        yield "init_model_with_meta_device and use_cpu_initialization leave weights uninitialised: set one to False"


RULES: tuple[Rule, ...] = (
    experts_without_sequence_parallelism,
    meta_device_and_cpu_initialization,
)
