"""The page of a plan: self-contained HTML with charts, and tables of numbers to copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bridge.dist.layout import Layout
from bridge.dist.plan.forecast.advice import Advice
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.forecast.step_time import make_timeline
from bridge.dist.plan.results import Origin, Plan
from bridge.dist.plan.show.bar_chart import make_bar_chart
from bridge.dist.plan.show.charts import Chart
from bridge.dist.plan.show.memory_chart import make_memory_chart
from bridge.dist.plan.show.number_tables import make_tables
from bridge.dist.plan.show.schedule_chart import make_schedule_chart
from bridge.dist.plan.show.template import render_template
from bridge.dist.plan.show.what_if import describe_memory, make_grid
from bridge.dist.plan.show.words import describe_plan, describe_time, list_largest_traffic


def render_page(
    plan: Plan,
    title: str,
    *,
    machine: Machine | None = None,
    origin: Origin | None = None,
    advice: Sequence[Advice] = (),
) -> str:
    """Return a plan as an HTML page.

    Args:
        plan: The plan.
        title: Names the model, such as the name of its file.
        machine: The machine that times are estimated for; None for a page without times.
        origin: The command that made the plan, to show how to repeat it.
        advice: Changes that need less memory, if the plan does not fit.
    """
    grid = make_grid(plan, machine)
    return render_template(
        "plan.html",
        title=f"Plan of {title}",
        charts=[
            make_memory_chart("memory", describe_memory(plan), end=grid.planned["end"]),
            make_schedule_chart(plan, make_timeline(plan, machine), is_timed=machine is not None),
            *_make_time_chart(plan),
            *_make_traffic_chart(plan),
        ],
        data={"grid": grid.to_json()},
        subtitle=f"{plan.world_size:,} rank(s): {Layout(**plan.layout)}; layers: {plan.layers}",
        plan=plan,
        grid=grid,
        now=grid.planned,
        advice=advice,
        origin=origin,
        statements=describe_plan(plan) | describe_time(plan.time),
        tables=list(make_tables(plan)),
    )


def _make_time_chart(plan: Plan) -> Iterator[Chart]:
    if plan.time is not None:
        yield make_bar_chart("time", plan.time.parts, unit="s", axis="seconds of a step")


def _make_traffic_chart(plan: Plan) -> Iterator[Chart]:
    most = {f"{traffic.group}: {traffic.operation}": (traffic, stage) for traffic, stage in list_largest_traffic(plan)}
    if most:
        yield make_bar_chart(
            "traffic",
            {name: traffic.bytes / 2**30 for name, (traffic, _) in most.items()},
            unit="GiB",
            axis="GiB per step",
            notes={
                name: f"{traffic.ranks:,} ranks, {traffic.calls:,} calls; on stage {stage.pp}"
                for name, (traffic, stage) in most.items()
            },
        )
