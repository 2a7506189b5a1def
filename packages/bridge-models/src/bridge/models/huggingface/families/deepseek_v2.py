"""DeepSeek-V2: multi-latent attention, and experts in groups with softmax scores."""

from __future__ import annotations

from functools import partial

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.decoder import latent_decoder
from bridge.models.huggingface.fields.experts import dense_first_layers, expert_width, experts, shared_experts
from bridge.models.huggingface.fields.latent_attention import latent_attention
from bridge.models.huggingface.fields.routers import GREEDY_ROUTER, load_balancing, weight_scale
from bridge.models.huggingface.fields.row import always, only
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.targets import GPT, LATENT_TRANSFORMER
from bridge.models.huggingface.translation import FLAG, TEXT
from bridge.models.huggingface.weights.attention import latent_attention as latent_attention_weights
from bridge.models.huggingface.weights.decoder import decoder as decoder_weights

DEEPSEEK_V2 = Architecture(
    model_type="deepseek_v2",
    model_class="DeepseekV2ForCausalLM",
    target=GPT,
    transformers=(LATENT_TRANSFORMER,),
    rows=latent_decoder(
        sizes(
            vocab_size=102400,
            max_position_embeddings=2048,
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=11008,
            num_attention_heads=32,
        ),
        attention=latent_attention(None),
        experts=(
            *experts("n_routed_experts", 64, None),
            expert_width("moe_intermediate_size", 1407),
            shared_experts(2),
            dense_first_layers(0),
            always("transformer.moe_router_pre_softmax", True, "{model_type} does not normalise router weights"),
            only(
                "norm_topk_prob",
                False,
                FLAG,
                "transformers does not normalise router weights of {model_type}",
                also=(None,),
            ),
            only("scoring_func", "softmax", TEXT, "routers of {model_type} use softmax scores"),
            GREEDY_ROUTER,
            weight_scale(1.0),
            load_balancing("aux_loss_alpha", None, "seq_aux_loss"),
            only("seq_aux", True, FLAG, "the load-balancing loss is computed per sequence"),
            only("mlp_bias", False, FLAG, "{model_type} has no biases in linear layers"),
        ),
    ),
    weights=partial(decoder_weights, attention=latent_attention_weights),
    aliases={"num_experts": "n_routed_experts"},
    ignored=frozenset(("ep_size", "pretraining_tp")),
)
