"""The layouts of some number of GPUs, planned and ranked by an estimate of what a step takes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

from bridge.config import BridgeError, Document
from bridge.config.frames import describe
from bridge.dist.documents import replace_layout
from bridge.dist.errors import PlanError
from bridge.dist.job import make_builder
from bridge.dist.layout import Layout
from bridge.dist.plan.count.microbatch import Memo
from bridge.dist.plan.forecast.timeline import timeline_of
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.plan.results import Plan, StagePlan
from bridge.dist.plan.virtual_rank.rank_order import extents, rank_of
from bridge.dist.process.messages import relay, send_messages
from bridge.dist.wrapper import Wrapper

_LARGEST_VP = 8
_TOO_LARGE = "too large"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a step's time is estimated with: a GPU's FLOPs a second and the share of them that is reached, GPUs that
    share a node, and bytes a second to a GPU from others of its node and from other nodes.

    The defaults are those of a node of eight H100: 989 TFLOPs of dense bf16, NVLink, and 400 Gb/s a GPU.
    """

    flops: float = 989e12
    efficiency: float = 0.5
    gpus_per_node: int = 8
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9

    def seconds(self, stage: StagePlan, layout: Layout) -> dict[str, float]:
        """Return how long a stage's own work takes in a step, by kind, none of it at the same time as another."""
        found = {"computation": stage.flops / (self.flops * self.efficiency)}
        for sent in stage.traffic:
            kind = f"{sent.group} traffic"
            found[kind] = found.get(kind, 0.0) + sent.bytes / self.bandwidth(sent.group, layout, pp=stage.pp)
        return found

    def bandwidth(self, group: str, layout: Layout, *, pp: int) -> float:
        """Return that within a node if each group of a kind in a pipeline stage has all its ranks in one node.

        Ranks are placed in Megatron's order, and those of the slowest group keep the others waiting.
        """
        nodes = ((low // self.gpus_per_node, high // self.gpus_per_node) for low, high in _extents(group, layout, pp))
        return self.node_bandwidth if all(low == high for low, high in nodes) else self.network_bandwidth


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
"""Along what the groups within a pipeline stage are, by the names that a plan gives them."""


def _extents(group: str, layout: Layout, pp: int) -> Iterator[tuple[int, int]]:
    """Yield the lowest and the highest rank of each group of a kind that a stage has ranks in."""
    if group in _AXES:
        yield from extents(layout, _AXES[group], pp=pp)
        return
    if group not in ("pp", "embd"):
        yield 0, layout.world_size - 1
        return
    # A rank sends to those of the stages beside its own; embeddings are on the first and the last.
    first, last = (max(pp - 1, 0), min(pp + 1, layout.pp - 1)) if group == "pp" else (0, layout.pp - 1)
    ranks_of_stage = rank_of(layout, pp=1)
    yield from ((first * ranks_of_stage + rank, last * ranks_of_stage + rank) for rank in range(ranks_of_stage))


class Candidate(NamedTuple):
    """A layout that fits: its plan, what a step is estimated to take, and of what that is made, in seconds."""

    plan: Plan
    seconds: float
    parts: dict[str, float]

    @property
    def name(self) -> str:
        """The layout in words."""
        return str(Layout(**self.plan.layout))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found: the layouts that fit, fastest first; how many were tried, refused and too large."""

    candidates: list[Candidate]
    tried: int
    refused: int
    too_large: int

    def why(self) -> str | None:
        """Say why the first is ahead of the second; None if there are not two."""
        if len(self.candidates) < 2:
            return None
        first, second = self.candidates[:2]
        gains = {
            part: second.parts.get(part, 0.0) - first.parts.get(part, 0.0) for part in {**first.parts, **second.parts}
        }
        said = [
            f"{abs(gain):.3f} s {'less' if gain > 0 else 'more'} of {part}"
            for part, gain in sorted(gains.items(), key=lambda item: -abs(item[1]))
            if abs(gain) > 0.01 * first.seconds
        ]
        return f"{first.name} is ahead of {second.name} by " + (", ".join(said) or "less than a hundredth")

    def to_json(self) -> dict[str, object]:
        """Return what was found as plain data."""
        return {
            "kind": "search",
            "tried": self.tried,
            "refused": self.refused,
            "too_large": self.too_large,
            "why": self.why(),
            "candidates": [
                {
                    "layout": one.plan.layout,
                    "seconds": one.seconds,
                    "parts": one.parts,
                    "total_bytes": one.plan.worst.total_bytes,
                }
                for one in self.candidates
            ],
        }


def layouts(gpus: int, fixed: Mapping[str, int], *, num_layers: int, has_experts: bool) -> Iterator[dict[str, int]]:
    """Yield the sizes of layouts of some GPUs, those that ``fixed`` names as they are; pre-flight refuses more."""
    etp = {"etp": fixed["etp"]} if "etp" in fixed else {}

    def sizes(axis: str, largest: int) -> list[int]:
        divisors = [size for size in range(1, largest + 1) if gpus % size == 0]
        return [fixed[axis]] if axis in fixed else divisors

    cp = fixed.get("cp", 1)
    for tp in sizes("tp", min(8, gpus)):
        for pp in sizes("pp", min(num_layers, gpus // tp)):
            if gpus % (tp * pp * cp):
                continue
            replicas = gpus // (tp * pp)
            of_experts = [size for size in range(1, replicas + 1) if replicas % size == 0] if has_experts else [1]
            for ep in [fixed["ep"]] if "ep" in fixed else of_experts:
                deepest = 1 if pp == 1 else min(_LARGEST_VP, num_layers // pp)
                for vp in [fixed["vp"]] if "vp" in fixed else range(1, deepest + 1):
                    yield {"tp": tp, "pp": pp, "vp": vp, "cp": cp, "ep": ep} | etp


def search(
    document: Document,
    options: PlanOptions,
    machine: Machine,
    *,
    fixed: Mapping[str, int],
    processes: int | None = None,
    watch: Callable[[Iterator[Candidate | str], int], Iterator[Candidate | str]] = lambda outcomes, total: outcomes,
) -> Found:
    """Plan every layout of ``options.world_size`` GPUs and rank those that fit by the time of a step.

    Tensor parallelism is taken with sequence parallelism. The estimate: a pass of a chunk takes its FLOPs over those
    that are reached and the bytes it sends over the bandwidth of the group; the pipeline runs by Megatron's schedule;
    then gradients are reduced. Nothing overlaps.

    Args:
        document: The model; its own layout is left aside.
        options: The batch, the number of GPUs, the wrapper and the memory of a GPU.
        machine: Speeds to estimate with.
        fixed: Sizes that are given, by axis.
        processes: How many plan at a time; by default as many as there are processors.
        watch: Passes on what becomes of each layout, of that many, as soon as it is known.

    Raises:
        PlanError: No layout fits, or the wrapper shards weights.
    """
    if options.wrapper not in (Wrapper.DDP, Wrapper.NONE):
        raise PlanError(
            f"a search tries layouts with ddp or no wrapper, not {options.wrapper}, whose gathering its estimate does "
            "not follow: leave --wrap out, or plan one layout at a time"
        )
    transformer = make_builder(document.config()).transformer_config
    by_chunks: dict[tuple[int, ...], list[dict[str, int]]] = defaultdict(list)
    for sizes in layouts(
        options.world_size, fixed, num_layers=transformer.num_layers, has_experts=bool(transformer.num_moe_experts)
    ):
        by_chunks[sizes["tp"], sizes["cp"], sizes["ep"]].append(sizes)  # which share what they measure
    context = multiprocessing.get_context("forkserver")
    groups = sorted(by_chunks.values(), key=len, reverse=True)
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context, initializer=_start_worker) as pool:
        try:
            futures = [pool.submit(_tried, document, options, machine, sizes) for sizes in groups]
            outcomes = list(watch(_outcomes(futures), sum(map(len, groups))))
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.kill()  # the pool would wait for the layouts that they plan
            raise
    candidates = [outcome for outcome in outcomes if isinstance(outcome, Candidate)]
    reasons = Counter(outcome for outcome in outcomes if isinstance(outcome, str))
    too_large = reasons.pop(_TOO_LARGE, 0)
    refused = reasons.total()
    if not candidates:
        advice = ["take more GPUs, recompute activations, or a smaller micro batch"] if too_large else []
        advice += [f"{count} are refused because {reason}" for reason, count in reasons.most_common(3)]
        raise PlanError(
            f"no layout of {options.world_size} GPUs fits: of {len(outcomes)}, {refused} are refused and "
            f"{too_large} too large" + "".join(f"\n{line}" for line in advice)
        )
    return Found(
        candidates=sorted(candidates, key=lambda candidate: (candidate.seconds, candidate.name)),
        tried=len(outcomes),
        refused=refused,
        too_large=too_large,
    )


def _start_worker() -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, and messages to the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    send_messages(_messages.append)


_messages: list[str] = []
"""What this worker has logged since it last told."""


class _Tried(NamedTuple):
    """What became of some layouts, and what was logged meanwhile."""

    outcomes: list[Candidate | str]
    messages: list[str]


def _outcomes(futures: Sequence[Future[_Tried]]) -> Iterator[Candidate | str]:
    for future in as_completed(futures):
        tried = future.result()
        for message in tried.messages:
            relay(message)
        yield from tried.outcomes


def _tried(document: Document, options: PlanOptions, machine: Machine, sizes: Sequence[dict[str, int]]) -> _Tried:
    """Plan layouts one after the other: a candidate of each, or why it is none."""
    _messages.clear()
    memo: Memo = {}
    outcomes: list[Candidate | str] = []
    for one in sizes:
        changed = deepcopy(document)
        replace_layout(changed, one, sequence_parallel=one["tp"] > 1)
        try:
            made = plan(changed, options, memo=memo)
        except BridgeError as error:
            outcomes.append(str(error))
            continue
        except Exception as error:  # of the model; from another process only its text arrives
            name = " ".join(f"{axis}{size}" for axis, size in one.items())
            raise PlanError(f"{name}: {describe(error)}") from error
        outcomes.append(_TOO_LARGE if made.fits is False else estimated(made, machine))
    return _Tried(outcomes, list(_messages))


def estimated(made: Plan, machine: Machine) -> Candidate:
    """Estimate what a step of a plan takes."""
    layout = Layout(**made.layout)
    by_stage = [machine.seconds(stage, layout) for stage in made.stages]
    busiest = max(by_stage, key=lambda seconds: sum(seconds.values()))
    at_end = {part: seconds for part, seconds in busiest.items() if part.startswith(("dp", "expt_dp"))}
    in_pipeline = sum(busiest.values()) - sum(at_end.values())
    bubble = planned(made).bubble
    waiting = in_pipeline * bubble / (1 - bubble)
    parts = dict(busiest) | {"pipeline bubbles": waiting}
    return Candidate(made, sum(parts.values()), parts)
