"""Norms: their kind and epsilon."""

from __future__ import annotations

from bridge.models.huggingface.fields.row import Row, always, same
from bridge.models.huggingface.translation import NUMBER, Translation


def rms_norm(name: str, eps: float) -> tuple[Row, ...]:
    """Return the rows of RMSNorm."""
    return (
        always("transformer.normalization", "RMSNorm", "{model_type} uses RMSNorm"),
        same(name, "transformer.layernorm_epsilon", NUMBER, eps),
    )


def rms_norm_of(name: str, eps: float, norms: str) -> tuple[Row, ...]:
    """Return the rows of RMSNorm where other norms have a fixed epsilon; Megatron-Core has one for all norms.

    Args:
        name: The field of config.json with the epsilon.
        eps: The epsilon of the other norms.
        norms: What messages call the other norms.
    """

    def read(t: Translation) -> None:
        if t[name] != eps:
            t.refuse(name, f"{norms} use {eps}, and Megatron-Core has one epsilon for all norms: must be {eps}")

    def write(t: Translation) -> None:
        if t["transformer.layernorm_epsilon"] != eps:
            t.refuse("transformer.layernorm_epsilon", f"{norms} use {eps}: must be {eps}")

    return (*rms_norm(name, eps), Row({}, ("transformer.layernorm_epsilon",), read, write))
