"""Rows of every language model apart from its layers: origin, special tokens, dtype, output layer."""

from __future__ import annotations

from bridge.models.huggingface.fields.row import Row, always, only, same
from bridge.models.huggingface.targets import GENERATION
from bridge.models.huggingface.translation import ANYTHING, FLAG, NUMBER, TEXT, Name, Translation, refuse_choice

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id")
_DTYPES = {"float32": "torch.float32", "bfloat16": "torch.bfloat16", "float16": "torch.float16"}
_HALF = {"torch.bfloat16": "transformer.bf16", "torch.float16": "transformer.fp16"}


def _read_dtype(t: Translation) -> None:
    # Version 5 of transformers writes dtype, version 4 torch_dtype. Both read the latter, which is written below.
    name = "dtype" if t["dtype"] is not None else "torch_dtype"
    if t[name] is None:
        return
    dtype = t[name].removeprefix("torch.")
    if dtype not in _DTYPES:
        raise refuse_choice(t, name, dtype, _DTYPES)
    if half := _HALF.get(_DTYPES[dtype]):
        t[half] = True
    t["transformer.params_dtype"] = _DTYPES[dtype]


def _write_dtype(t: Translation) -> None:
    dtype = next((name for name, flag in _HALF.items() if t[flag]), t["transformer.params_dtype"])
    names = [known for known, own in _DTYPES.items() if own == dtype]
    if not names:
        raise t.refuse("transformer.params_dtype", f"expected one of {', '.join(_DTYPES.values())}, got {dtype}")
    t["torch_dtype"] = names[0]


DTYPE = Row(
    {"dtype": Name(TEXT), "torch_dtype": Name(TEXT)},
    ("transformer.params_dtype", "transformer.bf16", "transformer.fp16"),
    _read_dtype,
    _write_dtype,
)


def _read_tokens(t: Translation) -> None:
    tokens = {name: t[name] for name in TOKENS if name in t.given}
    for name, value in tokens.items():
        many = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if not all(one is None or type(one) is int for one in many):
            t.refuse(name, "expected a token ID")
    if tokens:
        t["generation_config"] = {"_target_": GENERATION} | tokens


def _write_tokens(t: Translation) -> None:
    settings = t["generation_config"] or {}
    for name in TOKENS:
        if name in settings:
            t[name] = settings[name]
    rest = [name for name in settings if name not in TOKENS and not name.startswith("_")]
    if rest:
        t.note(f"$.generation_config: {', '.join(rest)} left out: they belong in generation_config.json")


SPECIAL_TOKENS = Row(dict.fromkeys(TOKENS, Name(ANYTHING)), ("generation_config",), _read_tokens, _write_tokens)


def _read_origin(t: Translation) -> None:
    if name := t["_name_or_path"]:
        t["hf_model_id"] = name


def _write_origin(t: Translation) -> None:
    if name := t["hf_model_id"]:
        t["_name_or_path"] = name


ORIGIN = Row({"_name_or_path": Name(TEXT)}, ("hf_model_id",), _read_origin, _write_origin)


def language_model(*, tied: bool | None, std: float = 0.02) -> tuple[Row, ...]:
    """Return the rows of every language model, except sizes.

    Args:
        tied: The default of ``tie_word_embeddings`` in transformers; None if it never ties.
        std: The default of ``initializer_range`` in transformers.
    """
    never = "transformers never ties the output layer of {model_type} to the embedding"
    ties: tuple[Row, ...] = (
        only("tie_word_embeddings", False, FLAG, never),
        always("share_embeddings_and_output_weights", False, never),
    )
    if tied is not None:
        ties = (same("tie_word_embeddings", "share_embeddings_and_output_weights", FLAG, tied),)
    return (
        ORIGIN,
        SPECIAL_TOKENS,
        DTYPE,
        *ties,
        same("initializer_range", "transformer.init_method_std", NUMBER, std),
    )
