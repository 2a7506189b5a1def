"""Norms: their kind, and what keeps them from dividing by zero."""

from __future__ import annotations

from bridge.models.huggingface.fields.row import Row, always, same
from bridge.models.huggingface.translation import NUMBER, Translation


def rms_norm(name: str, eps: float) -> tuple[Row, ...]:
    """Norms by root mean square."""
    return (
        always("transformer.normalization", "RMSNorm", "all norms of {model_type} are of one kind"),
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
            t.refuse(name, f"{norms} have {eps}, and Megatron-Core has one for all norms")

    def write(t: Translation) -> None:
        if t["transformer.layernorm_epsilon"] != eps:
            t.refuse("transformer.layernorm_epsilon", f"{norms} have {eps}: it can only be that")

    return (*rms_norm(name, eps), Row({}, ("transformer.layernorm_epsilon",), read, write))
