"""The rows of Llama-like and DeepSeek-like decoders: a family states only what differs."""

from __future__ import annotations

from bridge.models.huggingface.fields.activation import GATED, activation
from bridge.models.huggingface.fields.attention import heads
from bridge.models.huggingface.fields.biases import NO_BIASES
from bridge.models.huggingface.fields.dropout import NO_HIDDEN_DROPOUT, attention_dropout
from bridge.models.huggingface.fields.language_model import language_model
from bridge.models.huggingface.fields.norms import rms_norm
from bridge.models.huggingface.fields.rope import rotary
from bridge.models.huggingface.fields.row import Row, only
from bridge.models.huggingface.translation import FLAG, INTEGER

Rows = tuple[Row, ...]

_ATTENTION = heads(None)
_POSITIONS = (rotary(),)
_NORMS = rms_norm("rms_norm_eps", 1e-6)
_BIASES = (NO_BIASES,)
_ACTIVATIONS = (activation("hidden_act", "silu"),)
_DROPOUT = (attention_dropout("attention_dropout", 0.0), NO_HIDDEN_DROPOUT)


def decoder(
    sizes: Rows,
    *,
    attention: Rows = _ATTENTION,
    positions: Rows = _POSITIONS,
    norms: Rows = _NORMS,
    biases: Rows = _BIASES,
    activations: Rows = _ACTIVATIONS,
    experts: Rows = (),
    dropout: Rows = _DROPOUT,
    tied: bool = False,
) -> Rows:
    """Return the rows of a Llama-like decoder; defaults are those of Llama without biases.

    Args:
        sizes: Sizes of the model.
        attention: Heads and windows.
        positions: Rotary positions.
        norms: Norms before layers, and the final norm.
        biases: Biases of linear layers.
        activations: Activation functions.
        experts: Experts and their routers.
        dropout: Dropout of attention and of residual branches.
        tied: The default of ``tie_word_embeddings`` in transformers.
    """
    return (
        *sizes,
        *attention,
        *positions,
        *norms,
        GATED,
        *biases,
        *activations,
        *experts,
        *dropout,
        *language_model(tied=tied),
    )


def latent_decoder(sizes: Rows, *, attention: Rows, experts: Rows) -> Rows:
    """Return the rows of a DeepSeek-like decoder: multi-latent attention, and first layers without experts.

    Args:
        sizes: Sizes of the model.
        attention: Latents, positions and norms.
        experts: Experts and their routers.
    """
    return (
        *sizes,
        *attention,
        *experts,
        GATED,
        NO_BIASES,
        only("attention_bias", False, FLAG, "Megatron-Core's multi-latent attention has no biases"),
        *_ACTIVATIONS,
        only("moe_layer_freq", 1, INTEGER, "every layer after first_k_dense_replace has experts"),
        *_DROPOUT,
        *language_model(tied=False),
    )
