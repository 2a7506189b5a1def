"""Choice of the device of each rank: its own GPU, or the CPU.

Importing this module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from bridge.dist.errors import LaunchError
from bridge.dist.run.rank_environment import RankEnvironment

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# Device files created by the drivers of NVIDIA (/dev/dxg under WSL) and AMD.
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

UNUSABLE = "there is a driver, but torch can use no GPU (compare its CUDA with the driver's in nvidia-smi)"
"""What is wrong where ``may_have_gpus``, but not ``can_use_gpus``."""


class Device(StrEnum):
    """Device of the ranks; ``auto`` is one GPU per rank if this machine has enough GPUs, else the CPU."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


def may_have_gpus() -> bool:
    """Return whether there may be a GPU: False without a driver, or if all GPUs are hidden."""
    return os.environ.get(_VISIBLE) not in ("", "-1") and any(Path(file).exists() for file in _DRIVER_FILES)


def count_gpus() -> int:
    """Return the number of visible GPUs, without initialising CUDA."""
    if not may_have_gpus():
        return 0
    import torch  # takes 1 s; skipped on most machines without a GPU

    return torch.cuda.device_count()


def can_use_gpus() -> bool:
    """Return whether torch can compute on the visible GPUs: it cannot if the driver is older than torch's CUDA.

    This loads the driver, after which GPUs can no longer be hidden from this process.
    """
    import torch  # takes a second: see above

    return torch.cuda.is_available()


def hide_gpus() -> None:
    """Hide all GPUs from this process and its children. Call this before CUDA is initialised."""
    os.environ[_VISIBLE] = ""


def choose_device(asked: Device, *, local_ranks: int | None, environment: Mapping[str, str] = os.environ) -> Device:
    """Return CUDA or CPU for the ranks of this machine.

    Args:
        asked: The device that the user chose.
        local_ranks: Number of ranks on this machine; None if the launcher does not set it.
        environment: Environment variables, read for the visible GPUs.

    Raises:
        LaunchError: CUDA was chosen, and there are fewer GPUs than ranks, or torch cannot use them.
    """
    if asked is Device.CPU:
        return Device.CPU
    gpus = count_gpus()
    are_enough = gpus > 0 and (_has_own_gpu(gpus, environment) or (local_ranks or 1) <= gpus)
    if are_enough and can_use_gpus():
        return Device.CUDA
    if asked is Device.CUDA:
        raise LaunchError(
            f"--device cuda: {UNUSABLE}: update the driver, install a torch for its CUDA, or choose --device cpu"
            if are_enough
            else f"--device cuda needs one GPU per rank: {local_ranks or 1} rank(s), {gpus} visible GPU(s); "
            "start fewer ranks, or choose --device cpu"
        )
    return Device.CPU


def choose_gpu(rank_environment: RankEnvironment, *, gpus: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return the index of this rank's GPU among the visible GPUs.

    Raises:
        LaunchError: There is no GPU for this rank, or LOCAL_RANK is not set.
    """
    if rank_environment.world_size == 1 or _has_own_gpu(gpus, environment):
        return 0
    if rank_environment.local_rank is None:
        raise LaunchError(
            f"LOCAL_RANK is not set and rank {rank_environment.rank} sees {gpus} GPU(s): set it to the rank's number "
            f"on its node, or set {_VISIBLE} to one GPU for each rank"
        )
    if rank_environment.local_rank >= gpus:
        raise LaunchError(
            f"rank {rank_environment.rank} is number {rank_environment.local_rank} on its node, where {gpus} GPU(s) "
            "are visible: start one rank for each GPU, or choose --device cpu"
        )
    return rank_environment.local_rank


def forbid_tf32() -> None:
    """Compute matrix products in full fp32 on the GPU: TF32 keeps 10 bits, with relative errors of 1e-3.

    The environment variable also reaches Transformer Engine. Call this before the first use of cuBLAS, which reads it.
    """
    import torch  # takes a second: see above

    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _has_own_gpu(gpus: int, environment: Mapping[str, str]) -> bool:
    """Return whether the launcher makes only one GPU visible to each rank, as srun does with --gpus-per-task."""
    return gpus == 1 and _VISIBLE in environment and not _is_shared_by_torchrun(environment)


def _is_shared_by_torchrun(environment: Mapping[str, str]) -> bool:
    """Return whether this rank inherits its visible GPUs from torchrun, as all ranks of the node then do."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return False
    try:
        inherited = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(f"{_VISIBLE}={environment[_VISIBLE]}") in inherited
