"""Description of the machine that rows run on: devices and software versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("megatron-core", "transformer-engine", "nvidia-modelopt", "mamba-ssm", "triton", "numpy")


def describe() -> dict[str, Any]:
    """Return the description of this machine for the record; ``device`` is None without CUDA."""
    has_cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_cuda else None,
        "devices": torch.cuda.device_count() if has_cuda else 0,
        "memory": torch.cuda.get_device_properties(0).total_memory if has_cuda else None,
        "capability": float("{}.{}".format(*torch.cuda.get_device_capability())) if has_cuda else None,
        "driver": _find_driver_version() if has_cuda else None,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: version for name in _PACKAGES if (version := _find_version(name))},
        "commit": os.environ.get("BRIDGE_GPU_COMMIT") or _find_commit(),
    }


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_driver_version() -> str | None:
    return _read_first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _find_commit() -> str | None:
    return _read_first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD")


def _read_first_line(*command: str) -> str | None:
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.splitlines()[0].strip() if output.strip() else None
