"""The elements of a page: made, not written as text, so that every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from xml.etree.ElementTree import Element

ROW, GAP = 26, 4
"""The height of a row of a picture, and how much of it stays empty."""


def node(tag: str, *children: Element | str, **attributes: str | float) -> Element:
    """Make an element; ``_`` in the name of an attribute stands for ``-``, and is dropped at its end."""
    made = Element(tag)
    for name, value in attributes.items():
        written = value if isinstance(value, str) else f"{value:.7g}"
        made.set(name.rstrip("_").replace("_", "-"), written)
    for child in children:
        if not isinstance(child, str):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def make_picture(name: str, width: float, height: float, parts: Iterable[Element]) -> Element:
    """Make a picture, which two of its parts describe in words: those with the ids NAME-title and NAME-desc."""
    return node(
        "svg",
        *parts,
        viewBox=f"0 0 {width:.7g} {height:.7g}",
        role="img",
        aria_labelledby=f"{name}-title",
        aria_describedby=f"{name}-desc",
    )


def make_legend(entries: Iterable[tuple[str, str]]) -> Element:
    """Make a list of names, each beside a square filled as is said."""
    items = [
        node(
            "li",
            node("svg", node("rect", width=14, height=14, fill=fill), width=14, height=14, aria_hidden="true"),
            name,
        )
        for name, fill in entries
    ]
    return node("ul", *items, class_="legend")


def make_table(
    name: str, caption: str, rows: Sequence[dict[str, str | int]], *, is_open: bool = False
) -> Iterator[Element]:
    """Make a table that can be folded away and copied; nothing without rows."""
    if not rows:
        return
    lines = [
        node("tr", *(_make_cell(value, of_row=index == 0) for index, value in enumerate(row.values()))) for row in rows
    ]
    table = node(
        "table",
        node("thead", node("tr", *(node("th", column, scope="col") for column in rows[0]))),
        node("tbody", *lines),
        id=f"table-{name}",
        aria_label=caption,
    )
    button = node("button", "Copy", type="button", data_table=f"table-{name}", hidden="hidden")
    summary = node("summary", f"{caption} ({len(rows):,})")
    details = node("details", summary, button, node("div", table, class_="scroll"))
    if is_open:
        details.set("open", "open")
    yield details


def _make_cell(value: str | int, *, of_row: bool) -> Element:
    if of_row:
        return node("th", str(value), scope="row")
    if isinstance(value, str):
        return node("td", value, class_="words")
    return node("td", *(node("span", group) for group in f"{value:,}".split(",")))
