"""Generation settings: kept as data until first read, since importing transformers takes seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bridge.config.problems import describe_value
from bridge.config.schema.names import GENERATION_CONFIG

FIELD = "generation_config"
"""The field of every ModelConfig that holds generation settings."""

KEEPS_DATA = "keeps_generation_data"
"""Attribute that marks a descriptor of this field as lazy: it keeps data, and builds the object when read."""

_TOKENS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "force_words_ids",
)
_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")


class GenerationSettings(Mapping[str, Any]):
    """Generation settings of a document, by name: the value of `ModelConfig.generation_config` without transformers."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"GenerationSettings({self._values!r})"


def keeps_data(cls: object, value: object) -> bool:
    """Return whether a config of class `cls` keeps the encoded settings `value` as data until read."""
    return (
        isinstance(value, dict)
        and value.get("_target_") == GENERATION_CONFIG
        and any(getattr(vars(base)[FIELD], KEEPS_DATA, False) for base in _find_owner(cls))
    )


def find_wrong_settings(settings: object, *, vocab_size: object, seq_length: object) -> Iterator[tuple[str, str]]:
    """Yield the problems of a model's generation settings: the name of a setting and a message.

    Args:
        settings: a mapping, or a GenerationConfig, of which only changed values are checked, since older versions of
            transformers set max_length to 20 by default.
        vocab_size: number of tokens; ignored unless it is an integer.
        seq_length: maximum sequence length in tokens; ignored unless it is an integer.
    """
    get_changed = getattr(settings, "to_diff_dict", dict)
    given = settings if isinstance(settings, Mapping) else get_changed()
    for name in filter(given.__contains__, _TOKENS):
        beyond = [token for token in _find_integers(given[name]) if _exceeds(token, vocab_size, by=1)]
        if beyond:
            yield (
                name,
                f"token ids must be less than vocab_size = {describe_value(vocab_size)}, "
                f"got {describe_value(max(beyond))}",
            )
    for name in filter(given.__contains__, _LENGTHS):
        if any(_exceeds(length, seq_length) for length in _find_integers(given[name])):
            length, limit = describe_value(given[name]), describe_value(seq_length)
            yield name, f"must be at most seq_length = {limit}, got {length}"


def get_settings(config: object) -> object:
    """Return the stored generation settings of `config`, without building transformers' object."""
    return vars(config).get(FIELD)


def _find_owner(cls: object) -> list[type]:
    """Return the first class in the MRO of `cls` that defines the field, in a list; empty if there is none."""
    bases = cls.__mro__ if isinstance(cls, type) else ()
    return [base for base in bases if FIELD in vars(base)][:1]


def _find_integers(value: object) -> Iterator[int]:
    """Yield the integers in `value`, at any depth of lists and tuples."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _find_integers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _exceeds(number: int, limit: object, by: int = 0) -> bool:
    return isinstance(limit, int) and not isinstance(limit, bool) and number + by > limit
