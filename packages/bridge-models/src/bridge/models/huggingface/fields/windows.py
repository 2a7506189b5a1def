"""Sliding windows: their sizes, and the layers that have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bridge.config.problems import describe_value
from bridge.models.huggingface.fields.row import Row
from bridge.models.huggingface.translation import COUNT, FLAG, INTEGER, TEXTS, Name, Translation

SLIDING, FULL = "sliding_attention", "full_attention"
"""What ``layer_types`` calls a layer with a window, and one without."""

_FIELDS = ("transformer.window_size", "transformer.window_attn_skip_freq")


def window_everywhere(default: int | None) -> Row:
    """Return the row of ``sliding_window`` in all layers; null means no window.

    Args:
        default: The default of ``sliding_window`` in transformers.
    """

    def read(t: Translation) -> None:
        if (window := t["sliding_window"]) is not None:
            t["transformer.window_size"] = _to_window_size(window)

    def write(t: Translation) -> None:
        window = _write_window(t)
        if window is not None and not all(_list_sliding_layers(t)):
            raise t.refuse(
                "transformer.window_attn_skip_freq", f"{t.model_type} has windows in all layers: must be null"
            )
        t["sliding_window"] = window

    return Row({"sliding_window": Name(COUNT, default, null=True)}, _FIELDS, read, write)


def window_by_switch(*, everywhere: bool = False, alternating: bool = False) -> Row:
    """Return the row of ``sliding_window`` if ``use_sliding_window`` is on, in all layers or by ``layer_types``.

    Args:
        everywhere: All layers have windows, and there is no ``layer_types``.
        alternating: Without ``layer_types``, every other layer before ``max_window_layers`` has a window, not all
            layers from there on.
    """

    def slides_by_default(t: Translation, index: int) -> bool:
        limit: int = t["max_window_layers"]
        return index % 2 == 0 and index < limit if alternating else index >= limit

    def read(t: Translation) -> None:
        layers, window = t["num_hidden_layers"], t["sliding_window"]
        if not t["use_sliding_window"]:
            if not everywhere and SLIDING in (t["layer_types"] or ()):
                t.refuse("layer_types", "has sliding_attention, but use_sliding_window is false")
            return
        if window is None:
            return
        if window < 1:
            raise t.refuse("sliding_window", f"expected an integer >= 1, got {window}")
        if everywhere:
            t["transformer.window_size"] = _to_window_size(window)
            return
        _set_windows(t, window, _read_types(t, lambda index: slides_by_default(t, index), layers))

    def write(t: Translation) -> None:
        window = _write_window(t)
        slides = _list_sliding_layers(t)
        if window is None or not any(slides):
            t["use_sliding_window"] = False
            return
        t["use_sliding_window"] = True
        t["sliding_window"] = window
        if everywhere:
            if not all(slides):
                t.refuse("transformer.window_attn_skip_freq", f"{t.model_type} has windows in all layers: must be null")
            return
        # `layer_types` decides; this field agrees with it where it can.
        t["max_window_layers"] = slides.index(True) if slides == sorted(slides) and not alternating else len(slides)
        t["layer_types"] = _write_types(slides)

    names = {"use_sliding_window": Name(FLAG, False), "sliding_window": Name(INTEGER, 4096, null=True)}
    if not everywhere:
        names |= {"max_window_layers": Name(INTEGER, 28), "layer_types": Name(TEXTS)}
    return Row(names, _FIELDS, read, write)


def alternating_windows(default: int, slides: Callable[[int], bool]) -> Row:
    """Return the row of ``sliding_window`` with layers chosen by ``layer_types``.

    Args:
        default: The default of ``sliding_window`` in transformers.
        slides: Whether the layer with this index, from 0, has a window if ``layer_types`` is missing.
    """

    def read(t: Translation) -> None:
        window = t["sliding_window"]
        types = _read_types(t, slides, t["num_hidden_layers"])
        if window is None:
            if any(types):
                t.refuse("sliding_window", "missing: some layers have sliding attention")
            return
        _set_windows(t, window, types)

    def write(t: Translation) -> None:
        window = _write_window(t)
        t["sliding_window"] = window
        t["layer_types"] = _write_types(
            _list_sliding_layers(t) if window is not None else [False] * t["transformer.num_layers"]
        )

    return Row({"sliding_window": Name(COUNT, default, null=True), "layer_types": Name(TEXTS)}, _FIELDS, read, write)


def _read_types(t: Translation, slides_by_default: Callable[[int], bool], layers: int) -> list[bool]:
    types = t["layer_types"]
    if types is None:
        return [slides_by_default(index) for index in range(layers)]
    wrong = [(index, kind) for index, kind in enumerate(types) if kind not in (SLIDING, FULL)]
    for index, kind in wrong:
        t.refuse("layer_types", f"expected {SLIDING} or {FULL}, got {describe_value(kind)}", index)
    if len(types) != layers:
        raise t.refuse("layer_types", f"has {len(types)} entries, but num_hidden_layers is {layers}")
    return [kind == SLIDING for kind in types]


def _to_window_size(tokens: int) -> list[int]:
    """Return ``window_size``: Megatron-Core does not count the current token, transformers does."""
    return [tokens - 1, 0]


def _set_windows(t: Translation, window: int, slides: list[bool]) -> None:
    if not any(slides):
        return
    t["transformer.window_size"] = _to_window_size(window)
    if not all(slides):
        t["transformer.window_attn_skip_freq"] = _encode_layers(slides)


def _encode_layers(slides: list[bool]) -> int | list[int]:
    """Return ``window_attn_skip_freq``: N if exactly every N-th layer has no window, else 1 or 0 for each layer."""
    every = slides.index(False) + 1
    if every > 1 and slides == [bool((index + 1) % every) for index in range(len(slides))]:
        return every
    return [int(one) for one in slides]


def _list_sliding_layers(t: Translation) -> list[bool]:
    """Return for each layer of a document whether it has a window, given that window_size is set."""
    layers: int = t["transformer.num_layers"]
    frequency: Any = t["transformer.window_attn_skip_freq"]
    if frequency is None:
        return [True] * layers
    if isinstance(frequency, int):
        return [bool((index + 1) % frequency) for index in range(layers)]
    if len(frequency) != layers:
        raise t.refuse("transformer.window_attn_skip_freq", f"has {len(frequency)} entries, but num_layers is {layers}")
    return [bool(one) for one in frequency]


def _write_types(slides: list[bool]) -> list[str]:
    return [SLIDING if one else FULL for one in slides]


def _write_window(t: Translation) -> int | None:
    size: Any = t["transformer.window_size"]
    if size is None or size[0] < 0:  # -1: unlimited
        return None
    before, after = size
    if after:
        raise t.refuse(
            "transformer.window_size", "windows of transformers end at the current token: the second number must be 0"
        )
    return int(before) + 1
