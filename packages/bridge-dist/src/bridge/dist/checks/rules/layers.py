"""Rules about kinds of layers and their initialisation."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule
from bridge.dist.checks.rules.sizes import has_dense_layers
from bridge.dist.wrapper import Wrapper


@rule(observed_in=MEGATRON)
def experts_without_sequence_parallelism(setup: Setup) -> Iterator[str]:
    """Expert layers raise a ValueError in the first forward pass of training."""
    config, wrapper = setup.transformer, setup.options.wrapper
    if config.num_moe_experts and setup.layout.tp > 1 and not config.sequence_parallel and wrapper is not Wrapper.NONE:
        yield "training experts with tp > 1 needs sequence parallelism: set sequence_parallel = True, or tp = 1"


@rule(observed_in=MEGATRON)
def meta_device_and_cpu_initialization(setup: Setup) -> Iterator[str]:
    """Parallel layers are left on the meta device without an initialiser, and losses are NaN."""
    if setup.transformer.init_model_with_meta_device and setup.transformer.use_cpu_initialization:
        yield "init_model_with_meta_device and use_cpu_initialization leave weights uninitialised: set one to False"


@rule(observed_in=MEGATRON, no_reproduction="the backward pass does not terminate")
def recomputed_mlp_with_biases(setup: Setup) -> Iterator[str]:
    """Recomputing an MLP that returns its bias re-enters the checkpointed function forever."""
    config = setup.transformer
    recomputed = config.recompute_granularity == "selective" and "mlp" in (config.recompute_modules or ())
    if recomputed and config.add_bias_linear and has_dense_layers(setup):
        yield (
            "an MLP with biases cannot be recomputed: set add_bias_linear = False, or remove mlp from recompute_modules"
        )


RULES: tuple[Rule, ...] = (
    recomputed_mlp_with_biases,
    experts_without_sequence_parallelism,
    meta_device_and_cpu_initialization,
)
