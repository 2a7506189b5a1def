"""Search for the fastest ways to train a model on a number of GPUs, by estimated step time.

Choices are planned in the order of a lower bound of their time. The search ends when no other choice can be faster than
the best ones found. Choices that cannot fit the memory of a GPU are ruled out by a lower bound of their memory.
"""

from __future__ import annotations

import heapq
import math
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from itertools import count
from typing import NamedTuple

from bridge.config import BridgeError, Document
from bridge.config.tracebacks import format_error
from bridge.dist.checks.document import refuse_before_imports
from bridge.dist.errors import PlanError
from bridge.dist.formatting import format_gib
from bridge.dist.job import make_builder
from bridge.dist.layout import Layout
from bridge.dist.plan.count.microbatch import Memo
from bridge.dist.plan.forecast.bounds import Bounds
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.forecast.ranking import Candidate, SearchResult
from bridge.dist.plan.forecast.space import NO_RECOMPUTE, Choice, Fixed, list_choices, list_recomputations
from bridge.dist.plan.forecast.step_time import estimate_time
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.plan.results import Plan, default_reserve
from bridge.dist.process.messages import relay, send_messages
from bridge.dist.process.parent import call_when_parent_ends
from bridge.dist.process.signals import delay_signals
from bridge.dist.wrapper import Wrapper

_MOST_PLANS_OF_CLOSEST = 8  # plans to find the choice that needs the least memory, if none fits


class Progress(NamedTuple):
    """The state of a search: numbers of choices that are planned, ruled out by bounds and left, and the best so far."""

    planned: int
    ruled_out: int
    left: int
    best: Candidate | None


def search(
    document: Document,
    options: PlanOptions,
    machine: Machine,
    *,
    fixed: Fixed | None = None,
    top: int = 5,
    executor: Executor | None = None,
    watch: Callable[[Iterator[Progress]], Iterator[Progress]] = lambda states: states,
) -> SearchResult:
    """Find the fastest layouts of ``options.world_size`` GPUs, each with its fastest settings that fit.

    If the first one shards weights, the fastest one with DDP is found, too. Recomputation is considered for choices
    that do not fit without it.

    Args:
        document: The model; its own layout and recomputation are ignored.
        options: The batch, the number of GPUs and the memory of a GPU.
        machine: The machine to estimate times for.
        fixed: What the search must not change.
        top: The number of layouts to find.
        executor: Runs one plan at a time; by default, one process for each CPU does.
        watch: Wraps the iterator of states, to show progress.

    Raises:
        PlanError: Nothing fits. The message names the choice that needs the least memory.
    """
    found = _Search(document, options, machine, fixed or Fixed(), top)
    if executor is not None:
        for _ in watch(found.run(executor, tasks=1)):
            pass
        return found.make_result()
    # A fork of this process could deadlock, because torch runs threads.
    context = multiprocessing.get_context("forkserver")
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            for _ in watch(found.run(pool, tasks=workers)):
                pass
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.kill()  # the pool would wait for them to finish
            raise
    return found.make_result()


class _Task(NamedTuple):
    """A choice to plan, or whose layers to measure."""

    choice: Choice
    is_measurement: bool = False


