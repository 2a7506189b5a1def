"""Build a tree from the events of PyYAML's parser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from bridge.config.errors import shorten
from bridge.config.text.limits import MAX_DEPTH
from bridge.config.text.nodes import Node
from bridge.config.text.scalars import read_plain
from bridge.config.text.tree import TreeBuilder

# Checked here, since libyaml 0.2.5 reports byte offsets and raises UnicodeEncodeError for surrogates.
_UNPRINTABLE = re.compile("[^\t\n\r -~\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def read_yaml(builder: TreeBuilder) -> None:
    """Read the YAML text of `builder`.

    Raises:
        DocumentError: the text is not YAML 1.2, has duplicate keys, tags or merge keys, or exceeds a limit.
    """
    if wrong := _UNPRINTABLE.search(builder.text):
        code = f"U+{ord(wrong[0]):04X}"
        builder.fail(f"the character {code} is not allowed in YAML: escape it in double quotes", wrong.start())
    try:
        _build_yaml(builder, _parse_events(builder.text))
    except yaml.MarkedYAMLError as error:
        reason = " ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        is_deep = error.problem == "exceeded maximum nesting depth"  # libyaml 0.2.6 reads ahead to depth 1000
        message = f"nested more than {MAX_DEPTH} deep" if is_deep else f"not YAML: {reason}"
        builder.fail(message, mark.index if mark else None)
    except yaml.YAMLError as error:
        builder.fail(f"not YAML: {error}", None)
    builder.finish()


def _parse_events(text: str) -> Iterator[Any]:
    # The base loader resolves no types: `read_plain` does, by YAML 1.2 instead of PyYAML's 1.1.
    events: Iterator[Any] = yaml.parse(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    return events


def _build_yaml(builder: TreeBuilder, events: Iterator[Any]) -> None:
    """Add the values of all events to the tree."""
    for event in events:
        start, end = event.start_mark.index, event.end_mark.index
        if isinstance(event, yaml.ScalarEvent):
            node = Node(start, end, style=event.style or "")
            _check_tag(builder, event)
            builder.add_anchor(node, event.anchor)
            builder.add_scalar(node, event.value, str if node.style else read_plain)
        elif isinstance(event, yaml.CollectionStartEvent):
            value: Any = [] if isinstance(event, yaml.SequenceStartEvent) else {}
            node = Node(start, end, value, "{" if event.flow_style else "")
            _check_tag(builder, event)
            builder.open_collection(node)
            builder.add_anchor(node, event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            builder.close_collection(end)
        elif isinstance(event, yaml.AliasEvent):
            builder.add_alias(Node(start, end), str(event.anchor))
        elif isinstance(event, yaml.DocumentStartEvent):
            if builder.root:
                builder.fail("expected a single YAML document, but another document begins here", start)
            if event.version and event.version != (1, 2):
                version = ".".join(map(str, event.version))
                builder.add_problem(f"documents are read as YAML 1.2, not {version}: remove this line", start)


def _check_tag(builder: TreeBuilder, event: Any) -> None:
    """Refuse tags: plain data does not need them, and other tags construct objects."""
    if event.tag is not None:
        tag = shorten(event.tag.replace("tag:yaml.org,2002:", "!!"))
        builder.add_problem(f"the tag {tag} is not allowed: write plain data", event.start_mark.index)
