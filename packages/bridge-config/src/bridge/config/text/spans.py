"""Find the offsets of parts of a YAML text: lines, keys, colons, dashes, anchors, values and entries."""

from __future__ import annotations

import re

from bridge.config.text.nodes import Node

REST_OF_LINE = re.compile(r"[ \t]*(?:#[^\r\n]*)?(?=[\r\n])")
LINE_BREAK = re.compile(r"\r\n?|\n")
_GAP = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_ANCHOR = re.compile(r"&[^\s,\[\]{}]+")
_HEADER = re.compile(r"[|>](?P<how>[-+0-9]*)(?P<comment>[ \t]+#[^\r\n]*)?")


def list_children(node: Node) -> list[Node]:
    """Return the nodes in a collection, in order."""
    return list(node.value.values() if isinstance(node.value, dict) else node.value)


def is_block_collection(node: Node) -> bool:
    """Return whether a node is a block collection."""
    return not node.style and isinstance(node.value, (dict, list))


class Spans:
    """The spans of nodes in a text that ends with a line break."""

    def __init__(self, text: str) -> None:
        self._text = text

    def find_starts(self, node: Node, children: list[Node]) -> list[int]:
        """Return where the entries of a collection start: at the key, at the dash, or at the item of a flow list."""
        if isinstance(node.value, dict):
            return [self.find_key_start(child) for child in children]
        if node.style:
            return [child.start for child in children]
        # Nodes do not store the position of their dash: it is the next text after the previous item.
        before = [self.find_content(node), *(self.find_end(child) for child in children[:-1])]
        return [self.skip_gap(index) for index in before]

    def find_key_start(self, node: Node) -> int:
        """Return where a key starts, including the question mark of an explicit key."""
        assert node.key
        start = node.key[0]
        line = self.find_line_start(start)
        question = self._text[line:start].rstrip(" \t")
        # A question mark at the end of a word is not an indicator.
        is_explicit = question.endswith("?") and not question[-2:-1].strip(" \t,{")
        return line + len(question) - 1 if is_explicit else start

    def find_colon_end(self, node: Node) -> int:
        """Return the offset after the colon before `node`; after its key without a colon, its start without a key."""
        if node.key is None:
            return node.start
        index = self.skip_gap(node.key[1])
        return index + 1 if self._text.startswith(":", index) else node.key[1]

    def find_span(self, node: Node) -> tuple[int, int]:
        """Return where a value starts and ends. An empty value is directly after its colon."""
        if node.start == node.end and node.key:
            return (self.find_colon_end(node),) * 2
        return node.start, self.find_end(node)

    def find_end(self, node: Node) -> int:
        """Return where a value ends. Blank lines after a block scalar count only if it keeps them (`+`)."""
        if node.alias is None and is_block_collection(node):
            values = node.value
            return self.find_end(next(reversed(values.values())) if isinstance(values, dict) else values[-1])
        if node.style in ("|", ">"):
            keeps = "+" in self.match_header(node)["how"]
            return node.end if keeps else node.start + len(self._text[node.start : node.end].rstrip())
        return self.find_span(node)[1] if node.start == node.end and node.key else node.end

    def find_content(self, node: Node) -> int:
        """Return where a value starts, after its anchor."""
        return self.skip_gap(self.find_anchor_end(node, node.start)) if node.anchored else node.start

    def find_anchor_end(self, node: Node, otherwise: int) -> int:
        """Return where the anchor of a value ends, or `otherwise` without an anchor."""
        found = _ANCHOR.match(self._text, node.start) if node.anchored else None
        return found.end() if found else otherwise

    def skip_gap(self, index: int) -> int:
        """Return the next offset outside whitespace and comments."""
        gap = _GAP.match(self._text, index)
        assert gap
        return gap.end()

    def find_line_start(self, index: int) -> int:
        """Return where the line of `index` starts."""
        start = self._text.rfind("\n", 0, index) + 1
        return max(start, self._text.rfind("\r", start, index) + 1)

    def find_next_line(self, index: int) -> int:
        """Return where the line after the line of `index` starts."""
        found = LINE_BREAK.search(self._text, max(index, 0))
        return found.end() if found else len(self._text)

    def find_line_after(self, node: Node) -> int:
        """Return where the first line after `node` starts."""
        end = self.find_end(node)
        return end if self._text[end - 1] in "\r\n" else self.find_next_line(end)

    def find_comma(self, end: int) -> int | None:
        """Return the offset of the comma after the item that ends at `end`, or None."""
        index = self.skip_gap(end)
        return index if self._text.startswith(",", index) else None

    def match_header(self, node: Node) -> re.Match[str]:
        """Return the match of a block scalar's first line."""
        header = _HEADER.match(self._text, self.find_content(node))
        assert header
        return header
