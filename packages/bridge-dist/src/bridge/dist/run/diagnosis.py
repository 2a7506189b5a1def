"""The part of `bridge doctor` about requirements, devices and the launcher.

Importing this module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from bridge.config.diagnosis import Finding
from bridge.dist.errors import LaunchError
from bridge.dist.formatting import format_gib
from bridge.dist.run.devices import UNUSABLE, can_use_gpus, count_gpus, may_have_gpus
from bridge.dist.run.rank_environment import RankEnvironment

_BRIDGE_PACKAGES = ("bridge-config", "bridge-builders", "bridge-dist", "bridge-models")
_VARIABLES = {
    "RANK": "this process's rank",
    "WORLD_SIZE": "number of ranks",
    "LOCAL_RANK": "number of this rank on its node, and of its GPU",
    "MASTER_ADDR": "host of rank 0, where ranks meet",
    "MASTER_PORT": "port of rank 0, where ranks meet",
    "SLURM_JOB_ID": "a Slurm job",
    "SLURM_STEP_ID": "a step of it, started by srun",
    "SLURM_NTASKS": "number of tasks; each is a rank",
    "SLURM_PROCID": "this task, and its rank",
    "SLURM_LOCALID": "number of this task on its node, and of its GPU",
    "CUDA_VISIBLE_DEVICES": "the GPUs that this process sees; empty hides all",
    "CUDA_DEVICE_MAX_CONNECTIONS": (
        "Megatron requires 1 for tensor and context parallelism on GPUs before Blackwell, and another value for FSDP"
    ),
    "NVIDIA_TF32_OVERRIDE": "0: products of fp32 matrices are exact to fp32",
    "OMP_NUM_THREADS": "threads of a rank on the CPU",
    "NCCL_DEBUG": "what NCCL logs",
}


def find_machine() -> Iterator[Finding]:
    """Yield unmet requirements, the devices, and what the launcher has set."""
    yield from _find_unmet_requirements()
    yield from _find_devices()
    yield from _find_launcher(os.environ)


def _find_unmet_requirements() -> Iterator[Finding]:
    """Yield a problem for each requirement of Bridge's packages that is missing or has another version."""
    for package in _BRIDGE_PACKAGES:
        for requirement in map(Requirement, _list_requirements(package)):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            found = _get_version(requirement.name)
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                yield Finding(
                    section="Problems",
                    name=package,
                    value=f"requires {requirement}",
                    meaning=f"found {found or 'none'}: pip install '{requirement}'",
                    is_problem=True,
                )


def _list_requirements(package: str) -> list[str]:
    try:
        return requires(package) or []
    except PackageNotFoundError:
        return []


def _get_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _find_devices() -> Iterator[Finding]:
    if (count := count_gpus()) and can_use_gpus():
        import torch  # takes 1 s, and knows the GPUs

        for index in range(count):
            gpu = torch.cuda.get_device_properties(index)
            described = f"{gpu.name}, {format_gib(gpu.total_memory)} GiB, compute capability {gpu.major}.{gpu.minor}"
            yield Finding(section="Devices", name=f"GPU {index}", value=described)
        return
    if not may_have_gpus():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        reason = "CUDA_VISIBLE_DEVICES hides them" if hidden else "this machine has no driver for one"
    else:
        reason = UNUSABLE
    yield Finding(section="Devices", name="GPUs", value="none", meaning=f"{reason}; ranks compute on the CPU")
    usable = len(os.sched_getaffinity(0))
    yield Finding(section="Devices", name="CPUs", value=str(usable), meaning="shared by all ranks of this machine")


def _find_launcher(environment: Mapping[str, str]) -> Iterator[Finding]:
    try:
        rank_environment = RankEnvironment.read(environment)
    except LaunchError as error:
        yield Finding(section="Launcher", name="rank", value="unknown", meaning=str(error), is_problem=True)
    else:
        yield _describe_rank(rank_environment, environment)
    for name, meaning in _VARIABLES.items():
        if name in environment:
            yield Finding(section="Launcher", name=name, value=environment[name] or "(empty)", meaning=meaning)


def _describe_rank(rank_environment: RankEnvironment | None, environment: Mapping[str, str]) -> Finding:
    if rank_environment is not None:
        where = f"{rank_environment.address}:{rank_environment.port}"
        value = f"{rank_environment.rank} of {rank_environment.world_size}, meeting at {where}"
        return Finding(section="Launcher", name="rank", value=value)
    meaning = "bridge build --nproc N starts N ranks on this machine"
    if "SLURM_JOB_ID" in environment:
        meaning += "; in this Slurm job, srun bridge build starts one per task"
    return Finding(section="Launcher", name="rank", value="none, no launcher started this process", meaning=meaning)
