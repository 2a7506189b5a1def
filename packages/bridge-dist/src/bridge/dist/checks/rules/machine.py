"""Rules about GPUs, their libraries and the environment of a process. A document alone does not describe these."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule
from bridge.dist.wrapper import Wrapper

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = (10, 0)
_OFFLOAD = "NVTE_CPU_OFFLOAD_V1"


@rule(observed_in=MEGATRON, no_reproduction="it depends on how a GPU orders kernels")
def connections_of_split_layers(setup: Setup) -> Iterator[str]:
    """Before Blackwell, a GPU with several connections may start a computation before the communication that should
    overlap with it, and Megatron's layers rely on one connection. If the variable is not set, a warning is logged.
    """
    connections = setup.environment.variables.get(_CONNECTIONS)
    if _needs_one_connection(setup) and connections not in (None, "1"):
        yield (
            f"tensor and context parallelism on this GPU need {_CONNECTIONS} = 1, got {connections}: "
            "set it to 1 in the environment of every rank"
        )


def describe_slowdown(setup: Setup) -> str | None:
    """Return a warning about a setup that passes but may be slow; None if there is nothing to warn about."""
    if _needs_one_connection(setup) and _CONNECTIONS not in setup.environment.variables:
        return (
            f"{_CONNECTIONS} is not set: with tensor or context parallelism on this GPU, set it to 1 in the "
            "environment of every rank, or communication may wait for the computation that it should overlap with"
        )
    return None


def _needs_one_connection(setup: Setup) -> bool:
    capability = setup.environment.compute_capability
    before_blackwell = capability is not None and capability < _BLACKWELL
    overlaps_otherwise = setup.is_fsdp or setup.transformer.overlap_moe_expert_parallel_comm
    return before_blackwell and (setup.layout.tp > 1 or setup.layout.cp > 1) and not overlaps_otherwise


@rule(observed_in=MEGATRON, no_reproduction="it depends on how a GPU orders kernels")
def connections_of_fsdp(setup: Setup) -> Iterator[str]:
    """With a single connection, weights that FSDP prefetches wait for the computation that they should overlap with."""
    has_gpu = setup.environment.compute_capability is not None
    if has_gpu and setup.is_fsdp and setup.environment.variables.get(_CONNECTIONS) == "1":
        yield (
            f"{setup.options.wrapper} cannot overlap communication with {_CONNECTIONS} = 1: remove it from the "
            "environment of every rank, or wrap with ddp"
        )


_DETERMINISTIC = {
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
}
"""Values that make NCCL, Transformer Engine and cuBLAS deterministic, as megatron.training requires them.

NCCL_ALGO may be a list, separated by commas.
"""


@rule(observed_in=MEGATRON, no_reproduction="a CPU adds in a fixed order anyway")
def deterministic_libraries(setup: Setup) -> Iterator[str]:
    """Layers choose deterministic algorithms, but the libraries that they call keep the faster ones."""
    if not setup.transformer.deterministic_mode or setup.environment.compute_capability is None:
        return
    for name in ("cross_entropy_loss_fusion", "tp_comm_overlap"):
        if getattr(setup.transformer, name):
            yield f"deterministic_mode cannot be combined with {name}: set one of them to False"
    for name, allowed in _DETERMINISTIC.items():
        values = setup.environment.variables.get(name, "").split(",")
        if not {value.strip() for value in values} <= set(allowed):
            yield (
                f"deterministic_mode needs {name} = {allowed[0]} in the environment of every rank: set it, or "
                "deterministic_mode = False"
            )


@rule(observed_in=MEGATRON, no_reproduction="it needs Transformer Engine")
def offloaded_weights(setup: Setup) -> Iterator[str]:
    """From version 2.10 on, Transformer Engine offloads weights too, unless the variable selects the former
    behaviour.
    """
    offloads = setup.transformer.fine_grained_activation_offloading and setup.environment.compute_capability is not None
    if offloads and setup.environment.variables.get(_OFFLOAD) != "1":
        yield (
            f"fine_grained_activation_offloading needs {_OFFLOAD} = 1 in the environment of every rank: set it, or "
            "fine_grained_activation_offloading = False"
        )


@rule(observed_in=MEGATRON)
def cuda_graphs(setup: Setup) -> Iterator[str]:
    """The build raises an AssertionError about random states, or graphs are silently left out."""
    implementation = setup.transformer.cuda_graph_impl
    if implementation != "none" and setup.environment.compute_capability is None:
        yield f"cuda_graph_impl is {implementation}, but there is no GPU: set it to none"


@rule(observed_in=MEGATRON)
def nccl_buffers(setup: Setup) -> Iterator[str]:
    """Wrapping raises a ValueError about an unknown GPU, after the whole model was built."""
    wrapped = setup.is_wrapped_with(Wrapper.DDP) or setup.is_wrapped_with(Wrapper.MEGATRON_FSDP)
    if wrapped and setup.ddp.nccl_ub and setup.environment.compute_capability is None:
        yield "nccl_ub registers buffers with NCCL, but there is no GPU: set it to False"


@rule(observed_in=MEGATRON)
def megatron_fsdp_fused_division(setup: Setup) -> Iterator[str]:
    """Only NCCL can multiply while it reduces: the first step raises a RuntimeError."""
    if not setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) or setup.environment.compute_capability is not None:
        return
    ddp, config = setup.ddp, setup.transformer
    divides = not (ddp.average_in_collective or config.calculate_per_token_loss or config.bf16)
    if ddp.gradient_reduce_div_fusion and divides:
        yield "Megatron-FSDP cannot fuse reduction and division without NCCL: set gradient_reduce_div_fusion = False"


RULES: tuple[Rule, ...] = (
    connections_of_split_layers,
    connections_of_fsdp,
    deterministic_libraries,
    offloaded_weights,
    cuda_graphs,
    nccl_buffers,
    megatron_fsdp_fused_division,
)
