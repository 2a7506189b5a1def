"""Tables and bars that show a plan or a search on the terminal. Bars consist of letters, so colour is optional."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bridge.dist.formatting import choose_time_unit, format_gib, format_layer_ranges, format_seconds
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.forecast.ranking import Candidate, SearchResult, explain_difference
from bridge.dist.plan.results import Plan, StagePlan, StepTime
from bridge.dist.plan.show.words import (
    KINDS,
    describe_plan,
    describe_time,
    format_teraflops,
    has_unsharded,
    list_largest_traffic,
    list_used_kinds,
)
from bridge.dist.wrapper import ShardingStrategy

_COLOURS = ("blue", "yellow", "green", "magenta", "cyan")
_RESERVE_COLOUR = "white"
_SHORTEST_BAR, _LONGEST_BAR = 10, 60


def render_plan(plan: Plan) -> list[RenderableType]:
    """Render a plan for a terminal of 80 columns or more: memory by stage, worst first, then traffic and a summary."""
    groups = list(_group_equal_stages(plan))
    parts: list[RenderableType] = [
        _make_memory_table(plan, groups),
        _make_legend(plan),
        "",
        _make_numbers_table(plan, groups),
        "",
    ]
    if any(stage.traffic for stage in plan.stages):
        parts += [_make_traffic_table(plan), ""]
    if plan.time is not None:
        parts += [_make_time_table(plan.time), ""]
    words = Table.grid(padding=(0, 2))
    words.add_column(style="bold", no_wrap=True)
    for subject, statement in {**describe_plan(plan), **describe_time(plan.time)}.items():
        words.add_row(subject, escape(statement))
    return [*parts, words, f"planned in {plan.seconds:.1f} s"]


def _group_equal_stages(plan: Plan) -> Iterator[list[StagePlan]]:
    """Yield groups of stages with the same memory and computation; those that need the most memory first."""
    groups: dict[tuple[int, ...], list[StagePlan]] = {}
    for stage in plan.stages:
        held = (
            stage.total_bytes,
            stage.flops,
            stage.parameters,
            stage.master_bytes,
            *(kind.of(stage) for kind in KINDS),
        )
        layers = (len(chunk.layers) for chunk in stage.chunks)
        groups.setdefault((*held, *layers), []).append(stage)
    yield from sorted(groups.values(), key=lambda stages: -stages[0].total_bytes)


def _make_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=name != "stage")
    return table


def _make_memory_table(plan: Plan, groups: list[list[StagePlan]]) -> Table:
    table = _make_table("memory per rank by pipeline stage, worst first", "stage", "layers", "parameters", "GiB")
    table.add_column("", ratio=1)
    for stages in groups:
        stage = stages[0]
        too_much = plan.exceeds_memory(stage)
        table.add_row(
            _format_stages(stages),
            str(sum(len(chunk.layers) for chunk in stage.chunks)),
            f"{stage.parameters:,}",
            Text(format_gib(stage.total_bytes) + "!" * too_much, style="bold red" if too_much else ""),
            _Bar(plan, stage),
        )
    return table


def _make_numbers_table(plan: Plan, groups: list[list[StagePlan]]) -> Table:
    table = _make_table("GiB per rank by kind, and TFLOPs per step", "stage", "weights", "gradients")
    unsharded = ["unsharded"] if has_unsharded(plan) else []
    for name in ("master", "state", "activations", *unsharded, "TFLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    for stages in groups:
        stage = stages[0]
        sizes = [
            stage.weight_bytes,
            stage.gradient_bytes,
            stage.master_bytes,
            stage.state_bytes,
            stage.activation_bytes,
            *([stage.unsharded_bytes] if unsharded else []),
        ]
        table.add_row(_format_stages(stages), *map(format_gib, sizes), format_teraflops(stage.flops))
    return table


def _make_traffic_table(plan: Plan) -> Table:
    """Show each operation of each group on the stage where it moves the most bytes."""
    table = _make_table("largest traffic of a rank per step", "group", "ranks", "operation")
    for name in ("calls", "GiB", "stage"):
        table.add_column(name, justify="right", no_wrap=True)
    for traffic, stage in list_largest_traffic(plan):
        names = (escape(traffic.group), f"{traffic.ranks:,}", escape(traffic.operation))
        table.add_row(*names, f"{traffic.calls:,}", format_gib(traffic.bytes), str(stage.pp))
    return table


def _make_time_table(time: StepTime) -> Table:
    """Show the time of a step by cause, the longest first."""
    factor, unit = choose_time_unit(time.step_seconds)
    table = _make_table(f"estimated step on {time.machine}", "cause", unit, "share")
    table.columns[0].justify = "left"
    for cause, seconds in time.parts.items():
        table.add_row(escape(cause), f"{seconds * factor:,.3f}", f"{seconds / time.step_seconds:.1%}")
    return table


def _format_stages(stages: list[StagePlan]) -> str:
    return format_layer_ranges([stage.pp for stage in stages])


def _make_legend(plan: Plan) -> Text:
    legend = Text()
    for kind, colour in zip(list_used_kinds(plan), _COLOURS, strict=False):  # the last colour is that of unsharded
        legend.append(kind.name[0].upper(), style=f"{colour} reverse").append(f" {kind.name}  ")
    if plan.reserve_bytes:
        legend.append("R", style=f"{_RESERVE_COLOUR} reverse").append(" reserve  ")
    if plan.gpu_memory is not None:
        legend.append(f"| GPU {format_gib(plan.gpu_memory)} GiB")  # 80 columns with all but one kind
    return legend


class _Bar:
    """A bar for the memory of a stage: the first letter of each kind on its colour, ``R`` for the reserve, and ``|`` at
    the limit of a GPU.
    """

    def __init__(self, plan: Plan, stage: StagePlan) -> None:
        self._parts = [
            *((kind.name[0].upper(), colour, kind.of(stage)) for kind, colour in zip(KINDS, _COLOURS, strict=True)),
            ("R", _RESERVE_COLOUR, plan.reserve_bytes),
        ]
        self._limit = plan.gpu_memory
        self._scale = max(plan.worst.total_bytes + plan.reserve_bytes, plan.gpu_memory or 1)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(_SHORTEST_BAR, _LONGEST_BAR)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _LONGEST_BAR) - 1  # leaves a column for the mark of the limit

        def cells(size: int) -> int:
            return round(size * width / self._scale)

        bar, end = Text(), 0
        # Ends are rounded instead of sizes, so that rounding errors do not add up.
        for letter, colour, size in self._parts:
            end += size
            bar.append(letter * (cells(end) - len(bar)), style=f"{colour} on {colour}")
        if self._limit is not None:
            limit = cells(self._limit)
            bar.pad_right(limit - len(bar))
            bar = Text.assemble(bar[:limit], ("|", "bold red"), bar[limit:])
        yield bar


def render_search(result: SearchResult, machine: Machine) -> list[RenderableType]:
    """Render the fastest layouts of a search, and why the first is ahead of the others."""
    best = result.candidates[0]
    table = Table("", "layout", "settings", "GiB", "step", "tokens/s/GPU", "MFU", title="fastest layouts")
    for column in (table.columns[0], *table.columns[3:]):
        column.justify = "right"
    for place, one in enumerate(result.candidates, start=1):
        time = one.time
        table.add_row(
            str(place),
            str(one.choice.layout),
            one.choice.settings,
            format_gib(one.plan.worst.total_bytes),
            format_seconds(time.step_seconds),
            f"{time.tokens_per_second_per_gpu:,.0f}",
            f"{time.model_flops_utilization:.1%}",
        )
    notes = [
        *(f"{place} takes {why}" for place, why in enumerate(result.explain_ranking(), start=2)),
        *_describe_unsaved(result),
        *([] if result.with_ddp is None else [_describe_with_ddp(best, result.with_ddp)]),
        f"{result.planned:,} choices planned; ruled out: {result.refused:,} not possible, "
        f"{result.too_large:,} too large, {result.slower:,} slower",
        f'times are estimates for {machine.name} ({best.time.validated}), see "Plan a job" in the documentation',
    ]
    return [table, *(Text(line) for line in notes)]


def _describe_unsaved(result: SearchResult) -> Iterator[str]:
    """Yield a line if some of the best layouts have a strategy of Megatron-FSDP that cannot be saved."""
    strategies = [one.choice.sharding_strategy for one in result.candidates]
    unsaved = [one for one in dict.fromkeys(strategies) if one not in (None, ShardingStrategy.OPTIM_GRADS_PARAMS)]
    if unsaved:
        yield f"megatron-fsdp cannot save checkpoints with {' and '.join(map(str, unsaved))}"


def _describe_with_ddp(best: Candidate, other: Candidate) -> str:
    size, seconds = format_gib(other.plan.worst.total_bytes), format_seconds(other.time.step_seconds)
    return (
        f"the fastest with ddp: {other.choice} ({size} GiB, {seconds}), which takes {explain_difference(best, other)}"
    )
