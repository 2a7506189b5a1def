"""Search over the layouts of a number of GPUs, ranked by estimated step time."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from copy import deepcopy
from typing import NamedTuple

from bridge.config import BridgeError, Document
from bridge.config.tracebacks import format_error
from bridge.dist.document_layout import replace_layout
from bridge.dist.errors import PlanError
from bridge.dist.job import make_builder
from bridge.dist.plan.count.microbatch import Memo
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.forecast.ranking import Candidate, SearchResult, estimate_step
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.process.messages import relay, send_messages
from bridge.dist.wrapper import Wrapper

_LARGEST_TP = 8  # the usual number of GPUs in a node: tensor parallelism between nodes is slow
_LARGEST_VP = 8
_TOO_LARGE = "too large"


def list_layouts(
    gpus: int, fixed: Mapping[str, int], *, num_layers: int, has_experts: bool
) -> Iterator[dict[str, int]]:
    """Yield the sizes of candidate layouts, keeping those in ``fixed``; pre-flight refuses some of them later."""
    etp = {"etp": fixed["etp"]} if "etp" in fixed else {}

    def sizes(axis: str, largest: int) -> list[int]:
        divisors = [size for size in range(1, largest + 1) if gpus % size == 0]
        return [fixed[axis]] if axis in fixed else divisors

    cp = fixed.get("cp", 1)
    for tp in sizes("tp", min(_LARGEST_TP, gpus)):
        for pp in sizes("pp", min(num_layers, gpus // tp)):
            if gpus % (tp * pp * cp):
                continue
            replicas = gpus // (tp * pp)
            ep_sizes = [size for size in range(1, replicas + 1) if replicas % size == 0] if has_experts else [1]
            for ep in [fixed["ep"]] if "ep" in fixed else ep_sizes:
                largest_vp = 1 if pp == 1 else min(_LARGEST_VP, num_layers // pp)
                for vp in [fixed["vp"]] if "vp" in fixed else range(1, largest_vp + 1):
                    yield {"tp": tp, "pp": pp, "vp": vp, "cp": cp, "ep": ep} | etp


def search(
    document: Document,
    options: PlanOptions,
    machine: Machine,
    *,
    fixed: Mapping[str, int],
    processes: int | None = None,
    watch: Callable[[Iterator[Candidate | str], int], Iterator[Candidate | str]] = lambda outcomes, total: outcomes,
) -> SearchResult:
    """Plan every layout of ``options.world_size`` GPUs and rank those that fit by step time.

    Tensor parallelism implies sequence parallelism. The estimated time of a pass is its FLOPs over the achieved speed
    plus its bytes over the group's bandwidth. The pipeline runs by Megatron's schedule, then gradients are reduced.
    Computation and communication do not overlap.

    Args:
        document: The model; its own layout is ignored.
        options: The batch, the number of GPUs, the wrapper and the memory of a GPU.
        machine: Speeds to estimate with.
        fixed: Sizes to keep, by axis.
        processes: Number of worker processes; by default the number of CPUs.
        watch: Wraps the iterator of outcomes, given their total number, to show progress.

    Raises:
        PlanError: No layout fits, or the wrapper shards weights.
    """
    if options.wrapper not in (Wrapper.DDP, Wrapper.NONE):
        raise PlanError(
            f"--search supports the wrappers ddp and none, got {options.wrapper}, whose gathering the estimate does "
            "not cover: omit --wrap, or plan single layouts"
        )
    transformer = make_builder(document.config()).transformer_config
    by_chunks: dict[tuple[int, ...], list[dict[str, int]]] = defaultdict(list)
    for sizes in list_layouts(
        options.world_size, fixed, num_layers=transformer.num_layers, has_experts=bool(transformer.num_moe_experts)
    ):
        by_chunks[sizes["tp"], sizes["cp"], sizes["ep"]].append(sizes)  # these share measurements
    # A fork of this process could deadlock, because torch runs threads.
    context = multiprocessing.get_context("forkserver")
    # The largest groups first, so that no worker starts one when the others are nearly done.
    groups = sorted(by_chunks.values(), key=len, reverse=True)
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context, initializer=_start_worker) as pool:
        try:
            futures = [pool.submit(_plan_layouts, document, options, machine, sizes) for sizes in groups]
            outcomes = list(watch(_collect_outcomes(futures), sum(map(len, groups))))
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.kill()  # the pool would wait for them to finish
            raise
    candidates = [outcome for outcome in outcomes if isinstance(outcome, Candidate)]
    reasons = Counter(outcome for outcome in outcomes if isinstance(outcome, str))
    too_large = reasons.pop(_TOO_LARGE, 0)
    refused = reasons.total()
    if not candidates:
        advice = ["use more GPUs, activation recomputation or a smaller micro-batch"] if too_large else []
        advice += [f"{count} are refused because {reason}" for reason, count in reasons.most_common(3)]
        raise PlanError(
            f"no layout of {options.world_size} GPUs fits: of {len(outcomes)}, {refused} are refused and "
            f"{too_large} too large" + "".join(f"\n{line}" for line in advice)
        )
    return SearchResult(
        candidates=sorted(candidates, key=lambda candidate: (candidate.seconds, candidate.name)),
        tried=len(outcomes),
        refused=refused,
        too_large=too_large,
    )


def _start_worker() -> None:
    """Ignore Ctrl-C, which the parent process handles, and collect log messages for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    send_messages(_messages.append)


_messages: list[str] = []
"""Messages logged since the last call of _plan_layouts."""


class _Outcomes(NamedTuple):
    """Outcomes of layouts, and the messages logged meanwhile."""

    outcomes: list[Candidate | str]
    messages: list[str]


def _collect_outcomes(futures: Sequence[Future[_Outcomes]]) -> Iterator[Candidate | str]:
    for future in as_completed(futures):
        tried = future.result()
        for message in tried.messages:
            relay(message)
        yield from tried.outcomes


def _plan_layouts(
    document: Document, options: PlanOptions, machine: Machine, sizes: Sequence[dict[str, int]]
) -> _Outcomes:
    """Plan layouts; return a candidate for each, or the reason why there is none."""
    _messages.clear()
    memo: Memo = {}
    outcomes: list[Candidate | str] = []
    for one in sizes:
        changed = deepcopy(document)
        replace_layout(changed, one, sequence_parallel=one["tp"] > 1)
        try:
            planned = plan(changed, options, memo=memo)
        except BridgeError as error:
            outcomes.append(str(error))
            continue
        except Exception as error:  # the model's own exception may not be picklable
            name = " ".join(f"{axis}{size}" for axis, size in one.items())
            raise PlanError(f"{name}: {format_error(error)}") from error
        outcomes.append(_TOO_LARGE if planned.fits is False else estimate_step(planned, machine))
    return _Outcomes(outcomes, list(_messages))
