"""Comparison of build reports and plans. Importing this module does not import torch; only planning does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from bridge.config import Document
from bridge.dist.document_layout import switch_off_dropout
from bridge.dist.formatting import format_gib
from bridge.dist.plan.forecast.machine import find_machine
from bridge.dist.plan.layers import Layers, prepare_process
from bridge.dist.plan.results import NOT_COVERED, RESERVED
from bridge.dist.process.imports import import_megatron
from bridge.dist.run.devices import hide_gpus
from bridge.dist.run.report_file import Part, read_report
from bridge.dist.wrapper import ShardingStrategy, Wrapper

Value = str | int | float | None


class _Measure(NamedTuple):
    """A row: its name in JSON and in the table, the unit of its numbers, and their format."""

    name: str
    label: str
    unit: str | None = None
    write: Callable[[Any], str] = str


_JOB = (
    _Measure("kind", "kind"),
    _Measure("device", "device"),
    _Measure("machine", "time estimated for"),
    _Measure("ranks", "ranks", write="{:,}".format),
    _Measure("layout", "layout"),
    _Measure("wrapper", "wrapper"),
    _Measure("layers", "layers"),
    _Measure("batch", "batch"),
    _Measure("micro_batch_size", "microbatch"),
    _Measure("stage", "fullest stage"),
)
_NUMBERS = (
    _Measure("parameters", "parameters", "parameters", "{:,}".format),
    _Measure("weights", "weights, GiB", "bytes", format_gib),
    _Measure("gradients", "gradients, GiB", "bytes", format_gib),
    _Measure("master", "master, GiB", "bytes", format_gib),
    _Measure("state", "state, GiB", "bytes", format_gib),
    _Measure("activations", "activations, GiB", "bytes", format_gib),
    _Measure("unsharded", "unsharded, GiB", "bytes", format_gib),
    _Measure("peak", "total or allocated, GiB", "bytes", format_gib),
    _Measure("reserved", "reserved, GiB", "bytes", format_gib),
    _Measure("resident", "resident, GiB", "bytes", format_gib),
    _Measure("step_seconds", "step, s", "seconds", "{:.3f}".format),
    _Measure("tokens_per_second_per_gpu", "tokens/s per GPU", "tokens per second", "{:,.0f}".format),
    _Measure("model_flops_utilization", "model-FLOPs utilisation", "share", "{:.1%}".format),
)
_TIMES = ("step_seconds", "tokens_per_second_per_gpu", "model_flops_utilization")
_SAME_JOB = ("ranks", "layout", "wrapper", "layers", "batch", "micro_batch_size", "parameters")
"""Measures that must be equal if the files describe the same job."""
_STAGE_KEYS = {
    "weights": "weight_bytes",
    "gradients": "gradient_bytes",
    "master": "master_bytes",
    "state": "state_bytes",
    "activations": "activation_bytes",
    "unsharded": "unsharded_bytes",
    "peak": "total_bytes",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measure of every file (None if it is missing), and the differences from the first in per cent."""

    name: str
    unit: str | None
    values: list[Value]
    differences: list[float | None]

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON types."""
        return {
            "name": self.name,
            "unit": self.unit,
            "values": self.values,
            "difference_percent": self.differences,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The contents of several files, their measures, and notes on what cannot be compared.

    Memory is that of the largest rank: ``peak`` is the total of a plan, and the allocated peak of a run.
    """

    files: list[str]
    parts: list[Part]
    rows: list[Row]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON types."""
        rows = [row.as_dict() for row in self.rows]
        return {"kind": "comparison", "files": self.files, "rows": rows, "notes": self.notes}


def compare(files: Sequence[str]) -> Comparison:
    """Compare build reports and plans; a single report is compared with a new plan of the same job.

    Raises:
        DocumentError: A file cannot be read, or is neither a report nor a plan; or the only file is a plan.
        BridgeError: The job of a report cannot be planned.
    """
    names, parts = list(files), [read_report(file) for file in files]
    if len(parts) == 1:
        names.append("its plan")
        parts.append(_plan_same_job(parts[0]))
    values = [_read_values(part) for part in parts]
    rows = [_make_row(measure, [one.get(measure.name) for one in values]) for measure in (*_JOB, *_NUMBERS)]
    return Comparison(files=names, parts=parts, rows=rows, notes=list(_list_notes(names, parts, rows)))


def render_comparison(comparison: Comparison) -> list[RenderableType]:
    """Render a comparison for a terminal of 80 columns: a column per file, a row per measure that any of them has."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for file in comparison.files:
        table.add_column(escape(file), justify="right", overflow="fold")
    for label, cells in list_rows(comparison):
        table.add_row(label, *map(escape, cells))
    return [table, *("", *map(escape, comparison.notes))]


