"""Rendering of pages from templates; every page is one file that loads nothing. No torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bridge.dist.formatting import format_gib, format_seconds
from bridge.dist.plan.show.charts import Chart


def render_template(name: str, *, charts: Sequence[Chart], data: dict[str, Any], **values: object) -> str:
    """Return a page: the template gets the charts by name and the values, the script the charts and the data."""
    return (
        _make_environment()
        .get_template(name)
        .render(
            charts={chart.name: chart for chart in charts},
            data=data | {"charts": {chart.name: chart.to_json() for chart in charts}},
            style=_read_source("page.css"),
            script=_read_source("page.js"),
            bokeh=_read_bokeh(),
            **values,
        )
    )


def _make_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Bokeh reads the keys in the order that it wrote them in; jinja2 would sort them.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {"gib": format_gib, "seconds": format_seconds}
    return environment


def _read_source(name: str) -> Markup:
    """Return a file that lies beside the templates, as it is: nothing in it comes from a plan."""
    return Markup((files(__package__) / "templates" / name).read_text(encoding="utf-8"))


@cache
def _read_bokeh() -> Markup:
    """Return the script of the charts, without Bokeh's widgets, tables and formulas, which no page uses."""
    return Markup("\n".join(Resources(mode="inline", components=["bokeh"], log_level="error").js_raw))
