"""Which device each rank computes on: a GPU of its own, or the CPU.

Importing this module imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from bridge.dist.errors import LaunchError
from bridge.dist.run.rank_environment import RankEnvironment

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# What the drivers of NVIDIA (also under WSL) and AMD create.
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


class Device(StrEnum):
    """What ranks compute on; ``auto`` is a GPU for each rank of this machine if there are enough, else the CPU."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


def may_have_gpus() -> bool:
    """Whether it takes torch to tell if there is a GPU: False without a driver, or where all GPUs are hidden."""
    return os.environ.get(_VISIBLE) not in ("", "-1") and any(Path(file).exists() for file in _DRIVER_FILES)


def count_gpus() -> int:
    """Return how many GPUs this process sees; CUDA stays uninitialised."""
    if not may_have_gpus():
        return 0
    import torch  # takes a second, and most machines without a GPU are told without it

    return torch.cuda.device_count()


def hide_gpus() -> None:
    """Compute on the CPU, in this process and those that it starts. Call it before CUDA is initialised."""
    os.environ[_VISIBLE] = ""


def choose_device(asked: Device, *, local_ranks: int | None, environment: Mapping[str, str] = os.environ) -> Device:
    """Return CUDA or CPU for the ranks of this machine.

    Args:
        asked: What the user asks for.
        local_ranks: Their number; None where the launcher does not tell.
        environment: Says which GPUs this process sees.

    Raises:
        LaunchError: CUDA is asked for, and there is not a GPU for each rank.
    """
    if asked is Device.CPU:
        return Device.CPU
    gpus = count_gpus()
    if gpus and (_has_own_gpu(gpus, environment) or (local_ranks or 1) <= gpus):
        return Device.CUDA
    if asked is Device.CUDA:
        raise LaunchError(
            f"--device cuda needs a GPU for each rank: {local_ranks or 1} rank(s), {gpus} GPU(s) visible here; "
            "start fewer ranks, or choose --device cpu"
        )
    return Device.CPU


def choose_gpu(place: RankEnvironment, *, gpus: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return the index, among the GPUs that this process sees, of the one that this rank computes on.

    Raises:
        LaunchError: There is none for it, or the launcher does not tell which.
    """
    if place.world_size == 1 or _has_own_gpu(gpus, environment):
        return 0
    if place.local_rank is None:
        raise LaunchError(
            f"LOCAL_RANK is not set and rank {place.rank} sees {gpus} GPU(s): set it to the rank's number on its node, "
            f"or set {_VISIBLE} to one GPU for each rank"
        )
    if place.local_rank >= gpus:
        raise LaunchError(
            f"rank {place.rank} is number {place.local_rank} on its node, where {gpus} GPU(s) are visible: start one "
            "rank for each GPU, or choose --device cpu"
        )
    return place.local_rank


def forbid_tf32() -> None:
    """Compute matrix products in full fp32 on the GPU: TF32 keeps 10 bits, a difference of 1e-3.

    The variable, which reaches Transformer Engine too, counts in a process that has not used cuBLAS yet.
    """
    import torch  # takes a second: see above

    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _has_own_gpu(gpus: int, environment: Mapping[str, str]) -> bool:
    """Whether the launcher shows each rank its own GPU alone, as srun does with --gpus-per-task."""
    return gpus == 1 and _VISIBLE in environment
