"""What a build made, per rank and stage, as plain data and as a table; tables and progress on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bridge.dist.memory import PeakMemory
    from bridge.dist.verify import Row

ItemT = TypeVar("ItemT")

_LINE_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ChunkReport:
    """One wrapped stage: its layers (indices in the whole model), its own parameters, its wrappers, outermost first."""

    vp_stage: int
    layers: list[int]
    parameters: int
    wrappers: list[str]


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """The stages of one rank, its coordinates in the layout, and its peak memory from the build to the last step."""

    rank: int
    tp: int
    pp: int
    dp: int
    cp: int
    ep: int
    chunks: list[ChunkReport]
    peak_memory_bytes: PeakMemory


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """The whole of a build, and what made it.

    ``layers`` says whose layers were built. ``parameters`` are the model's, ``padded_parameters`` count vocabulary
    padding too. The sizes of a batch are None if nothing was trained. ``step_seconds`` is the mean over the steps but
    the first, which warms up, on the slowest rank; None if there was no other. ``model_flops`` are those that the model
    needs for a step (``bridge.dist.flops``), ``device_peak_flops`` those that a rank's device does in a second at most,
    in dense bf16; None for devices that are not known, and in full precision. ``document`` is as the ranks got it:
    ``overrides`` and layout are written into it.
    """

    world_size: int
    layout: dict[str, int]
    wrap: str
    distributed_optimizer: bool
    layers: str
    device: Literal["cuda", "cpu"]
    device_name: str | None
    device_peak_flops: float | None
    seq_length: int | None
    micro_batch_size: int | None
    global_batch_size: int | None
    parameters: int
    padded_parameters: int
    ranks: list[RankReport]
    losses: list[float]
    grad_norms: list[float | None]
    step_seconds: float | None
    model_flops: int | None
    document: dict[str, Any]
    overrides: list[str]
    versions: dict[str, str]

    @property
    def tokens_per_second_per_gpu(self) -> float | None:
        """Tokens of a step, by its time and the number of ranks; None if no step was timed."""
        if self.step_seconds is None or self.global_batch_size is None or self.seq_length is None:
            return None
        return self.global_batch_size * self.seq_length / self.step_seconds / self.world_size

    @property
    def model_flops_utilization(self) -> float | None:
        """FLOPs that the model needs, by those that the devices could have done; None if one of them is unknown."""
        if self.step_seconds is None or self.model_flops is None or self.device_peak_flops is None:
            return None
        return self.model_flops / (self.step_seconds * self.world_size * self.device_peak_flops)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        derived = {
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "model_flops_utilization": self.model_flops_utilization,
        }
        return {"kind": "build"} | asdict(self) | derived


def tables(report: BuildReport) -> list[RenderableType]:
    """Render a report for a terminal: ranks and stages, memory, then steps if there were any, then the totals."""
    parts: list[RenderableType] = [_ranks_table(report), _memory_table(report)]
    if report.losses:
        parts.append(_steps_table(report))
    total = f"parameters of the whole model: {report.parameters:,}"
    if report.padded_parameters != report.parameters:
        total += f" ({report.padded_parameters:,} with the padded vocabulary)"
    parts.append(total)
    if report.step_seconds is not None:
        parts.append(f"time of a step: {report.step_seconds:.3f} s, the mean of all but the first, which warms up")
    if report.tokens_per_second_per_gpu is not None:
        whole = report.tokens_per_second_per_gpu * report.world_size
        parts.append(f"tokens per second: {whole:,.0f}, of a rank {report.tokens_per_second_per_gpu:,.0f}")
    if report.model_flops_utilization is not None:
        parts.append(f"model-FLOPs utilisation: {report.model_flops_utilization:.1%}")
    return parts


def _ranks_table(report: BuildReport) -> RenderableType:
    from rich.table import Table

    sizes = " ".join(f"{name}={size}" for name, size in report.layout.items())
    table = Table(title=f"{report.world_size} rank(s): {sizes}, wrapped with {report.wrap}", title_justify="left")
    # Coordinates along axes of one rank say nothing.
    axes = [axis for axis in ("tp", "pp", "dp", "cp", "ep") if report.layout[axis] > 1]
    for name in ("rank", *axes, "stage", "layers", "parameters"):
        table.add_column(name, justify="right")
    table.add_column("wrappers")
    for rank in report.ranks:
        for chunk in rank.chunks:
            first = chunk is rank.chunks[0]
            place = [str(rank.rank), *(str(getattr(rank, axis)) for axis in axes)] if first else [""] * (len(axes) + 1)
            table.add_row(
                *place,
                str(chunk.vp_stage),
                layer_ranges(chunk.layers),
                f"{chunk.parameters:,}",
                " > ".join(chunk.wrappers),
            )
    return table


def _memory_table(report: BuildReport) -> RenderableType:
    """The kinds of memory that this device has."""
    from rich.table import Table

    peaks = [asdict(rank.peak_memory_bytes) for rank in report.ranks]
    kinds = [kind for kind in peaks[0] if peaks[0][kind] is not None]
    table = Table(title="peak memory, GiB", title_justify="left")
    for name in ("rank", *kinds):
        table.add_column(name, justify="right")
    for rank, peak in zip(report.ranks, peaks, strict=True):
        table.add_row(str(rank.rank), *(gib(peak[kind]) for kind in kinds))
    return table


def gib(size: int) -> str:
    """Write bytes as GiB with three decimals."""
    return f"{size / 2**30:,.3f}"


def _steps_table(report: BuildReport) -> RenderableType:
    from rich.table import Table

    table = Table()
    for name in ("step", "loss", "gradient norm"):
        table.add_column(name, justify="right")
    for step, (loss, norm) in enumerate(zip(report.losses, report.grad_norms, strict=True), start=1):
        table.add_row(str(step), f"{loss:.6f}", "skipped: overflow" if norm is None else f"{norm:.6f}")
    return table


def verification_tables(rows: Sequence[Row]) -> list[RenderableType]:
    """Render what `bridge verify` found: one line a layout and wrapper, then why some were refused or failed."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="largest relative differences from one process", title_justify="left", box=SIMPLE_HEAD)
    for name in ("layout", "wrapper", "verdict"):
        table.add_column(name, no_wrap=True)
    for name in ("loss", "norm", "weights"):
        table.add_column(name, justify="right", no_wrap=True)
    colours = {"equal": "green", "refused": "yellow"}
    reasons: dict[str, list[str]] = {}
    for row in rows:
        differences = (row.loss_difference, row.grad_norm_difference, row.weight_difference)
        verdict = f"[{colours.get(row.verdict, 'red')}]{row.verdict}"
        numbers = ["" if difference is None else f"{difference:.1e}" for difference in differences]
        table.add_row(row.layout, row.wrapper, verdict, *numbers)
        if row.reason is not None:
            reasons.setdefault(f"{row.verdict}: {row.reason}", []).append(f"{row.layout} with {row.wrapper}")
    return [table, *(escape(f"{'; '.join(cases)}\n  {reason}") for reason, cases in reasons.items())]


def with_progress(
    items: Iterable[ItemT], total: int, *, describe: Callable[[int, ItemT], str], first: str = ""
) -> Iterator[ItemT]:
    """Pass items through, and show on standard error how far they are: a bar on a terminal, else a line now and then.

    Args:
        items: What is being made, one after the other.
        total: How many there will be.
        describe: What to show beside the number once there are so many, of which this is the last.
        first: What to show before there is any.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(escape(first), total=total)
        told = time.monotonic()
        for done, item in enumerate(items, start=1):
            said = describe(done, item)
            progress.update(task, completed=done, description=escape(said))
            if not console.is_terminal and time.monotonic() - told >= _LINE_EVERY_S:
                console.print(f"{done} of {total}: {said}", soft_wrap=True, markup=False, highlight=False)
                told = time.monotonic()
            yield item


def layer_ranges(layers: Sequence[int]) -> str:
    """Write sorted layer indices as ranges: ``0-3, 8-11``; ``none`` for a stage without layers."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges) or "none"
