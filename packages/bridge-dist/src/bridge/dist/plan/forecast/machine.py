"""Machines: speeds of GPUs and networks, and how long collectives take on them."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

from bridge.config.documents.sources import read_file
from bridge.config.problems import describe_value
from bridge.config.text.parse import parse_yaml
from bridge.dist.errors import PlanError
from bridge.dist.layout import Layout
from bridge.dist.plan.results import Traffic
from bridge.dist.plan.virtual_rank.rank_order import list_extents, rank_of, ranks_along


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Speeds of a machine, in FLOPs and bytes per second of a GPU, and constants fitted to published runs.

    A domain is a set of GPUs with fast links, such as a node with NVLink; the network joins domains.
    ``memory_gib`` is the total that CUDA reports, which is less than the nominal memory. ``fp8_flops`` is None if the
    GPU has no FP8. ``transposes_fp8`` tells whether products in FP8 with one scale per tensor need a transposed copy of
    weights: Transformer Engine 2.17 makes one unless the compute capability is 10 or 11, or 13 or later.

    The constants: the share of peak FLOPs that large matrix products reach in half precision and in FP8, and that
    attention kernels reach; ``exposed``, the share of overlapped communication that computation does not hide; and
    ``exchange_latency``, the seconds that an exchange of tokens between experts takes besides sending them, because
    the host waits for their number before it launches the next kernels. CUDA graphs avoid it.
    """

    name: str
    bf16_flops: float
    fp8_flops: float | None
    fp32_flops: float
    memory_gib: float
    memory_bandwidth: float
    gpus_per_domain: int
    domain_bandwidth: float
    network_bandwidth: float
    product_efficiency: float
    fp8_efficiency: float
    attention_efficiency: float
    exposed: float
    exchange_latency: float
    transposes_fp8: bool

    @property
    def memory(self) -> int:
        """The memory of a GPU in bytes."""
        return int(self.memory_gib * 2**30)

    @property
    def memory_speed(self) -> float:
        """The bytes per second that streaming kernels read or write."""
        return self.memory_bandwidth * _MEMORY_EFFICIENCY

    def product_speed(self, dtype: str) -> float:
        """Return the FLOPs per second that large matrix products with inputs of this data type reach."""
        if dtype == "float8" and self.fp8_flops is not None:
            return self.fp8_flops * self.fp8_efficiency
        peak = self.fp32_flops if dtype == "float32" else self.bf16_flops
        return peak * self.product_efficiency

    def traffic_seconds(self, traffic: Traffic, layout: Layout, *, pp: int) -> float:
        """Return the time of collectives that nothing else slows down, in the slowest group of its kind in a stage.

        Within a domain, each GPU sends at its own speed. In a group that spans domains, the ranks of a domain share
        the work of sending to other domains, each over its own connection to the network.
        """
        inside = self.domain_bandwidth * _DOMAIN_EFFICIENCY
        network = self.network_bandwidth * _NETWORK_EFFICIENCY
        here = count_ranks_per_domain(traffic.group, layout, pp=pp, gpus_per_domain=self.gpus_per_domain)
        latency = traffic.calls * _LATENCY
        ranks = traffic.ranks
        if traffic.operation == "send":
            # Of a ring, some link leaves the domain unless all ranks share it; a pipeline has two ranks per message.
            is_inside = here >= (2 if traffic.group == "pp" else ranks)
            return latency + traffic.bytes / (inside if is_inside else network)
        if here >= ranks:
            slowest = traffic.bytes * (ranks - 1) / ranks / inside
        elif traffic.operation.startswith("alltoall"):
            # Messages to the own domain and to others travel at the same time.
            slowest = max(traffic.bytes * (ranks - here) / ranks / network, traffic.bytes * (here - 1) / ranks / inside)
        else:
            slowest = traffic.bytes * (ranks - 1) / ranks / min(inside, here * network)
        return latency + slowest * (2 if traffic.operation.startswith("allreduce") else 1)


_MEMORY_EFFICIENCY = 0.8
"""Share of the memory bandwidth that streaming kernels reach."""
_DOMAIN_EFFICIENCY, _NETWORK_EFFICIENCY = 0.75, 0.8
"""Share of a link's bandwidth that large collectives reach: usual results of NCCL's own tests."""
_LATENCY = 10e-6
"""Seconds from the call of a collective to its first byte."""