def list_rows(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Yield the label and the cells of each measure that any of the files has."""
    measures = {measure.name: measure for measure in (*_JOB, *_NUMBERS)}
    for row in comparison.rows:
        if any(value is not None for value in row.values):
            measure = measures[row.name]
            cells = zip(row.values, row.differences, strict=True)
            yield measure.label, [_format_cell(measure, value, difference) for value, difference in cells]


def _format_cell(measure: _Measure, value: Value, difference: float | None) -> str:
    if value is None:
        return "-"
    written = measure.write(value)
    return written if difference is None else f"{written} {difference:+.1f} %"


def _make_row(measure: _Measure, values: list[Value]) -> Row:
    first = values[0]
    differences = [None if measure.unit is None else _compute_difference(first, value) for value in values[1:]]
    return Row(name=measure.name, unit=measure.unit, values=values, differences=[None, *differences])


def _compute_difference(first: Value, value: Value) -> float | None:
    """Return the difference from the first in per cent; None if a number is missing or the first is zero."""
    if not isinstance(first, int | float) or not isinstance(value, int | float) or first == 0:
        return None
    return 100 * (value - first) / first


def _list_notes(names: Sequence[str], parts: Sequence[Part], rows: Sequence[Row]) -> Iterator[str]:
    differing = [row.name for row in rows if row.name in _SAME_JOB and len(set(row.values) - {None}) > 1]
    if differing:
        yield f"not the same job: they differ in {', '.join(differing)}"
    kinds = [part.require("kind", str) for part in parts]
    builds = [(name, part) for name, kind, part in zip(names, kinds, parts, strict=True) if kind == "build"]
    if any(part.require("device", str) == "cpu" for _, part in builds):
        yield (
            "resident memory includes the interpreter and libraries: it cannot be compared with a plan or with "
            "allocated GPU memory"
        )
    for name, part in builds:
        if part.get("seq_length", int) is None:
            yield f"{name} trained no step: its memory covers the build only"
    if len(set(kinds)) > 1:
        yield f"not included in a plan's total: {'; '.join((RESERVED, *NOT_COVERED))}"


def _read_values(part: Part) -> dict[str, Value]:
    layout = {axis: size for axis, size in part.require("layout", dict).items() if size != 1}
    if layout.get("etp") == layout.get("tp"):
        layout.pop("etp", None)
    strategy = _read_sharding_strategy(part)
    sharded = f" {strategy}" if strategy else ""
    sharded += ", distributed optimizer" if part.require("distributed_optimizer", bool) else ""
    kind = part.require("kind", str)
    # A plan has estimates in a mapping of their own.
    times = part.require_mapping("time") if part.get("time", dict) is not None else part
    values: dict[str, Value] = {
        "kind": kind,
        "ranks": part.require("world_size", int),
        "layout": " ".join(f"{axis}{size}" for axis, size in layout.items()) or "one rank",
        "wrapper": part.require("wrap", str) + sharded,
        "layers": part.require("layers", str),
        "batch": _format_batch(part),
        "micro_batch_size": part.get("micro_batch_size", int),
        "parameters": part.require("parameters", int),
        "machine": times.get("machine", str),
        **{name: times.get(name, float) for name in _TIMES},
    }
    return values | (_read_build(part) if kind == "build" else _read_fullest_stage(part))


def _read_sharding_strategy(part: Part) -> str | None:
    """Return what Megatron-FSDP shards; files without the key are from when it sharded everything."""
    is_megatron_fsdp = part.require("wrap", str) == Wrapper.MEGATRON_FSDP
    return part.get("sharding_strategy", str) or (ShardingStrategy.OPTIM_GRADS_PARAMS if is_megatron_fsdp else None)


def _format_batch(part: Part) -> str | None:
    samples, tokens = part.get("global_batch_size", int), part.get("seq_length", int)
    return None if samples is None or tokens is None else f"{samples:,} x {tokens:,}"


def _read_fullest_stage(plan: Part) -> dict[str, Value]:
    fullest = max(plan.require_mappings("stages"), key=lambda stage: stage.require("total_bytes", int))
    kinds = {name: fullest.require(key, int) for name, key in _STAGE_KEYS.items()}
    return {"stage": fullest.require("pp", int), **kinds}


def _read_build(report: Part) -> dict[str, Value]:
    """Return the device of a build, and the memory of its largest rank."""
    peaks = [
        (rank.require("pp", int), rank.require_mapping("peak_memory_bytes"))
        for rank in report.require_mappings("ranks")
    ]
    sizes = [
        {"stage": stage, **{kind: peak.get(kind, int) for kind in ("allocated", "reserved", "resident")}}
        for stage, peak in peaks
    ]
    fullest = max(sizes, key=lambda size: size["allocated"] or size["resident"] or 0)
    fullest["peak"] = fullest.pop("allocated")
    return {"device": report.get("device_name", str) or report.require("device", str), **fullest}


def _plan_same_job(report: Part) -> Part:
    """Plan the job of a report as it was trained: without dropout.

    Raises:
        DocumentError: It is not a build report, or the build trained no step.
        BridgeError: The job cannot be planned.
    """
    if report.require("kind", str) != "build":
        raise report.make_error("kind", "a single plan cannot be compared: pass a build report as well")
    if _format_batch(report) is None:
        raise report.make_error(
            "seq_length", "the build trained no step, so its batch is unknown: run bridge build with --steps"
        )
    hide_gpus()  # planning uses no GPU
    layers = _choose_layers(report)
    prepare_process(layers)
    import_megatron(with_compiler=False)
    # These import torch and Megatron, which comparing files does not need.
    from bridge.dist.job import make_builder
    from bridge.dist.plan.forecast.step_time import estimate_time
    from bridge.dist.plan.plan import PlanOptions, plan
    from bridge.dist.train.batch import Batch

    document = Document(report.require("document", dict), report.source)
    switch_off_dropout(document)
    make_builder(document.config()).check_restore()
    wrapper = report.require("wrap", str)
    if wrapper not in list(Wrapper):
        raise report.make_error("wrap", f"expected one of {', '.join(Wrapper)}, got {wrapper!r}")
    strategy = _read_sharding_strategy(report)
    if strategy is not None and strategy not in list(ShardingStrategy):
        expected = ", ".join(ShardingStrategy)
        raise report.make_error("sharding_strategy", f"expected one of {expected}, got {strategy!r}")
    options = PlanOptions(
        batch=Batch(
            seq_length=report.require("seq_length", int),
            micro_batch_size=report.require("micro_batch_size", int),
            global_batch_size=report.require("global_batch_size", int),
        ),
        world_size=report.require("world_size", int),
        wrapper=Wrapper(wrapper),
        distributed_optimizer=report.require("distributed_optimizer", bool),
        sharding_strategy=None if strategy is None else ShardingStrategy(strategy),
        layers=layers,
    )
    found = plan(document, options)
    machine = find_machine(report.get("device_name", str) or "")
    if machine is not None:
        found = replace(found, time=estimate_time(found, machine))
    return Part(data=found.to_json(), source=f"the plan of {report.source}")


def _choose_layers(report: Part) -> Layers:
    """Return the layers that a build had."""
    if report.require("layers", str) == "transformer_engine":
        return Layers.TRANSFORMER_ENGINE
    return Layers.PYTORCH if report.require("device", str) == "cuda" else Layers.INSTALLED
