"""Parser for ``pipeline_model_parallel_layout``, the layers of each pipeline stage: ``Et|(tt|)*29,m|L``."""

from __future__ import annotations

import re

_LAYERS = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}
_REPEATED = (re.compile(r"\(([^()]*)\)\*(\d{1,6})"), re.compile(r"([^()*])\*(\d{1,6})"))
# A document is untrusted, and nested repetition multiplies: bound what a short text can expand to.
_MAX_EXPANDED = 100_000


def parse_stages(layout: object) -> list[list[str]] | None:
    """Return the layer names of each (virtual) stage in pipeline order; None if `layout` is not a valid layout.

    Args:
        layout: A string, or a list with a list of layer names per stage.
    """
    if isinstance(layout, list):
        named = all(isinstance(stage, list) and all(isinstance(layer, str) for layer in stage) for stage in layout)
        return [[layer.strip().lower() for layer in stage] for stage in layout] if named else None
    if not isinstance(layout, str):
        return None
    text = layout.replace(",", "")
    for pattern in _REPEATED:
        if sum(len(part) * int(times) for part, times in pattern.findall(text)) > _MAX_EXPANDED:
            return None
        text = pattern.sub(lambda found: found[1] * int(found[2]), text)
    if not set(text) <= {*_LAYERS, "|"}:
        return None
    return [[_LAYERS[layer] for layer in stage] for stage in text.split("|")]
