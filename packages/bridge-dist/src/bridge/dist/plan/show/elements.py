"""Functions that make the elements of a page. A page is a tree, so that writing it escapes every text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from xml.etree.ElementTree import Element

ROW, GAP = 26, 4
"""The height of a row in a picture, and the empty part of it."""


def node(tag: str, *children: Element | str, **attributes: str | float) -> Element:
    """Make an element; in attribute names, a trailing ``_`` is dropped and other ``_`` become ``-``."""
    element = Element(tag)
    for name, value in attributes.items():
        written = value if isinstance(value, str) else f"{value:.7g}"
        element.set(name.rstrip("_").replace("_", "-"), written)
    for child in children:
        if not isinstance(child, str):
            element.append(child)
        elif len(element):  # ElementTree keeps the text after a child in the child's tail
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    return element


def make_picture(name: str, width: float, height: float, parts: Iterable[Element]) -> Element:
    """Make a picture; the parts with the ids NAME-title and NAME-desc describe it to screen readers."""
    return node(
        "svg",
        *parts,
        viewBox=f"0 0 {width:.7g} {height:.7g}",
        role="img",
        aria_labelledby=f"{name}-title",
        aria_describedby=f"{name}-desc",
    )


def make_legend(entries: Iterable[tuple[str, str]]) -> Element:
    """Make a legend from pairs of a name and the fill of its square."""
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
    """Yield a table that can be folded and copied; nothing if there are no rows."""
    if not rows:
        return
    lines = [
        node("tr", *(_make_cell(value, is_header=index == 0) for index, value in enumerate(row.values())))
        for row in rows
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


def _make_cell(value: str | int, *, is_header: bool) -> Element:
    if is_header:
        return node("th", str(value), scope="row")
    if isinstance(value, str):
        return node("td", value, class_="words")
    # The style sheet separates groups of digits by space, so that copied numbers contain digits only.
    return node("td", *(node("span", group) for group in f"{value:,}".split(",")))
