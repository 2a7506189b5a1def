"""Tables and bars that show a plan or a search on the terminal. Bars consist of letters, so colour is optional."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bridge.dist.formatting import format_gib, format_layer_ranges
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.forecast.ranking import SearchResult
from bridge.dist.plan.forecast.timeline import timeline_of
from bridge.dist.plan.results import Plan, StagePlan, Traffic
from bridge.dist.plan.show.words import KINDS, describe_plan, format_teraflops, list_used_kinds

_COLOURS = ("blue", "yellow", "green", "magenta", "cyan")
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
    words = Table.grid(padding=(0, 2))
    words.add_column(style="bold", no_wrap=True)
    for subject, statement in describe_plan(plan, timeline_of(plan)).items():
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
        too_much = plan.gpu_memory is not None and stage.total_bytes > plan.gpu_memory
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
    unsharded = ["unsharded"] if len(list_used_kinds(plan)) == len(KINDS) else []
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
    most: dict[tuple[str, int, str], tuple[Traffic, StagePlan]] = {}
    for stage in plan.stages:
        for traffic in stage.traffic:
            key = (traffic.group, traffic.ranks, traffic.operation)
            if key not in most or traffic.bytes > most[key][0].bytes:
                most[key] = (traffic, stage)
    table = _make_table("largest traffic of a rank per step", "group", "ranks", "operation")
    for name in ("calls", "GiB", "stage"):
        table.add_column(name, justify="right", no_wrap=True)
    for traffic, stage in sorted(most.values(), key=lambda one: -one[0].bytes):
        names = (escape(traffic.group), f"{traffic.ranks:,}", escape(traffic.operation))
        table.add_row(*names, f"{traffic.calls:,}", format_gib(traffic.bytes), str(stage.pp))
    return table


def _format_stages(stages: list[StagePlan]) -> str:
    return format_layer_ranges([stage.pp for stage in stages])


def _make_legend(plan: Plan) -> Text:
    legend = Text()
    for kind, colour in zip(list_used_kinds(plan), _COLOURS, strict=False):  # the last colour is that of unsharded
        legend.append(kind.name[0].upper(), style=f"{colour} reverse").append(f" {kind.name}  ")
    if plan.gpu_memory is not None:
        legend.append(f"| {format_gib(plan.gpu_memory)} GiB per GPU")
    return legend


class _Bar:
    """A bar for the memory of a stage: the first letter of each kind on its colour, and ``|`` at the limit of a GPU."""

    def __init__(self, plan: Plan, stage: StagePlan) -> None:
        self._sizes = [kind.of(stage) for kind in KINDS]
        self._limit = plan.gpu_memory
        self._scale = max(plan.worst.total_bytes, plan.gpu_memory or 1)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(_SHORTEST_BAR, _LONGEST_BAR)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _LONGEST_BAR) - 1  # leaves a column for the mark of the limit

        def cells(size: int) -> int:
            return round(size * width / self._scale)

        bar, end = Text(), 0
        # Ends are rounded instead of sizes, so that rounding errors do not add up.
        for kind, colour, size in zip(KINDS, _COLOURS, self._sizes, strict=True):
            end += size
            bar.append(kind.name[0].upper() * (cells(end) - len(bar)), style=f"{colour} on {colour}")
        if self._limit is not None:
            limit = cells(self._limit)
            bar.pad_right(limit - len(bar))
            bar = Text.assemble(bar[:limit], ("|", "bold red"), bar[limit:])
        yield bar


_MAX_ROWS = 10


def render_search(result: SearchResult, machine: Machine) -> list[RenderableType]:
    """Render the fastest layouts of a search, why the first is fastest, and the assumptions of the estimate."""
    kinds = list(dict.fromkeys(kind for one in result.candidates[:_MAX_ROWS] for kind in one.parts))
    table = Table("layout", "GiB", "step, s", *kinds, title="fastest layouts, with estimated seconds per step by kind")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in result.candidates[:_MAX_ROWS]:
        parts = [f"{one.parts.get(kind, 0.0):.3f}" for kind in kinds]
        table.add_row(one.name, format_gib(one.plan.worst.total_bytes), f"{one.seconds:.3f}", *parts)
    notes = [
        f"{result.tried} layouts: {result.refused} refused, {result.too_large} too large, "
        f"{len(result.candidates)} fit, {min(_MAX_ROWS, len(result.candidates))} shown",
        *filter(None, [result.explain_ranking()]),
        f"the estimate assumes {machine.flops / 1e12:,.0f} TFLOP/s per GPU at {machine.efficiency:.0%} efficiency, "
        f"{machine.node_bandwidth / 1e9:,.0f} GB/s between the {machine.gpus_per_node} GPUs of a node, "
        f"{machine.network_bandwidth / 1e9:,.0f} GB/s between nodes, and no overlap",
    ]
    return [table, *(Text(line) for line in notes)]
