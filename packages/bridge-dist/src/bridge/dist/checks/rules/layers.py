"""Rules about kinds of layers and their initialisation."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule
from bridge.dist.checks.rules.sizes import has_dense_layers
from bridge.dist.wrapper import Wrapper


def describe_rounding(setup: Setup) -> str | None:
    """Return a warning about gradients of lower precision than the configuration asks for; None if there is none."""
    config = setup.transformer
    fused = config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "native"
    if not fused or config.bf16:
        return None
    return (
        "the fused cross entropy of megatron-core 0.19.2 rounds the gradients of logits to bf16, and this model "
        f"computes in {'fp16' if config.fp16 else 'fp32'}: set cross_entropy_loss_fusion = False to keep its precision"
    )


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


@rule(observed_in=MEGATRON)
def fused_activation(setup: Setup) -> Iterator[str]:
    """The first forward pass raises a ValueError: only some activations have a fused function."""
    config = setup.transformer
    if not config.bias_activation_fusion:
        return
    function, experts = _get_activation(setup), config.num_moe_experts is not None
    dense = has_dense_layers(setup) or (experts and config.moe_shared_expert_intermediate_size is not None)
    missing = {
        "silu": not config.gated_linear_unit and (dense or experts) and "without gates",
        "quick_gelu": dense and "outside of experts",
        "gelu": experts and "in experts",
    }
    if where := missing.get(function):
        yield f"bias_activation_fusion does not support {function} {where}: set bias_activation_fusion = False"


def _get_activation(setup: Setup) -> str:
    """Return the name of the activation function, without that of its module."""
    function: object = setup.transformer.activation_func  # in a document, its dotted name
    return str(getattr(function, "__name__", function)).rpartition(".")[-1]


@rule(observed_in=MEGATRON)
def fused_dropout_of_experts_with_biases(setup: Setup) -> Iterator[str]:
    """The build raises an AssertionError."""
    config = setup.transformer
    grouped = config.num_moe_experts is not None and config.moe_grouped_gemm
    if grouped and config.add_bias_linear and config.bias_dropout_fusion:
        yield "bias_dropout_fusion does not support experts with biases: set bias_dropout_fusion = False"


RULES: tuple[Rule, ...] = (
    recomputed_mlp_with_biases,
    fused_activation,
    fused_dropout_of_experts_with_biases,
    experts_without_sequence_parallelism,
    meta_device_and_cpu_initialization,
)
