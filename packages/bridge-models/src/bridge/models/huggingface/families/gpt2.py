"""GPT-2: learned positions, layer norms, biases."""

from __future__ import annotations

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.activation import activation
from bridge.models.huggingface.fields.attention import SCORES
from bridge.models.huggingface.fields.biases import ALL_BIASES
from bridge.models.huggingface.fields.dropout import attention_dropout, residual_dropout
from bridge.models.huggingface.fields.language_model import language_model
from bridge.models.huggingface.fields.row import always, only, same
from bridge.models.huggingface.fields.sizes import feed_forward
from bridge.models.huggingface.targets import GPT
from bridge.models.huggingface.translation import COUNT, FLAG, LAYERS, NUMBER
from bridge.models.huggingface.weights.gpt2 import gpt2 as gpt2_weights

GPT2 = Architecture(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    target=GPT,
    rows=(
        same("vocab_size", "vocab_size", COUNT, 50257),
        same("n_positions", "seq_length", COUNT, 1024),
        same("n_layer", "transformer.num_layers", LAYERS, 12),
        same("n_embd", "transformer.hidden_size", COUNT, 768),
        same("n_head", "transformer.num_attention_heads", COUNT, 12),
        feed_forward("n_inner", "transformer.ffn_hidden_size", COUNT, None),
        always("position_embedding_type", "learned_absolute", "{model_type} has learned positions"),
        always("transformer.normalization", "LayerNorm", "{model_type} uses LayerNorm"),
        ALL_BIASES,
        same("layer_norm_epsilon", "transformer.layernorm_epsilon", NUMBER, 1e-5),
        activation("activation_function", "gelu_new"),
        residual_dropout(0.1, 0.1),
        attention_dropout("attn_pdrop", 0.1),
        SCORES,
        only("scale_attn_weights", True, FLAG, "Megatron-Core divides attention scores by sqrt(head_dim)"),
        only(
            "scale_attn_by_inverse_layer_idx", False, FLAG, "Megatron-Core scales attention scores alike in all layers"
        ),
        only("reorder_and_upcast_attn", False, FLAG, "Megatron-Core computes attention scores in a different order"),
        only("add_cross_attention", False, FLAG, "Megatron-Core's GPT has no cross attention"),
        *language_model(tied=True),
    ),
    weights=gpt2_weights,
    base="transformer.",
    unused_tensors=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    ignored=frozenset(
        (
            "n_ctx",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        )
    ),
)
