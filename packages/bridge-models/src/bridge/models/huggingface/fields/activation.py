"""Activation functions of feed-forward layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge.models.huggingface.fields.row import Row, always
from bridge.models.huggingface.translation import TEXT, Name, Translation, refuse_choice

_GELU = "torch.nn.functional.gelu"
_TANH_GELU: Mapping[str, Any] = {"_target_": _GELU, "_partial_": True, "approximate": "tanh"}
_ACTIVATIONS: Mapping[str, Any] = {
    "silu": "torch.nn.functional.silu",
    "swish": "torch.nn.functional.silu",
    "gelu": _GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "relu": "torch.nn.functional.relu",
    "relu2": "megatron.core.activations.squared_relu",
    "quick_gelu": "megatron.core.fusions.fused_bias_geglu.quick_gelu",
    "mish": "torch.nn.functional.mish",
}
"""Activation functions by their names in config.json, where the tanh approximation of GELU has three."""


def activation(name: str, default: str) -> Row:
    """Return the row of the activation function."""

    def read(t: Translation) -> None:
        read_function(t, name, t[name])

    def write(t: Translation) -> None:
        t[name] = get_function_name(t, default)

    return Row({name: Name(TEXT, default)}, ("transformer.activation_func",), read, write)


def read_function(t: Translation, name: str, function: str) -> None:
    """Set the activation function from its name in config.json.

    Raises:
        RefusedError: The name is unknown.
    """
    if function not in _ACTIVATIONS:
        raise refuse_choice(t, name, function, _ACTIVATIONS)
    t["transformer.activation_func"] = _ACTIVATIONS[function]


def get_function_name(t: Translation, usual: str) -> str:
    """Return the name in config.json of the document's activation function: ``usual`` if it is one of its names.

    Raises:
        RefusedError: transformers has no such function.
    """
    function = t["transformer.activation_func"]
    names = [known for known, own in _ACTIVATIONS.items() if own == function]
    if not names:
        what = function.get("_target_") if isinstance(function, dict) else function
        raise t.refuse("transformer.activation_func", f"transformers has no activation function {what}")
    return usual if usual in names else names[0]


GATED = always("transformer.gated_linear_unit", True, "{model_type} has gated feed-forward layers")
