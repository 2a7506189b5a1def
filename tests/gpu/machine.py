"""The machine that rows run on: its devices, and the versions of what matters."""

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
    """Return what a record says of this machine; ``device`` is None where there is no CUDA."""
    there = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if there else None,
        "devices": torch.cuda.device_count() if there else 0,
        "memory": torch.cuda.get_device_properties(0).total_memory if there else None,
        "driver": _driver() if there else None,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if there else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": os.environ.get("BRIDGE_GPU_COMMIT") or _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    return _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str | None:
    return _said_by("git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD")


def _said_by(*command: str) -> str | None:
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0].strip() if said.strip() else None
