"""T5 1.0, whose output layer is tied to the embedding, and 1.1, which is untied and gated."""

from __future__ import annotations

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.activation import get_function_name, read_function
from bridge.models.huggingface.fields.biases import NO_BIASES
from bridge.models.huggingface.fields.language_model import DTYPE, ORIGIN, SPECIAL_TOKENS
from bridge.models.huggingface.fields.norms import rms_norm
from bridge.models.huggingface.fields.row import Row, always, only, same
from bridge.models.huggingface.fields.sizes import feed_forward
from bridge.models.huggingface.targets import T5 as T5_CONFIG
from bridge.models.huggingface.translation import COUNT, FLAG, LAYERS, NUMBER, TEXT, Name, Translation
from bridge.models.huggingface.weights.t5 import t5 as t5_weights

_GATED = "gated-"


def _read_layers(t: Translation) -> None:
    decoder, encoder = t["num_decoder_layers"], t["num_layers"]
    t["transformer.num_layers"] = encoder if decoder is None else decoder
    if decoder not in (None, encoder):
        t["encoder_num_layers"] = encoder


def _write_layers(t: Translation) -> None:
    decoder, encoder = t["transformer.num_layers"], t["encoder_num_layers"]
    t["num_layers"], t["num_decoder_layers"] = decoder if encoder is None else encoder, decoder


_LAYERS = Row(
    {"num_layers": Name(LAYERS, 6), "num_decoder_layers": Name(LAYERS)},
    ("transformer.num_layers", "encoder_num_layers"),
    _read_layers,
    _write_layers,
)


def _shared_size(path: str, of_decoder: str) -> Row:
    """Return the row of an encoder size that a document has separately, but config.json shares with the decoder."""

    def write(t: Translation) -> None:
        if t[path] not in (None, t[of_decoder]):
            t.refuse(
                path,
                f"{t.model_type} has the same size in encoder and decoder: must be null or {t[of_decoder]}",
            )

    return Row({}, (path,), lambda t: None, write)


def _read_dropout(t: Translation) -> None:
    dropout = t["dropout_rate"]
    t["transformer.hidden_dropout"] = t["transformer.attention_dropout"] = dropout
    if dropout:
        t.note(
            "$.dropout_rate is kept, except between the matrices of feed-forward layers, where Megatron-Core has none"
        )


def _write_dropout(t: Translation) -> None:
    dropout = t["transformer.hidden_dropout"]
    if t["transformer.attention_dropout"] != dropout:
        t.refuse(
            "transformer.attention_dropout",
            f"{t.model_type} has one dropout rate: must equal hidden_dropout, {dropout}",
        )
    t["dropout_rate"] = dropout


_DROPOUT = Row(
    {"dropout_rate": Name(NUMBER, 0.1)},
    ("transformer.hidden_dropout", "transformer.attention_dropout"),
    _read_dropout,
    _write_dropout,
)


def _read_feed_forward(t: Translation) -> None:
    projection: str = t["feed_forward_proj"]
    function = projection.removeprefix(_GATED)
    if projection == "gated-gelu":
        function = "gelu_new"
    t["transformer.gated_linear_unit"] = projection.startswith(_GATED)
    read_function(t, "feed_forward_proj", function)


def _write_feed_forward(t: Translation) -> None:
    gated, function = t["transformer.gated_linear_unit"], get_function_name(t, "gelu_new")
    if gated and function == "gelu":
        raise t.refuse("transformer.activation_func", f"gated GELU of {t.model_type} is the tanh approximation")
    if gated and function == "gelu_new":
        function = "gelu"
    t["feed_forward_proj"] = f"{_GATED if gated else ''}{function}"


_FEED_FORWARD = Row(
    {"feed_forward_proj": Name(TEXT, "relu")},
    ("transformer.gated_linear_unit", "transformer.activation_func"),
    _read_feed_forward,
    _write_feed_forward,
)


def _read_output(t: Translation) -> None:
    # Version 5 of transformers always saves tie_word_embeddings as true, and its real value as scale_decoder_outputs.
    tied = t["tie_word_embeddings"] and t["scale_decoder_outputs"] is not False
    t["share_embeddings_and_output_weights"] = tied
    if not tied:
        return
    size, tokens = t["d_model"], t["vocab_size"]
    t.note(f"$.tie_word_embeddings: Megatron-Core's tied output layer has a bias, {tokens:,} more parameters")
    t.note(
        f"$.tie_word_embeddings: transformers multiplies the input of a tied output layer by {size}^-0.5, "
        f"{size**-0.5:.6g}, Megatron-Core does not: load_weights multiplies the decoder's last norm by it instead"
    )


def _write_output(t: Translation) -> None:
    t["tie_word_embeddings"] = t["share_embeddings_and_output_weights"]


_OUTPUT = Row(
    {"tie_word_embeddings": Name(FLAG, True), "scale_decoder_outputs": Name(FLAG)},
    ("share_embeddings_and_output_weights",),
    _read_output,
    _write_output,
)


def _read_length(t: Translation) -> None:
    if (length := t["n_positions"]) is not None:
        t["seq_length"] = length


_LENGTH = Row({"n_positions": Name(COUNT)}, ("seq_length",), _read_length, lambda t: None)


def _write_channels(t: Translation) -> None:
    channels = t["transformer.kv_channels"]
    t["d_kv"] = t["transformer.hidden_size"] // t["transformer.num_attention_heads"] if channels is None else channels


def _read_channels(t: Translation) -> None:
    t["transformer.kv_channels"] = t["d_kv"]


T5 = Architecture(
    model_type="t5",
    model_class="T5ForConditionalGeneration",
    target=T5_CONFIG,
    rows=(
        same("vocab_size", "vocab_size", COUNT, 32128),
        _LENGTH,
        always("position_embedding_type", "relative", "{model_type} has relative positions"),
        same("relative_attention_num_buckets", "relative_attention_num_buckets", COUNT, 32),
        same("relative_attention_max_distance", "relative_attention_max_distance", COUNT, 128),
        _LAYERS,
        same("d_model", "transformer.hidden_size", COUNT, 512),
        feed_forward("d_ff", "transformer.ffn_hidden_size", COUNT, 2048),
        same("num_heads", "transformer.num_attention_heads", COUNT, 8),
        Row({"d_kv": Name(COUNT, 64)}, ("transformer.kv_channels",), _read_channels, _write_channels),
        _shared_size("encoder_ffn_hidden_size", "transformer.ffn_hidden_size"),
        _shared_size("encoder_num_attention_heads", "transformer.num_attention_heads"),
        _shared_size("encoder_kv_channels", "transformer.kv_channels"),
        always("transformer.softmax_scale", 1.0, "{model_type} does not scale attention scores"),
        *rms_norm("layer_norm_epsilon", 1e-6),
        NO_BIASES,
        _FEED_FORWARD,
        _DROPOUT,
        only("initializer_factor", 1.0, NUMBER, "Megatron-Core initialises weights differently"),
        only("is_encoder_decoder", True, FLAG, "Megatron-Core's T5 has an encoder and a decoder"),
        only("is_decoder", False, FLAG, "Megatron-Core's T5 has an encoder and a decoder"),
        _OUTPUT,
        ORIGIN,
        SPECIAL_TOKENS,
        DTYPE,
    ),
    weights=t5_weights,
    base="",
    unused_tensors=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    aliases={
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    },
    ignored=frozenset(("dense_act_fn", "is_gated_act")),
)
