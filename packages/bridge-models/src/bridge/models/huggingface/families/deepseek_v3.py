"""DeepSeek-V3: multi-latent attention, experts in groups with sigmoid scores, multi-token prediction."""

from __future__ import annotations

from functools import partial

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.decoder import latent_decoder
from bridge.models.huggingface.fields.experts import dense_first_layers, expert_width, experts, shared_experts
from bridge.models.huggingface.fields.latent_attention import latent_attention
from bridge.models.huggingface.fields.routers import load_balancing, sigmoid_router, weight_scale
from bridge.models.huggingface.fields.row import Row, only
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.targets import GPT, LATENT_TRANSFORMER
from bridge.models.huggingface.translation import FLAG, INTEGER, TEXT, Name, Translation
from bridge.models.huggingface.weights.attention import latent_attention as latent_attention_weights
from bridge.models.huggingface.weights.decoder import decoder as decoder_weights


def _read_predictions(t: Translation) -> None:
    if t["num_nextn_predict_layers"]:
        t["transformer.mtp_num_layers"] = t["num_nextn_predict_layers"]


def _write_predictions(t: Translation) -> None:
    t["num_nextn_predict_layers"] = t["transformer.mtp_num_layers"] or 0


_PREDICTIONS = Row(
    {"num_nextn_predict_layers": Name(INTEGER, 1)},
    ("transformer.mtp_num_layers",),
    _read_predictions,
    _write_predictions,
)
DEEPSEEK_V3 = Architecture(
    model_type="deepseek_v3",
    model_class="DeepseekV3ForCausalLM",
    target=GPT,
    transformers=(LATENT_TRANSFORMER,),
    rows=latent_decoder(
        sizes(
            vocab_size=129280,
            max_position_embeddings=4096,
            num_hidden_layers=61,
            hidden_size=7168,
            intermediate_size=18432,
            num_attention_heads=128,
        ),
        attention=(
            *latent_attention(128),
            only("rope_interleave", True, FLAG, "Megatron-Core rotates pairs of adjacent channels"),
        ),
        experts=(
            *experts("n_routed_experts", 256, 8),
            expert_width("moe_intermediate_size", 2048),
            shared_experts(1),
            dense_first_layers(3),
            *sigmoid_router(8, 4),
            only("scoring_func", "sigmoid", TEXT, "routers of {model_type} use sigmoid scores"),
            only("topk_method", "noaux_tc", TEXT, "{model_type} selects experts with a router bias"),
            weight_scale(2.5),
            load_balancing("aux_loss_alpha", None, "seq_aux_loss"),
            only("seq_aux", True, FLAG, "the load-balancing loss is computed per sequence"),
            _PREDICTIONS,
        ),
    ),
    weights=partial(decoder_weights, attention=latent_attention_weights),
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    ignored=frozenset(("ep_size", "pretraining_tp")),
)
