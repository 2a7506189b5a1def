"""Sizes of the model: vocabulary, layers, hidden sizes, heads."""

from __future__ import annotations

from bridge.models.huggingface.fields.row import Row, same
from bridge.models.huggingface.translation import COUNT, LAYERS, Name, Translation


def sizes(**defaults: int | None) -> tuple[Row, ...]:
    """Return the rows of sizes that have the same names in most architectures.

    Args:
        defaults: The default of each in transformers.
    """
    fields = {
        "vocab_size": "vocab_size",
        "max_position_embeddings": "seq_length",
        "num_hidden_layers": "transformer.num_layers",
        "hidden_size": "transformer.hidden_size",
        "intermediate_size": "transformer.ffn_hidden_size",
        "num_attention_heads": "transformer.num_attention_heads",
    }
    return tuple(
        feed_forward(name, fields[name], COUNT, default)
        if name == "intermediate_size"
        else same(name, fields[name], LAYERS if name == "num_hidden_layers" else COUNT, default)
        for name, default in defaults.items()
    )


def feed_forward(name: str, path: str, kind: str, default: int | None, *, times: int = 4) -> Row:
    """Return the row of ffn_hidden_size, which defaults to ``times`` the hidden size in a document."""

    def read(t: Translation) -> None:
        if (width := t[name]) is not None:
            t[path] = width

    def write(t: Translation) -> None:
        width = t[path]
        if width is not None or default is not None:
            t[name] = times * t["transformer.hidden_size"] if width is None else width

    return Row({name: Name(kind, default)}, (path,), read, write)
