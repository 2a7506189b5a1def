"""Edit YAML text in place: comments, order, spelling and blank lines outside the changed values stay."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from bridge.config.errors import ConfigError, DocumentError
from bridge.config.text.dump import check_writable, dump_flow, dump_yaml
from bridge.config.text.nodes import Node
from bridge.config.text.parse import ParsedText, parse_yaml
from bridge.config.text.spans import LINE_BREAK, REST_OF_LINE, Spans, is_block_collection, list_children

_CANNOT_EDIT = "this YAML text cannot be changed in place: edit it by hand, or write the data to a new file"


@dataclass(frozen=True)
class _Place:
    """The context of a value: the top level, after a key or a dash in `column`, or in a flow collection."""

    kind: Literal["top", "key", "item", "flow"]
    column: int = 0


def edit_text(parsed: ParsedText, data: Any, dropped: Collection[Node] = ()) -> str:
    """Return the YAML text of `parsed`, changed only where its data differs from `data`.

    New keys follow the last key of their mapping, and a removed value takes its line with it. An alias stays if its
    anchor keeps its value; otherwise the value replaces the alias. New values in a flow collection are written on one
    line.

    Args:
        parsed: The result of `parse_yaml`.
        data: The data of the returned text.
        dropped: List items that were removed. Without them, the data does not tell which of several equal items went.

    Raises:
        ConfigError: the layout of the text does not allow the change, or YAML cannot express `data`.
    """
    check_writable(data)
    root = parsed.root
    if root is None or (root.value is None and root.start == root.end):
        return parsed.byte_order_mark + _check_result(_append(parsed.text, data), data)
    if are_equal(root.to_data(), data) and not dropped:
        return parsed.byte_order_mark + parsed.text
    try:
        text = _check_result(_Editor(parsed.text, dropped).edit(root, data), data)
    except ConfigError:
        # A new line after a block scalar may have become part of it: rewrite block scalars too.
        text = _check_result(_Editor(parsed.text, dropped, keep_blocks=False).edit(root, data), data)
    return parsed.byte_order_mark + text


def are_equal(one: Any, other: Any) -> bool:
    """Return whether plain data is equal in values and types, regardless of the order of keys."""
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return False
        return all(are_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(are_equal, one, other))
    return type(one) is type(other) and repr(one) == repr(other)  # repr tells -0.0 from 0.0


def _check_result(text: str, data: Any) -> str:
    """Return `text` after checking that it reads back as `data`."""
    try:
        right = are_equal(parse_yaml(text).data, data)
    except DocumentError:
        right = False
    if not right:
        raise ConfigError(_CANNOT_EDIT)
    return text


def _append(text: str, data: Any) -> str:
    """Return a text that has only comments, with `data` appended."""
    if data is None:
        return text
    newline = _find_newline(text)
    gap = newline if text and not text.endswith(("\n", "\r")) else ""
    return text + gap + dump_yaml(data).replace("\n", newline)


def _find_newline(text: str) -> str:
    found = LINE_BREAK.search(text)
    return found[0] if found else "\n"


class _Editor:
    """Compares the tree of a text with data and collects the splices that change the text."""

    def __init__(self, text: str, dropped: Collection[Node], *, keep_blocks: bool = True) -> None:
        self._newline = _find_newline(text)
        self._lacks_line_break = not text.endswith(("\n", "\r"))
        self._text = text + self._newline if self._lacks_line_break else text
        self._spans = Spans(self._text)
        self._dropped = dropped
        self._keep_blocks = keep_blocks
        self._splices: list[tuple[int, int, str]] = []
        self._replaced: set[Node] = set()  # nodes that aliases can no longer refer to

    def edit(self, root: Node, data: Any) -> str:
        """Return the text after all changes."""
        self._compare(root, data, _Place("top"))
        # Sorted by start and end: at the same offset, insertions come first, in the order in which they were recorded.
        pieces, at, written = [], 0, ""
        for start, end, written in sorted(self._splices, key=lambda splice: splice[:2]):
            if start < at:  # two changes of the same characters
                raise ConfigError(_CANNOT_EDIT)
            pieces += [self._text[at:start], written]
            at = end
        text = "".join([*pieces, self._text[at:]])
        if at == len(self._text) and not written:  # the last line was removed, and its line break with it
            return text
        return text.removesuffix(self._newline) if self._lacks_line_break else text

    # Comparing

    def _compare(self, node: Node, data: Any, place: _Place) -> bool:
        """Record the changes that turn `node` into `data`; return True if none are needed."""
        if node.alias is not None:
            unchanged = node.alias not in self._replaced and are_equal(node.to_data(), data)
        # A mapping without a common key is another value: replace it as a whole, with its comments.
        elif isinstance(node.value, dict) and isinstance(data, dict) and (node.value.keys() & data.keys() or not data):
            return self._compare_mapping(node, data, place)
        elif isinstance(node.value, list) and isinstance(data, (list, tuple)):
            return self._compare_list(node, data, place)
        else:
            unchanged = are_equal(node.value, data) and (self._keep_blocks or node.style not in ("|", ">"))
        if not unchanged:
            self._replace(node, data, place)
        return unchanged

    def _compare_mapping(self, node: Node, data: dict[str, Any], place: _Place) -> bool:
        kept = {child: data[key] for key, child in node.value.items() if key in data}
        added = {key: value for key, value in data.items() if key not in node.value}
        return self._compare_collection(node, kept, added, place)

    def _compare_list(self, node: Node, data: list[Any] | tuple[Any, ...], place: _Place) -> bool:
        """Compare a list, matching items by position."""
        children = [child for child in node.value if child not in self._dropped]
        if len(data) < len(children):
            # Items were removed, but not which: assume that they were consecutive, up to where the lists differ.
            pairs = zip(children, data, strict=False)
            first = next(
                (i for i, (child, item) in enumerate(pairs) if not are_equal(child.to_data(), item)), len(data)
            )
            children[first : first + len(children) - len(data)] = []
        kept = dict(zip(children, data, strict=False))
        return self._compare_collection(node, kept, list(data[len(children) :]), place)

    def _compare_collection(
        self, node: Node, kept: dict[Node, Any], added: dict[str, Any] | list[Any], place: _Place
    ) -> bool:
        """Compare the kept children with their new values, then remove and add the others."""
        children = list_children(node)
        if not kept and (children or added):  # no child is left to insert beside
            self._replace(node, added, place)
            return False
        entries = self._find_entries(node, children)
        unchanged = True
        for child in children:  # in text order: an anchor comes before its aliases
            if child in kept:
                inner = _Place("flow") if node.style else _Place(*entries[child])
                unchanged &= self._compare(child, kept[child], inner)
            else:
                self._mark_replaced(child)
        if len(kept) < len(children) or added:
            (self._reshape_flow if node.style else self._reshape_block)(node, children, kept.keys(), added)
            unchanged = False
        if not unchanged:
            self._replaced.add(node)
        return unchanged

    def _mark_replaced(self, node: Node) -> None:
        """Mark `node` and everything inside as replaced."""
        self._replaced.add(node)
        if node.alias is None and isinstance(node.value, (dict, list)):
            for child in list_children(node):
                self._mark_replaced(child)

    # Adding and removing

    def _reshape_block(
        self, node: Node, children: list[Node], kept: Collection[Node], added: dict[str, Any] | list[Any]
    ) -> None:
        """Remove and add entries of a block collection, which are whole lines."""
        starts = self._spans.find_starts(node, children)
        for i, child in enumerate(children):
            if child in kept:
                continue
            start, line = starts[i], self._spans.find_line_start(starts[i])
            if not self._text[line:start].strip():
                self._splice(line, self._spans.find_line_after(child))
            elif i == 0:  # it shares its line with the dash of the outer list: the next kept entry moves up to it
                last = next(children[j - 1] for j in range(1, len(children)) if children[j] in kept)
                rest = re.compile(r"\s*").match(self._text, self._spans.find_line_after(last))
                assert rest
                self._splice(start, rest.end())
                kept = {*kept, *children[: children.index(last) + 1]}
        if added:
            lines = dump_yaml(added).split("\n")[:-1]
            column = starts[0] - self._spans.find_line_start(starts[0])
            self._insert_lines(self._spans.find_line_after(children[-1]), lines, column)

    def _reshape_flow(
        self, node: Node, children: list[Node], kept: Collection[Node], added: dict[str, Any] | list[Any]
    ) -> None:
        """Remove and add items of a flow collection, with their commas."""
        starts = self._spans.find_starts(node, children)
        last = max(i for i, child in enumerate(children) if child in kept)
        removed = [i for i, child in enumerate(children) if child not in kept]
        end, close = self._spans.find_end(children[last]), self._spans.find_end(children[-1])
        # The last items go together with the comma before them, unless the text has a trailing comma. Items on several
        # lines go line by line.
        if (
            last + 1 < len(children)
            and self._spans.find_comma(close) is None
            and not LINE_BREAK.search(self._text, end, close)
        ):
            self._splice(end, close)
            removed = [i for i in removed if i < last]
        for i in removed:
            self._remove_between_commas(starts[i], self._spans.find_end(children[i]))
        if added:
            self._splice(end, end, f", {dump_flow(added)[1:-1]}")

    def _remove_between_commas(self, start: int, end: int) -> None:
        """Remove an item with the comma after it, and its line if nothing else is on it."""
        comma = self._spans.find_comma(end)
        end = end if comma is None else comma + 1
        line, rest = self._spans.find_line_start(start), REST_OF_LINE.match(self._text, end)
        if rest and not self._text[line:start].strip():
            self._splice(line, self._spans.find_next_line(rest.end()))
        else:
            blanks = re.compile(r"[ \t]*").match(self._text, end)
            assert blanks
            self._splice(start, end if rest else blanks.end())

    # Replacing

    def _replace(self, node: Node, data: Any, place: _Place) -> None:
        """Record the replacement of `node` with `data`."""
        self._mark_replaced(node)
        holds = isinstance(data, (dict, list, tuple)) and len(data) > 0
        if place.kind == "flow" or not holds or (node.style == "{" and node.value):
            self._replace_inline(node, dump_flow(data) if place.kind == "flow" or holds else _dump_inline(data), place)
        elif place.kind == "key":
            self._replace_below(node, dump_yaml({"": data}).split("\n")[1:-1], place.column)
        else:
            self._replace_beside(node, data, place)

    def _replace_inline(self, node: Node, written: str, place: _Place) -> None:
        """Write a value on the line of its key or dash."""
        start, end = self._spans.find_span(node)
        colon, content = self._spans.find_colon_end(node), self._spans.find_content(node)
        if place.kind == "key" and is_block_collection(node) and content >= self._spans.find_next_line(colon):
            # The old value is on the lines below: a comment on the line of the key stays.
            self._splice(colon, self._spans.find_anchor_end(node, colon), f" {written}")
            self._splice(self._spans.find_line_start(content), self._spans.find_line_after(node))
        else:
            # A key without a value may lack its colon, as in `{key}`.
            missing = ":" if start == end and node.key and self._text[start - 1] != ":" else ""
            self._splice(start, end, missing + self._find_missing_space(start) + written + self._find_tail(node))

    def _replace_below(self, node: Node, lines: list[str], column: int) -> None:
        """Write a collection on the lines after its key."""
        start, _ = self._spans.find_span(node)
        colon, after = self._spans.find_colon_end(node), self._spans.find_line_after(node)
        content = self._spans.find_content(node) if is_block_collection(node) else start
        if content < self._spans.find_next_line(colon):  # on the line of the key, whose comment stays there
            self._splice(colon, self._spans.find_end(node), self._find_tail(node))
            self._insert_lines(after, lines, column)
        else:
            self._splice(colon, self._spans.find_anchor_end(node, colon))
            self._splice(self._spans.find_line_start(content), after)
            self._insert_lines(after, lines, column)

    def _replace_beside(self, node: Node, data: Any, place: _Place) -> None:
        """Write a collection after a dash or at the top level."""
        start, end = self._spans.find_span(node)
        lines = dump_yaml([data]).split("\n")[:-1]
        gap = self._find_missing_space(start)
        line = self._spans.find_line_start(start)
        column = start - line + len(gap)
        if place.kind == "top" and self._text[line:start].strip():  # after a document marker (---)
            gap, column = self._newline, 0
        indent = self._newline + " " * column
        self._splice(start, end, gap + indent.join(line[2:] for line in lines) + self._find_tail(node))

    def _find_missing_space(self, index: int) -> str:
        """Return the space to insert before a value at `index`; empty if the text has one."""
        return " " if self._text[max(index - 1, 0) : index].strip(" \t\r\n[{") else ""

    def _find_tail(self, node: Node) -> str:
        """Return the part of a replaced value to keep: a block scalar's header comment, and the final line break."""
        comment = self._spans.match_header(node)["comment"] if node.style in ("|", ">") else ""
        return (comment or "") + (self._newline if self._text[self._spans.find_end(node) - 1] in "\r\n" else "")

    def _insert_lines(self, index: int, lines: Iterable[str], column: int) -> None:
        self._splice(index, index, "".join(" " * column + line + self._newline for line in lines))

    def _splice(self, start: int, end: int, written: str = "") -> None:
        self._splices.append((start, end, written))

    def _find_entries(self, node: Node, children: list[Node]) -> dict[Node, tuple[Literal["key", "item"], int]]:
        """Return the kind and the column of each child."""
        kind: Literal["key", "item"] = "key" if isinstance(node.value, dict) else "item"
        starts = self._spans.find_starts(node, children)
        columns = [start - self._spans.find_line_start(start) for start in starts]
        return {child: (kind, column) for child, column in zip(children, columns, strict=True)}


def _dump_inline(data: Any) -> str:
    """Return a scalar or an empty collection as it is written after a key."""
    return dump_yaml({"": data}).split(" ", 1)[1].removesuffix("\n")
