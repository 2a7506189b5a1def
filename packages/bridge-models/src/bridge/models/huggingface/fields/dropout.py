"""Dropout."""

from __future__ import annotations

from bridge.models.huggingface.fields.row import Row, setting
from bridge.models.huggingface.translation import NUMBER, Name, Translation

NO_HIDDEN_DROPOUT = setting(
    "transformer.hidden_dropout",
    0.0,
    of_training="it only affects training, and config.json of {model_type} has no field for it",
)


def attention_dropout(name: str, default: float) -> Row:
    """Return the row of attention dropout; null means 0."""

    def read(t: Translation) -> None:
        t["transformer.attention_dropout"] = t[name] or 0.0

    def write(t: Translation) -> None:
        t[name] = t["transformer.attention_dropout"]

    return Row({name: Name(NUMBER, default, null=True)}, ("transformer.attention_dropout",), read, write)


def residual_dropout(residual: float, embedding: float) -> Row:
    """Return the row of residual dropout; Megatron-Core has one rate for embedding and layers."""

    def read(t: Translation) -> None:
        dropout = t["resid_pdrop"]
        if t["embd_pdrop"] != dropout:
            t.refuse(
                "embd_pdrop",
                f"Megatron-Core has one dropout for embedding and layers: must equal resid_pdrop, {dropout}",
            )
        t["transformer.hidden_dropout"] = dropout

    def write(t: Translation) -> None:
        t["resid_pdrop"] = t["embd_pdrop"] = t["transformer.hidden_dropout"]

    return Row(
        {"resid_pdrop": Name(NUMBER, residual), "embd_pdrop": Name(NUMBER, embedding)},
        ("transformer.hidden_dropout",),
        read,
        write,
    )
