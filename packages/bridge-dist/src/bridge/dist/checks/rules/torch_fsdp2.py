"""Rules about torch FSDP2."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule
from bridge.dist.wrapper import Wrapper


@rule(observed_in=MEGATRON)
def torch_fsdp2_experts(setup: Setup) -> Iterator[str]:
    """Experts are sharded over ranks that hold other experts: losses are wrong, or the optimizer fails."""
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and setup.layout.ep > 1:
        yield "torch FSDP2 computes wrong losses with expert parallelism: set ep = 1, or wrap with ddp"


@rule(observed_in=MEGATRON)
def torch_fsdp2_expert_tensor_parallelism(setup: Setup) -> Iterator[str]:
    """Gradients of experts are reduced over the data-parallel ranks of other layers: losses are wrong."""
    layout = setup.layout
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and setup.transformer.num_moe_experts and layout.etp != layout.tp:
        yield (
            f"torch FSDP2 computes wrong losses if experts have another tensor-parallel size (etp = {layout.etp}) than "
            f"other layers (tp = {layout.tp}): set etp = {layout.tp}, or wrap with ddp or megatron-fsdp"
        )


@rule(observed_in=MEGATRON)
def torch_fsdp2_tied_embeddings(setup: Setup) -> Iterator[str]:
    """The tied weight is sharded in only one of its uses: the first forward pass raises a mixed-tensor error."""
    tied = getattr(setup.model, "share_embeddings_and_output_weights", False)
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and tied:
        yield (
            "torch FSDP2 fails with tied embeddings: set share_embeddings_and_output_weights = False, "
            "or wrap with ddp or megatron-fsdp"
        )


@rule(observed_in=MEGATRON)
def torch_fsdp2_distributed_optimizer(setup: Setup) -> Iterator[str]:
    """Megatron's distributed optimizer looks for DDP's buffers: its constructor raises a TypeError. FSDP2 shards the
    optimizer's state itself.
    """
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and setup.ddp.use_distributed_optimizer:
        yield "torch FSDP2 does not support Megatron's distributed optimizer: set use_distributed_optimizer = False"


@rule(observed_in=MEGATRON, no_reproduction="the kernel runs on a GPU only")
def torch_fsdp2_fused_gradients(setup: Setup) -> Iterator[str]:
    """The fused kernel accumulates into a buffer of Megatron (``main_grad``) that FSDP2's parameters do not have."""
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and setup.transformer.gradient_accumulation_fusion:
        yield "torch FSDP2 does not support fused gradient accumulation: set gradient_accumulation_fusion = False"


@rule(observed_in=MEGATRON, no_reproduction="it needs Transformer Engine")
def torch_fsdp2_quantized_parameters(setup: Setup) -> Iterator[str]:
    """FSDP2 cannot gather the quantised parameters of Transformer Engine 2. megatron.training disables them at
    start-up.
    """
    quantized = [name for name in ("fp8_param", "fp4_param") if getattr(setup.transformer, name)]
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and quantized:
        yield f"torch FSDP2 does not support FP8 or FP4 parameters: set {' and '.join(quantized)} to False"


RULES: tuple[Rule, ...] = (
    torch_fsdp2_experts,
    torch_fsdp2_expert_tensor_parallelism,
    torch_fsdp2_tied_embeddings,
    torch_fsdp2_distributed_optimizer,
    torch_fsdp2_fused_gradients,
    torch_fsdp2_quantized_parameters,
)
