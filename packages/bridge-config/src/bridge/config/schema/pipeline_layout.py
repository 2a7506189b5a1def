"""The layers of each pipeline stage, as ``pipeline_model_parallel_layout`` writes them: ``Et|(tt|)*29,m|L``."""

from __future__ import annotations

import re

_LAYERS = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}
_REPEATED = (re.compile(r"\(([^()]*)\)\*(\d{1,6})"), re.compile(r"([^()*])\*(\d{1,6})"))
_LONGEST = 100_000


def parse_stages(layout: object) -> list[list[str]] | None:
    """Return the names of the layers of each stage, in the order of the pipeline; None for what is no such layout.

    Args:
        layout: The text, or a list of lists of names.
    """
    if isinstance(layout, list):
        named = all(isinstance(stage, list) and all(isinstance(layer, str) for layer in stage) for stage in layout)
        return [[layer.strip().lower() for layer in stage] for stage in layout] if named else None
    if not isinstance(layout, str):
        return None
    text = layout.replace(",", "")
    for pattern in _REPEATED:
        if sum(len(part) * int(times) for part, times in pattern.findall(text)) > _LONGEST:
            return None
        text = pattern.sub(lambda found: found[1] * int(found[2]), text)
    if not set(text) <= {*_LAYERS, "|"}:
        return None
    return [[_LAYERS[layer] for layer in stage] for stage in text.split("|")]