def load_machine(name: str) -> Machine:
    """Return a known machine by its name, or the machine that a YAML file with the same fields describes.

    Fields that a file leaves out are those of the H100.

    Raises:
        PlanError: There is no such machine or file, or a field is unknown or has a value that it cannot have.
        DocumentError: The file cannot be read, or is not YAML.
    """
    known = _load_table()
    if name in known:
        return Machine(name=name, **known[name])
    if not os.path.exists(name):
        raise PlanError(f"{name!r} is neither a file nor a known machine: choose from {', '.join(known)}")
    found = parse_yaml(read_file(name), name).data
    names = [field.name for field in fields(Machine) if field.name != "name"]
    if not isinstance(found, dict):
        raise PlanError(f"{name} has no fields of a machine: give some of {', '.join(names)}")
    unknown = sorted(str(field) for field in found.keys() - set(names))
    if unknown:
        raise PlanError(f"{name}: unknown fields {', '.join(unknown)}: a machine has {', '.join(names)}")
    for field, value in found.items():
        needed = _describe_needed(field, value)
        if needed is not None:
            raise PlanError(f"{name}: {field} must be {needed}, got {describe_value(value)}")
    # The whole path: a file such as h100.yaml must not pass for the known machine, whose errors are published.
    return Machine(name=name, **(known["h100"] | found))


def _describe_needed(field: str, value: object) -> str | None:
    """Say what a field of a machine must be; None if it can have this value.

    The ranges also find values in another unit.
    """
    if field == "transposes_fp8":
        return None if isinstance(value, bool) else "true or false"
    if field == "fp8_flops" and value is None:
        return None
    if field == "gpus_per_domain":
        return None if type(value) is int and value > 0 else "a number of GPUs"
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    for ending, (low, high, needed) in _RANGES.items():
        if field.endswith(ending):
            return None if low <= number <= high else needed
    raise AssertionError(field)


_RANGES = {
    "_flops": (1e10, 1e20, "FLOPs per second, such as 989.0e12"),
    "_bandwidth": (1e7, 1e17, "bytes per second, such as 3.35e12"),
    "_gib": (0.1, 1e5, "GiB, such as 79.6"),
    "_efficiency": (1e-3, 1, "a share above 0 and up to 1"),
    "exposed": (0, 1, "a share from 0 to 1"),
    "_latency": (0, 1, "seconds, such as 0.0005"),
}
"""The values that a field can have, by the end of its name: the least, the most, and what they are."""


def find_machine(device: str) -> Machine | None:
    """Return the machine with GPUs of a name as CUDA gives it; None if it is unknown.

    The variants for PCIe slots are slower than the machines of the table.
    """
    words = re.split(r"[\s-]", device.lower())
    if {"pcie", "nvl", "mig"} & set(words):
        return None
    return next((load_machine(name) for name in list_machines() if name in words), None)


def list_machines() -> list[str]:
    """Return the names of the known machines."""
    return list(_load_table())


@cache
def _load_table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = parse_yaml(
        files(__package__).joinpath("machines.yaml").read_text(encoding="utf-8"), "machines.yaml"
    ).data
    return {name: table["h100"] | values for name, values in table.items()}


_AXES = {
    "tp": ("tp",),
    "cp": ("cp",),
    "tp_cp": ("tp", "cp"),
    "dp": ("dp",),
    "dp_cp": ("cp", "dp"),
    "ep": ("ep",),
    "expt_tp": ("etp",),
    "tp_ep": ("etp", "ep"),
    "expt_dp": ("edp",),
}
"""The axes of each kind of group within a pipeline stage."""


@cache
def count_ranks_per_domain(group: str, layout: Layout, *, pp: int, gpus_per_domain: int) -> int:
    """Return how many ranks of a group share a domain, in the group of a kind and the domain where they are fewest.

    Ranks are placed in Megatron's order.
    """
    if group in _AXES:
        axes = _AXES[group]
        first = ranks_along(layout, 0, axes)
        # The groups of a kind have the same distances between ranks, so their place in the first domain decides.
        places = {low % gpus_per_domain for low, _ in list_extents(layout, axes, pp=pp)}
        return min(
            count for place in places for count in Counter((place + rank) // gpus_per_domain for rank in first).values()
        )
    if group not in ("pp", "embd"):
        return min(layout.world_size, gpus_per_domain)  # an unknown kind: assume that it spans the whole job
    in_one = all(
        low // gpus_per_domain == high // gpus_per_domain for low, high in _list_pipeline_pairs(group, layout, pp)
    )
    return 2 if in_one else 1


def _list_pipeline_pairs(group: str, layout: Layout, pp: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of ranks that exchange messages or embeddings with ranks of a stage."""
    # A rank sends to the neighbouring stages; embeddings are on the first and last stage.
    first, last = (max(pp - 1, 0), min(pp + 1, layout.pp - 1)) if group == "pp" else (0, layout.pp - 1)
    ranks_of_stage = rank_of(layout, pp=1)
    yield from ((first * ranks_of_stage + rank, last * ranks_of_stage + rank) for rank in range(ranks_of_stage))
