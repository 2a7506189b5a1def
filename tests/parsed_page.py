"""A parser of the page of a plan."""

import base64
import gzip
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import numpy as np

from bridge.dist.plan.results import Plan
from bridge.dist.plan.show.page import render_page


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list["Element | str"] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list["Element"]:
        """Return the elements below this one with this tag and these attributes; a class may be one of several."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                has = child.attributes
                wanted = {name.rstrip("_"): value for name, value in attributes.items()}
                if child.tag == tag and all(
                    value in (has.get(key, ""), *has.get(key, "").split()) for key, value in wanted.items()
                ):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def one(self, tag: str, **attributes: str) -> "Element":
        (found,) = self.all(tag, **attributes)
        return found

    def all_elements(self) -> list["Element"]:
        """Return the elements below this one."""
        children = [child for child in self.children if isinstance(child, Element)]
        return [found for child in children for found in (child, *child.all_elements())]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class StrictParser(HTMLParser):
    """A parser of pages that asserts that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)
        if tag not in ("meta", "input"):
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def parse_page(plan: Plan, title: str = "a model") -> Element:
    return StrictParser(render_page(plan, title)).root


def read_data(page: Element) -> dict[str, Any]:
    """Return what the scripts of a page read."""
    found: dict[str, Any] = json.loads(page.one("script", id="data").text)
    return found


def read_columns(page: Element, chart: str, source: str) -> dict[str, list[Any]]:
    """Return the columns of a named data source of a chart."""
    (found,) = _find_models(read_data(page)["charts"][chart]["doc"], source)
    return {name: _read_column(values) for name, values in found["attributes"]["data"]["entries"]}


def _find_models(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [found for item in value for found in _find_models(item, name)]
    if not isinstance(value, dict):
        return []
    here = [value] if value.get("name") == "ColumnDataSource" and value["attributes"].get("name") == name else []
    return here + _find_models(list(value.values()), name)


def _read_column(values: Any) -> list[Any]:
    if isinstance(values, list):
        return values
    data = gzip.decompress(base64.b64decode(values["array"]["data"]))
    array: list[Any] = np.frombuffer(data, values["dtype"]).tolist()
    return array


def rows(table: Element) -> list[dict[str, str]]:
    names = [cell.text for cell in table.one("thead").all("th", scope="col")]
    rows = [[cell.text for cell in row.children if isinstance(cell, Element)] for row in table.one("tbody").all("tr")]
    return [dict(zip(names, row, strict=True)) for row in rows]
