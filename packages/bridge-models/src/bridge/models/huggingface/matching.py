"""Find the architecture of a config.json or a document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bridge.config.errors import DocumentError, Problem, did_you_mean, quote_name
from bridge.config.problems import describe_value
from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.architectures import get_architecture, list_model_types
from bridge.models.huggingface.document_fields import AFFECTS_COMPUTATION, find_non_defaults
from bridge.models.huggingface.families.unsupported import UNSUPPORTED
from bridge.models.huggingface.translation import Translation, run_steps

MODEL_TYPE = "hf_model_type"
"""Key of ``extra_checkpoint_metadata`` with the ``model_type`` of a document, if its fields do not imply it."""


def find_architecture(given: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a config.json.

    Raises:
        DocumentError: ``model_type`` is missing or not supported.
        ConfigError: As ``get_architecture``.
    """
    model_type = given.get("model_type")
    if (text_model := _find_text_model(given)) is not None and model_type not in (*list_model_types(), *UNSUPPORTED):
        raise make_error(
            "$.text_config",
            f"the language model, {text_model}, is in this field: save the field as a config.json of its own",
        )
    if not isinstance(model_type, str):
        missing = "missing: expected the config.json of a transformers model"
        raise make_error(
            "$.model_type", missing if model_type is None else f"expected a string, got {describe_value(model_type)}"
        )
    architecture = get_architecture(model_type)
    if architecture is None and model_type in UNSUPPORTED:
        raise DocumentError(_explain_unsupported(model_type, given))
    if architecture is None:
        near = did_you_mean(model_type, list_model_types())
        known = ", ".join(list_model_types())
        raise make_error("$.model_type", f"unknown architecture {quote_name(model_type)}{near}; supported are {known}")
    return architecture


def _find_text_model(given: Mapping[str, Any]) -> str | None:
    """Return the ``model_type`` of the language model inside a multimodal config.json; None if there is none."""
    inside = given.get("text_config")
    model_type = inside.get("model_type") if isinstance(inside, dict) else None
    return model_type if isinstance(model_type, str) else None


def _explain_unsupported(model_type: str, given: Mapping[str, Any]) -> list[Problem]:
    """Return problems that explain why this architecture and these fields are not supported."""
    reason, fields = UNSUPPORTED[model_type]
    problems = [Problem("$.model_type", f"megatron-core 0.19.2 does not support {model_type}: {reason}")]
    return problems + [Problem(f"$.{name}", why) for name, why in fields.items() if given.get(name) is not None]


def find_declared_architecture(fields: Mapping[str, Any]) -> Architecture | None:
    """Return the architecture that a document names in its metadata; None if it names none.

    Raises:
        DocumentError: The architecture is unknown, or has another config class.
        ConfigError: As ``get_architecture``.
    """
    metadata = fields.get("extra_checkpoint_metadata") or {}
    model_type = metadata.get(MODEL_TYPE)
    if model_type is None:
        return None
    path = f"$.extra_checkpoint_metadata.{MODEL_TYPE}"
    architecture = get_architecture(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        raise make_error(
            path, f"unknown architecture {describe_value(model_type)}; supported are {', '.join(list_model_types())}"
        )
    if architecture.target != fields["_target_"]:
        raise make_error(path, f"{model_type} needs the _target_ {architecture.target}, got {fields['_target_']}")
    return architecture


def write(fields: Mapping[str, Any], architecture: Architecture) -> Translation:
    """Write a document as the config.json of one architecture, collecting problems."""
    t = Translation(architecture.model_type, fields, {})
    if fields["transformer._target_"] not in architecture.transformers:
        t.refuse("transformer._target_", f"{architecture.model_type} needs {' or '.join(architecture.transformers)}")
        return t
    run_steps(t, (row.write for row in architecture.rows))
    for path in sorted(find_non_defaults(fields, AFFECTS_COMPUTATION - architecture.fields)):
        t.refuse(path, f"config.json of {architecture.model_type} has no field for it")
    return t


def find_closest(fields: Mapping[str, Any], architectures: Iterable[Architecture]) -> tuple[Architecture, Translation]:
    """Return the architecture that expresses a document with the fewest problems, and its config.json.

    Ties go to architectures that do not yield to another, then to the fewest rows, then to the first name.
    """
    written = [(one, write(fields, one)) for one in architectures]
    fewest = min(len(t.problems) for _, t in written)
    fitting = [(one, t) for one, t in written if len(t.problems) == fewest]
    names = {one.model_type for one, _ in fitting}
    return min(fitting, key=lambda pair: (bool(names & set(pair[0].yields_to)), len(pair[0].rows), pair[0].model_type))


def make_error(path: str, message: str) -> DocumentError:
    """Return an error with one problem."""
    return DocumentError([Problem(path, message)])
