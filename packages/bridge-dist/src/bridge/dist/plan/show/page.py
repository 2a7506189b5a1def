"""A self-contained HTML page for a plan: pictures of memory and schedule, and tables of numbers to copy."""

from __future__ import annotations

from xml.etree.ElementTree import tostring

from bridge.dist.plan.forecast.timeline import timeline_of
from bridge.dist.plan.results import Plan
from bridge.dist.plan.show.elements import node
from bridge.dist.plan.show.memory_picture import make_memory_section
from bridge.dist.plan.show.number_tables import make_numbers_section
from bridge.dist.plan.show.page_style import SCRIPT, STYLE
from bridge.dist.plan.show.schedule_picture import make_schedule_section
from bridge.dist.plan.show.words import describe_plan


def render_page(plan: Plan, title: str) -> str:
    """Return a plan as an HTML page; ``title`` names the model, such as the name of its file."""
    timeline = timeline_of(plan)
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # The page loads nothing; its style and its only script are inline.
        node(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
        ),
        node("title", f"Plan of {title}"),
        node("style", STYLE),
    )
    words = [
        part
        for subject, statement in describe_plan(plan, timeline).items()
        for part in (node("dt", subject), node("dd", statement))
    ]
    body = node(
        "body",
        node(
            "main",
            node("h1", f"Plan of {title}"),
            node("dl", *words),
            make_memory_section(plan),
            make_schedule_section(plan, timeline),
            make_numbers_section(plan, timeline),
        ),
        node("script", SCRIPT),
    )
    return "<!doctype html>\n" + tostring(node("html", head, body, lang="en"), encoding="unicode", method="html")
