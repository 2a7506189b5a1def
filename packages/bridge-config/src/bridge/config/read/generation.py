"""Generation settings of a document: checked against the model, and built as a GenerationConfig on first read."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from bridge.config.errors import ConfigError
from bridge.config.paths import format_path
from bridge.config.problems import ProblemList, ReadError
from bridge.config.read.build import build
from bridge.config.read.lookup import LiveLookup
from bridge.config.schema import registry
from bridge.config.schema.generation import FIELD, GenerationSettings, find_wrong_settings
from bridge.config.schema.names import GENERATION_CONFIG
from bridge.config.schema.target import Target
from bridge.config.schema.values import ParsedConfig
from bridge.config.write.encoded_defaults import encode_default


def build_generation_config(settings: GenerationSettings) -> object:
    """Return the GenerationConfig with these settings; the settings themselves where transformers is not available.

    Raises:
        ConfigError: transformers refuses the settings.
    """
    if not _is_installed():
        return settings
    try:
        target = LiveLookup().find_by_name(GENERATION_CONFIG)
        return build(ParsedConfig(target, dict(settings), composed=tuple(settings)))
    except ReadError as error:
        problems = "; ".join(f"{format_path((FIELD, *path))}: {message}" for path, message in error.problems)
        raise ConfigError(problems) from error.__cause__


def check_settings(data: dict[str, Any], target: Target) -> ProblemList:
    """Check the generation settings of a model against its vocabulary and sequence length."""
    if (settings := data.get(FIELD)) is None:
        return []
    sizes = {
        name: data.get(name, encode_default(target, name)) if name in target.fields else None
        for name in ("vocab_size", "seq_length")
    }
    return [((FIELD, name), message) for name, message in find_wrong_settings(settings, **sizes)]


def _is_installed() -> bool:
    if not (registry.is_registered(GENERATION_CONFIG) or GENERATION_CONFIG in registry.get_declarations()):
        return False
    try:
        return find_spec(GENERATION_CONFIG.partition(".")[0]) is not None
    except (ImportError, ValueError):  # it is blocked or replaced in sys.modules
        return False
