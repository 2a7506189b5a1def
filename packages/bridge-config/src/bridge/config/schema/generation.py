"""Generation settings: kept as data until first read, since importing transformers takes seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bridge.config.problems import describe_value
from bridge.config.schema.names import GENERATION_CONFIG

FIELD = "generation_config"
"""The field of every ModelConfig that holds generation settings."""

KEEPS_DATA = "keeps_generation_data"
"""The attribute that marks a descriptor of this field which makes the object when it is read, and keeps data until
then."""

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
    """The settings that a document gives, by name: what `ModelConfig.generation_config` is without transformers."""

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
    """Whether a config of the class `cls` keeps the written settings `value` as data until they are read."""
    return (
        isinstance(value, dict)
        and value.get("_target_") == GENERATION_CONFIG
        and any(getattr(vars(base)[FIELD], KEEPS_DATA, False) for base in _find_owner(cls))
    )


def wrong_settings(settings: object, *, vocab_size: object, seq_length: object) -> Iterator[tuple[str, str]]:
    """What is wrong with the generation settings of a model, by the name of the setting.

    Args:
        settings: settings as data, or a GenerationConfig, whose defaults do not count (max_length was 20 once).
        vocab_size: number of tokens; anything but an integer if unknown.
        seq_length: longest sequence in tokens, likewise.
    """
    said = getattr(settings, "to_diff_dict", dict)
    given = settings if isinstance(settings, Mapping) else said()
    for name in _TOKENS:
        beyond = [token for token in _find_integers(given.get(name)) if _exceeds(token, vocab_size, by=1)]
        if beyond:
            yield (
                name,
                f"token ids must be less than vocab_size = {describe_value(vocab_size)}, "
                f"got {describe_value(max(beyond))}",
            )
    for name in _LENGTHS:
        if any(_exceeds(length, seq_length) for length in _find_integers(given.get(name))):
            length, limit = describe_value(given[name]), describe_value(seq_length)
            yield name, f"must be at most seq_length = {limit}, got {length}"


def get_settings(config: object) -> object:
    """The generation settings of `config` as they are, without making an object of them."""
    return vars(config).get(FIELD)


def _find_owner(cls: object) -> list[type]:
    """The class among the bases of `cls` that has the last word about the field."""
    bases = cls.__mro__ if isinstance(cls, type) else ()
    return [base for base in bases if FIELD in vars(base)][:1]


def _find_integers(value: object) -> Iterator[int]:
    """The whole numbers in a value, at any depth of lists."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _find_integers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _exceeds(number: int, limit: object, by: int = 0) -> bool:
    return isinstance(limit, int) and not isinstance(limit, bool) and number + by > limit
