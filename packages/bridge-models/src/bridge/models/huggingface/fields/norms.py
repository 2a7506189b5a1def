"""Norms: their kind, and what keeps them from dividing by zero."""

from __future__ import annotations

from bridge.models.huggingface.fields.row import Row, always, same
from bridge.models.huggingface.translation import NUMBER, Translation


def rms_norm(name: str, eps: float) -> tuple[Row, ...]:
    """Norms by root mean square."""
    return (
        always("transformer.normalization", "RMSNorm", "{model_type} uses RMSNorm"),
        same(name, "transformer.layernorm_epsilon", NUMBER, eps),
    )


def rms_norm_of(name: str, eps: float, norms: str) -> tuple[Row, ...]:
    """Norms by root mean square beside others whose epsilon is fixed; Megatron-Core has one for all norms.

    Args:
        name: The field of config.json with the epsilon.
        eps: What the others have.
        norms: Which ones these are.
    """

    def read(t: Translation) -> None:
        if t[name] != eps:
            t.refuse(name, f"{norms} use {eps}, and Megatron-Core has one epsilon for all norms: must be {eps}")

    def write(t: Translation) -> None:
        if t["transformer.layernorm_epsilon"] != eps:
            t.refuse("transformer.layernorm_epsilon", f"{norms} use {eps}: must be {eps}")

    return (*rms_norm(name, eps), Row({}, ("transformer.layernorm_epsilon",), read, write))
