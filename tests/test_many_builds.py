"""Repeated builds in one process leak nothing."""

from __future__ import annotations

import gc
import os
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ranks import run_ranks

WARM_UP = 30
BUILDS = 45
# Caches of Megatron, torch and the allocator grow ever more slowly, and not after two hundred builds. A leak of one
# build would be larger: with one wrapper 15 trained models, each of a megabyte of weights, gradients and two averages.
ALLOWED_BYTES = 40_000_000
# DTensor in torch 2.11 never frees its meshes, each with a tensor of ranks; torch 2.15 does.
MESHES = BUILDS if version("torch").startswith("2.11.") else 0
WRAPPERS: list[tuple[dict[str, Any], dict[str, bool]]] = [
    ({"use_distributed_optimizer": True, "overlap_grad_reduce": True}, {}),
    (
        {
            "use_distributed_optimizer": True,
            "data_parallel_sharding_strategy": "optim_grads_params",
            "gradient_reduce_div_fusion": False,
        },
        {"use_megatron_fsdp": True},
    ),
    ({}, {"use_torch_fsdp2": True}),
]


class Resources(NamedTuple):
    """The resources of a process."""

    resident_bytes: int
    process_groups: int
    files: int
    threads: int
    tensors: int


def count_resources() -> Resources:
    import torch
    from torch.distributed import distributed_c10d

    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Resources(
        resident_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
        process_groups=len(distributed_c10d._world.pg_map),
        files=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        tensors=sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()),
    )


def build_and_train(ddp: dict[str, Any], flags: dict[str, bool]) -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import Document
    from bridge.dist import Layout, create_process_groups, destroy_process_groups
    from bridge.dist.train.step import TrainOptions, train
    from bridge.dist.train.text import Text, find_default_text

    config = Document.load("tiny", ["position_embedding_type=rope"]).config()
    layout = Layout()
    groups = create_process_groups(layout)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    builder = config.get_builder_cls()(config)
    stages = builder.build_distributed_models(groups, DistributedDataParallelConfig(**ddp), **flags)
    options = TrainOptions(steps=1, text=find_default_text(), seq_length=8, global_batch_size=1)
    list(train(stages, groups, layout, text=Text.read(options.text, vocab_size=config.vocab_size), options=options))
    destroy_process_groups()


def build_many() -> tuple[Resources, Resources, int]:
    assert threading.active_count() < 10
    started = count_resources()
    for index in range(WARM_UP):
        build_and_train(*WRAPPERS[index % len(WRAPPERS)])
    before = count_resources()
    for index in range(BUILDS):
        build_and_train(*WRAPPERS[index % len(WRAPPERS)])
    return before, count_resources(), started.process_groups


def test_many_builds_leak_no_memory_groups_or_files() -> None:
    ((before, after, groups),) = run_ranks(build_many, 1, timeout=600)
    assert after.process_groups == groups == 1  # the world
    assert after.files <= before.files
    assert after.threads <= before.threads
    assert after.tensors <= before.tensors + MESHES
    assert after.resident_bytes - before.resident_bytes < ALLOWED_BYTES
