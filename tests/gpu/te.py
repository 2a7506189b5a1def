"""Comparisons of Transformer Engine's layers and mamba-ssm's kernels with those of Bridge."""

from __future__ import annotations

import gc
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from gpu.settings import LLAMA, TE_SEQUENCE, list_te_overrides
from gpu.training import join_single_rank, make_job
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from bridge.models.backend.scan import selective_scan


def measure_layer(storage: str, implementation: str = "transformer_engine") -> dict[str, int]:
    """Return the bytes that a layer of the Llama holds all the time, and those it keeps for the backward pass.

    Args:
        storage: A key of ``TE_STORAGE``.
        implementation: megatron-core's ``transformer_impl``: ``transformer_engine``, or ``local`` for Bridge's layers.
    """
    few, more = (_measure_model(storage, implementation, layers) for layers in (2, 4))
    return {kind: (more[kind] - few[kind]) // 2 for kind in few}


def _measure_model(storage: str, implementation: str, layers: int) -> dict[str, int]:
    overrides = [
        f"transformer.transformer_impl={implementation}",
        # As `bridge build` and `bridge plan` choose it.
        f"transformer.apply_rope_fusion={str(implementation == 'transformer_engine').lower()}",
    ]
    job = make_job(LLAMA, [*list_te_overrides(storage, layers), *overrides])
    with join_single_rank(job) as rank:
        model_parallel_cuda_manual_seed(1)
        builder = job.make_builder(rank.config)
        (stage,) = builder.build_distributed_models(
            rank.groups, job.make_options(builder.transformer_config).ddp_config
        )
        tokens = torch.zeros(1, TE_SEQUENCE + 1, dtype=torch.long).cuda()
        for _ in range(2):  # the first pass also allocates copies of weights in FP8 and workspaces, which stay
            gc.collect()
            held = torch.cuda.memory_allocated()
            losses = builder.forward_step(stage, tokens, rank.groups)
            kept = torch.cuda.memory_allocated() - held
            losses.float().mean().backward()
            del losses
    return {"held": held, "kept": kept}


def compare_scans() -> dict[str, float]:
    """Return the relative differences of mamba-ssm's scan and its gradients from Bridge's, and its speed-up."""
    heads, groups, channels, state, length = 16, 4, 64, 64, 1024
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "x": (2, length, heads, channels),
        "dt": (2, length, heads),
        "a": (heads,),
        "b": (2, length, groups, state),
        "c": (2, length, groups, state),
    }
    drawn = {name: torch.randn(shape, generator=generator).cuda() for name, shape in shapes.items()}
    drawn["dt"] = torch.nn.functional.softplus(drawn["dt"] - 4)
    drawn["a"] = -(1 + 15 * drawn["a"].sigmoid())
    inputs = [tensor.requires_grad_() for tensor in drawn.values()]

    def bridge_scan(*tensors: torch.Tensor) -> torch.Tensor:
        return selective_scan(*tensors, chunk_size=128)[0]

    mamba_chunk_scan = _import_triton_scan()

    def triton_scan(*tensors: torch.Tensor) -> torch.Tensor:
        return mamba_chunk_scan(*tensors, 128)

    found = {}
    expected, results = _compute_outputs(bridge_scan, inputs), _compute_outputs(triton_scan, inputs)
    for name, one, other in zip(("output", *shapes), results, expected, strict=True):
        found[name] = ((one - other).norm() / other.norm()).item()
    return found | {"speed-up": _time_scan(bridge_scan, inputs) / _time_scan(triton_scan, inputs)}


def _import_triton_scan() -> Callable[..., torch.Tensor]:
    """Import mamba-ssm's scan without its package, whose `__init__` imports compiled kernels."""
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["mamba_ssm"] = package
    module: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    scan: Callable[..., torch.Tensor] = module.mamba_chunk_scan_combined
    return scan


def _compute_outputs(scan: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    output = scan(*inputs)
    return [output, *torch.autograd.grad(output.sin().sum(), inputs)]


def _time_scan(scan: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for measured in (False, True):
        if measured:
            start.record()
        for _ in range(5):
            _compute_outputs(scan, inputs)
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 5e3
