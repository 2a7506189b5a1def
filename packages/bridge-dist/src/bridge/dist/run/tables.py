"""Terminal tables of build reports and of `bridge verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from bridge.dist.formatting import format_gib, format_layer_ranges

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bridge.dist.run.report import BuildReport
    from bridge.dist.run.verify import Row


def render_report(report: BuildReport) -> list[RenderableType]:
    """Render a report for a terminal: ranks and stages, memory, training steps, and totals."""
    from rich.markup import escape

    parts: list[RenderableType] = [_make_ranks_table(report), _make_memory_table(report)]
    if report.losses:
        parts.append(_make_steps_table(report))
    total = f"parameters of the whole model: {report.parameters:,}"
    if report.padded_parameters != report.parameters:
        total += f" ({report.padded_parameters:,} with the padded vocabulary)"
    parts.append(total)
    if report.fusions:
        parts.append(f"fusions of Transformer Engine's layers: {', '.join(report.fusions)}")
    origin = "random" if report.weights is None else f"loaded from {escape(report.weights)}"
    parts.append(f"initial weights: {origin}")
    if report.step_seconds is not None:
        parts.append(f"step time: {report.step_seconds:.3f} s (mean without the first step, which warms up)")
    if report.tokens_per_second_per_gpu is not None:
        whole = report.tokens_per_second_per_gpu * report.world_size
        parts.append(f"tokens per second: {whole:,.0f} ({report.tokens_per_second_per_gpu:,.0f} per rank)")
    if report.model_flops_utilization is not None:
        parts.append(f"model-FLOPs utilisation: {report.model_flops_utilization:.1%}")
    if report.saved is not None:
        parts.append(f"saved iteration {report.iteration} to {escape(report.saved)}")
    return parts


def _make_ranks_table(report: BuildReport) -> RenderableType:
    from rich.table import Table

    sizes = " ".join(f"{name}={size}" for name, size in report.layout.items())
    wrapper = " ".join(filter(None, [report.wrap, report.sharding_strategy]))
    table = Table(title=f"{report.world_size} rank(s): {sizes}, wrapped with {wrapper}", title_justify="left")
    # A coordinate along an axis of size 1 is always 0.
    axes = [axis for axis in ("tp", "pp", "dp", "cp", "ep") if report.layout[axis] > 1]
    for name in ("rank", *axes, "stage", "layers", "parameters"):
        table.add_column(name, justify="right")
    table.add_column("wrappers")
    for rank in report.ranks:
        for chunk in rank.chunks:
            first = chunk is rank.chunks[0]
            coordinates = (
                [str(rank.rank), *(str(getattr(rank, axis)) for axis in axes)] if first else [""] * (len(axes) + 1)
            )
            table.add_row(
                *coordinates,
                str(chunk.vp_stage),
                format_layer_ranges(chunk.layers),
                f"{chunk.parameters:,}",
                " > ".join(chunk.wrappers),
            )
    return table


def _make_memory_table(report: BuildReport) -> RenderableType:
    """Return the table of peak memory, with the kinds that this device reports."""
    from rich.table import Table

    peaks = [asdict(rank.peak_memory_bytes) for rank in report.ranks]
    kinds = [kind for kind in peaks[0] if peaks[0][kind] is not None]
    table = Table(title="peak memory, GiB", title_justify="left")
    for name in ("rank", *kinds):
        table.add_column(name, justify="right")
    for rank, peak in zip(report.ranks, peaks, strict=True):
        table.add_row(str(rank.rank), *(format_gib(peak[kind]) for kind in kinds))
    return table


def _make_steps_table(report: BuildReport) -> RenderableType:
    from rich.table import Table

    table = Table()
    for name in ("step", "loss", "gradient norm"):
        table.add_column(name, justify="right")
    first = report.iteration - len(report.losses) + 1
    for step, (loss, norm) in enumerate(zip(report.losses, report.grad_norms, strict=True), start=first):
        table.add_row(str(step), f"{loss:.6f}", "skipped: overflow" if norm is None else f"{norm:.6f}")
    return table


def render_verification(rows: Sequence[Row]) -> list[RenderableType]:
    """Render the results of `bridge verify`: a row per layout and wrapper, then reasons of refusals and failures."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    compares_logits = any(row.logits_difference is not None for row in rows)
    title = "largest relative differences from one process" + (", logits: from transformers" if compares_logits else "")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)  # 80 columns
    for name in ("layout", "wrapper", "verdict"):
        table.add_column(name, no_wrap=True)
    for name in (*(["logits"] if compares_logits else []), "loss", "norm", "weights"):
        table.add_column(name, justify="right", no_wrap=True)
    colours = {"equal": "green", "refused": "yellow"}
    reasons: dict[str, list[str]] = {}
    for row in rows:
        differences = [row.loss_difference, row.grad_norm_difference, row.weight_difference]
        if compares_logits:
            differences.insert(0, row.logits_difference)
        verdict = f"[{colours.get(row.verdict, 'red')}]{row.verdict}"
        numbers = ["" if difference is None else f"{difference:.1e}" for difference in differences]
        table.add_row(row.layout, row.wrapper, verdict, *numbers)
        if row.reason is not None:
            reasons.setdefault(f"{row.verdict}: {row.reason}", []).append(f"{row.layout} with {row.wrapper}")
    return [table, *(escape(f"{'; '.join(cases)}\n  {reason}") for reason, cases in reasons.items())]