class _Search:
    """The state of a search."""

    def __init__(self, document: Document, options: PlanOptions, machine: Machine, fixed: Fixed, top: int) -> None:
        self._document, self._options, self._machine, self._fixed, self._top = document, options, machine, fixed, top
        self._config = make_builder(document.config()).transformer_config
        self._bounds = Bounds(document, options, machine, fixed)
        reserve = default_reserve(options.world_size) if options.reserve is None else options.reserve
        self._memory = None if options.gpu_memory is None else options.gpu_memory - reserve
        self._best: dict[Layout, Candidate] = {}
        self._best_with_ddp: Candidate | None = None
        self._closest: Candidate | None = None
        self._refused: Counter[str] = Counter()
        self._too_large: list[tuple[int, int, Choice]] = []  # a heap, by the lower bound of memory
        self._open: list[tuple[float, int, Choice]] = []  # a heap, by the lower bound of time
        self._waiting: dict[object, list[tuple[float, Choice]]] = {}  # for a measurement of their kind
        self._number = count()  # the order of equal bounds
        self._planned = self._slower = 0

    def run(self, pool: Executor, *, tasks: int) -> Iterator[Progress]:
        """Plan choices, several at a time, until no other one can be among the best; yield the state after each."""
        for choice in list_choices(self._config, self._options, self._fixed):
            if isinstance(choice, str):
                self._refused[choice] += 1
            else:
                self._add(choice)
        running: dict[Future[_Outcome], _Task] = {}
        while True:
            while len(running) < tasks and (task := self._take_task()) is not None:
                running[self._submit(pool, task)] = task
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                self._record(running.pop(future), future.result())
                yield self._get_progress(len(running))
        if not self._best:
            self._find_closest(pool)
        yield self._get_progress(0)

    def make_result(self) -> SearchResult:
        """Return the best layouts.

        Raises:
            PlanError: Nothing fits.
        """
        if not self._best:
            raise PlanError(self._describe_failure())
        candidates, with_ddp = sorted(self._best.values())[: self._top], self._best_with_ddp
        is_listed = any(one.choice.wrapper is Wrapper.DDP for one in candidates)
        return SearchResult(
            candidates=candidates,
            with_ddp=None if is_listed else with_ddp,
            planned=self._planned,
            refused=self._refused.total(),
            too_large=len(self._too_large),
            slower=self._slower,
        )

    def _add(self, choice: Choice, seconds: float = 0.0) -> None:
        """Add a choice whose time is known to be no less than some seconds."""
        bound = max(seconds, self._bounds.count_seconds(choice))
        heapq.heappush(self._open, (bound, next(self._number), choice))

    def _take_task(self) -> _Task | None:
        """Take the choice with the lowest bound of its time, to plan it or to measure its layers first."""
        while self._open:
            bound, _, choice = heapq.heappop(self._open)
            if bound > max(self._limit, self._limit_with_ddp):
                self._slower += 1 + len(self._open)
                self._open.clear()
                break
            if self._is_too_large(choice):
                self._drop(choice)
                continue
            is_measured = not self._bounds.list_unmeasured(choice)
            now = self._bounds.simulate_seconds(choice) if is_measured else self._bounds.count_seconds(choice)
            if now > bound and self._open and now > self._open[0][0]:
                self._add(choice, now)
            elif self._is_slower(choice, now):
                self._slower += 1
            elif is_measured:
                if self._is_possible(choice):
                    return _Task(choice)
            elif (kind := self._wait(choice, now)) is not None:
                return _Task(kind, is_measurement=True)
        return None

    def _wait(self, choice: Choice, seconds: float) -> Choice | None:
        """Let a choice wait for a measurement of its layers; return what to measure, if nothing does yet."""
        kind = self._bounds.list_unmeasured(choice)[0]
        if kind.kind not in self._waiting and not self._is_possible(choice):
            return None
        is_measured = kind.kind in self._waiting
        self._waiting.setdefault(kind.kind, []).append((seconds, choice))
        return None if is_measured else kind

    @property
    def _limit(self) -> float:
        """The time of the last layout in the list of the best; infinite while the list is not full."""
        seconds = sorted(one.seconds for one in self._best.values())
        return seconds[self._top - 1] if len(seconds) >= self._top else math.inf

    @property
    def _limit_with_ddp(self) -> float:
        """The time up to which choices with DDP are considered beside a first one that shards weights."""
        best = self._find_best()
        if best is None or best.choice.wrapper is Wrapper.DDP:
            return 0.0
        return math.inf if self._best_with_ddp is None else self._best_with_ddp.seconds

    def _is_slower(self, choice: Choice, seconds: float) -> bool:
        """Return whether a choice that takes at least some seconds is slower than all that the search looks for."""
        same = self._best.get(choice.layout)
        limit = self._limit if same is None else min(self._limit, same.seconds)
        return seconds > (max(limit, self._limit_with_ddp) if choice.wrapper is Wrapper.DDP else limit)

    def _is_too_large(self, choice: Choice) -> bool:
        return self._memory is not None and self._bounds.count_bytes(choice) > self._memory

    def _is_possible(self, choice: Choice) -> bool:
        try:
            refuse_before_imports(
                choice.apply(self._document, self._fixed),
                wrapper=choice.wrapper,
                world_size=self._options.world_size,
                distributed_optimizer=choice.distributed_optimizer,
                sharding_strategy=choice.sharding_strategy,
            )
        except BridgeError as error:
            self._refused[str(error)] += 1
            return False
        return True

    def _drop(self, choice: Choice) -> None:
        """Drop a choice that is too large; consider it with recomputation instead."""
        heapq.heappush(self._too_large, (self._bounds.count_bytes(choice), next(self._number), choice))
        if choice.recompute == NO_RECOMPUTE and self._fixed.recompute is None:
            for other in list_recomputations(choice, self._config):
                if self._is_too_large(other):
                    heapq.heappush(self._too_large, (self._bounds.count_bytes(other), next(self._number), other))
                else:
                    self._add(other)

    def _submit(self, pool: Executor, task: _Task) -> Future[_Outcome]:
        with delay_signals():  # the pool starts a process for a task if all are busy
            return self._start(pool, task)

    def _start(self, pool: Executor, task: _Task) -> Future[_Outcome]:
        choice = task.choice
        if task.is_measurement:
            layers = self._bounds.list_measurable(choice)
            alone, options = choice.spread(self._options, stages=self._config.num_layers)
            document = alone.apply(self._document, self._fixed)
            return pool.submit(_measure_layers, document, layers, options)
        document = choice.apply(self._document, self._fixed)
        return pool.submit(_plan_choice, document, choice, choice.change_options(self._options), self._machine)

    def _record(self, task: _Task, outcome: _Outcome) -> None:
        for message in outcome.messages:
            relay(message)
        choice, result = task.choice, outcome.result
        if task.is_measurement:
            self._bounds.learn_layers(choice, result if isinstance(result, Plan) else None)
            for seconds, waiting in self._waiting.pop(choice.kind):
                self._add(waiting, seconds)
            return
        if isinstance(result, str):
            self._refused[result] += 1
            return
        assert isinstance(result, Candidate)
        self._planned += 1
        if result.plan.fits is False:
            self._drop(choice)
            if self._closest is None or result.plan.worst.total_bytes < self._closest.plan.worst.total_bytes:
                self._closest = result
            return
        if choice.layout not in self._best or result < self._best[choice.layout]:
            self._best[choice.layout] = result
        best = self._best_with_ddp
        if choice.wrapper is Wrapper.DDP and (best is None or result < best):
            self._best_with_ddp = result

    def _get_progress(self, running: int) -> Progress:
        ruled_out = self._slower + len(self._too_large)
        left = len(self._open) + sum(map(len, self._waiting.values())) + running
        return Progress(self._planned, ruled_out, left, self._find_best())

    def _find_best(self) -> Candidate | None:
        return min(self._best.values(), default=None)

    def _find_closest(self, pool: Executor) -> None:
        """Plan those that may need the least memory."""
        for _ in range(_MOST_PLANS_OF_CLOSEST):
            if not self._too_large:
                break
            bound, _, choice = heapq.heappop(self._too_large)
            if self._closest is not None and bound >= self._closest.plan.worst.total_bytes:
                break
            if self._is_possible(choice):
                self._record(_Task(choice), self._submit(pool, _Task(choice)).result())

    def _describe_failure(self) -> str:
        large = len(self._too_large)
        choices = "1 choice is" if large == 1 else f"{large} choices are"
        lines = [f"nothing fits on {self._options.world_size} GPUs: {choices} too large"]
        if self._closest is not None:
            needed = self._closest.plan.worst.total_bytes
            lines.append(
                f"{self._closest.choice} needs the least memory: {format_gib(needed)} GiB, which is "
                f"{format_gib(needed - (self._memory or 0))} GiB more than a GPU has besides its reserve: "
                "use more GPUs, or GPUs with more memory"
            )
        lines += [
            f"{number} {'is' if number == 1 else 'are'} refused because {reason}"
            for reason, number in self._refused.most_common(3)
        ]
        return "\n".join(lines)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent process, end when it has ended, and collect log messages for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    call_when_parent_ends(lambda: os._exit(1))
    send_messages(_messages.append)


_messages: list[str] = []
"""Messages logged since the last call of _plan_choice."""
_memo: Memo = {}
"""Measurements of this worker, which plans one model."""


class _Outcome(NamedTuple):
    """A planned choice, a plan of single layers or the reason why there is none; and messages logged meanwhile."""

    result: Candidate | Plan | str
    messages: list[str]


def _plan_choice(document: Document, choice: Choice, options: PlanOptions, machine: Machine) -> _Outcome:
    _messages.clear()
    try:
        planned = plan(document, options, memo=_memo)
    except BridgeError as error:
        return _Outcome(str(error), list(_messages))
    except Exception as error:  # the model's own exception may not be picklable
        raise PlanError(f"{choice}: {format_error(error)}") from error
    return _Outcome(Candidate(choice, planned, estimate_time(planned, machine)), list(_messages))


def _measure_layers(document: Document, layers: Sequence[int], options: PlanOptions) -> _Outcome:
    """Plan layers of a document whose pipeline stages have one layer each."""
    _messages.clear()
    try:
        planned = plan(document, options, memo=_memo, stages=layers)
    except Exception as error:  # a choice without measured layers is planned in any case
        return _Outcome(str(error), list(_messages))
    return _Outcome(planned, list(_messages))
