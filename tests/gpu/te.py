"""Transformer Engine's layers and mamba-ssm's kernels beside ours."""

from __future__ import annotations

import gc
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from gpu.settings import LLAMA, PRECISIONS, SMALL_LLAMA, SMALL_SEQUENCE
from gpu.training import make_job, only_rank
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from bridge.models.backend.scan import selective_scan

_SEQUENCE = 4096


def layer_bytes(implementation: str, small: bool) -> int:
    """Return what a layer of the Llama keeps of a sequence of 4,096 tokens for the backward pass.

    Args:
        implementation: Megatron's ``transformer_impl``: ``transformer_engine``, or ``local`` for ours.
        small: A small model.
    """
    few, more = (_kept(layers, implementation, small) for layers in (2, 4))
    return (more - few) // 2


def _kept(layers: int, implementation: str, small: bool) -> int:
    length = SMALL_SEQUENCE if small else _SEQUENCE
    overrides = [
        *(SMALL_LLAMA if small else ()),
        f"transformer.num_layers={layers}",
        f"transformer.transformer_impl={implementation}",
        f"seq_length={length}",
    ]
    job = make_job(LLAMA, [*PRECISIONS["bf16"], *overrides])
    with only_rank(job) as rank:
        model_parallel_cuda_manual_seed(1)
        builder = job.make_builder(rank.config)
        (stage,) = builder.build_distributed_models(
            rank.groups, job.make_options(builder.transformer_config).ddp_config
        )
        tokens = torch.zeros(1, length + 1, dtype=torch.long).cuda()
        gc.collect()
        before = torch.cuda.memory_allocated()
        losses = builder.forward_step(stage, tokens, rank.groups)
        after = torch.cuda.memory_allocated()
        losses.float().mean().backward()
    return after - before


def compare_scans() -> dict[str, float]:
    """Return how far mamba-ssm's scan and its gradients are from ours, and by how many times it is faster."""
    theirs = _triton_scan()
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

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        return selective_scan(*tensors, chunk_size=128)[0]

    found = {}
    expected, results = _outputs(ours, inputs), _outputs(lambda *tensors: theirs(*tensors, 128), inputs)
    for name, one, other in zip(("output", *shapes), results, expected, strict=True):
        found[name] = ((one - other).norm() / other.norm()).item()
    return found | {"speed-up": _seconds(ours, inputs) / _seconds(lambda *tensors: theirs(*tensors, 128), inputs)}


def _triton_scan() -> Callable[..., torch.Tensor]:
    """Return mamba-ssm's scan without its package, which imports kernels that are compiled."""
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["mamba_ssm"] = package
    module: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    scan: Callable[..., torch.Tensor] = module.mamba_chunk_scan_combined
    return scan


def _outputs(scan: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    output = scan(*inputs)
    return [output, *torch.autograd.grad(output.sin().sum(), inputs)]


def _seconds(scan: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for measured in (False, True):
        if measured:
            start.record()
        for _ in range(5):
            _outputs(scan, inputs)
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 5e3
