"""Convert the config.json of transformers to a document, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bridge.config.documents.document import Document
from bridge.config.errors import DocumentError, Problem
from bridge.config.problems import describe_value
from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.config_json import load_config_json
from bridge.models.huggingface.document_fields import make_document, read_fields
from bridge.models.huggingface.families import ARCHITECTURES
from bridge.models.huggingface.fusions import find_fusions
from bridge.models.huggingface.ignored import IGNORED, QUANTIZATION, refuse_unknown
from bridge.models.huggingface.matching import (
    MODEL_TYPE,
    find_architecture,
    find_closest,
    find_declared_architecture,
    make_error,
)
from bridge.models.huggingface.translation import MAX_LAYERS, Translation, run_steps


@dataclass(frozen=True)
class Converted:
    """A document or a config.json, with notes on the conversion for the user."""

    data: dict[str, Any]
    notes: list[str]


def read_folder(folder: str) -> Document:
    """Return the document of the model in a folder with a config.json, for `bridge.folders`.

    Raises:
        DocumentError: As ``from_hf``, with positions in config.json.
    """
    given = load_config_json(folder)
    with given.locate_problems():
        converted = from_hf(given.data)
    return Document(converted.data, folder, converted.notes)


def from_hf(given: Mapping[str, Any], *, model_id: str | None = None) -> Converted:
    """Return the document of the model that a config.json describes.

    Args:
        given: The content of config.json, as version 4 or 5 of transformers writes it.
        model_id: The model's name, in place of ``_name_or_path``.

    Raises:
        DocumentError: The architecture is unknown, or a document cannot express it exactly: all problems, with the
            paths of their fields in config.json.
        ConfigError: The entry point of an outside architecture is broken.
    """
    architecture = find_architecture(given)
    fields = _resolve_aliases(given, architecture)
    if model_id is not None:
        fields["_name_or_path"] = model_id
    t = Translation(architecture.model_type, fields, architecture.names)
    run_steps(t, (row.read for row in architecture.rows))
    known = {*architecture.names, *architecture.ignored, *IGNORED}
    for name in (name for name in fields if name not in known):
        if name == QUANTIZATION:
            t.note(f"$.{QUANTIZATION} is left out: it describes how the published weights are stored")
        else:
            refuse_unknown(t, name, architecture.names)
    _note_heads(t)
    _raise_problems(t)
    data = make_document(t.output, architecture)
    _check(data, fields, architecture)
    data["transformer"] |= find_fusions(read_fields(data))
    if data.get("seq_length", 0) > _LONG_SEQUENCE:
        t.note(
            f"seq_length is {data['seq_length']:,}, the maximum of the model: training and plans use sequences of this "
            "length unless you set it"
        )
    # A document that would be written as another architecture, or not at all, has to name its own.
    written_as, written = find_closest(read_fields(data), _find_by_class(architecture.target))
    if written_as is not architecture or written.problems:
        data["extra_checkpoint_metadata"] = {MODEL_TYPE: architecture.model_type}
        data["transformer"] = data.pop("transformer")  # keep the longest field last
    return Converted(data, t.notes)


def _note_heads(t: Translation) -> None:
    """Note the classes in ``architectures`` whose head is not that of a language model."""
    classes = t.given.get("architectures")
    for name in classes if isinstance(classes, list) else ():
        if isinstance(name, str) and (task := _OTHER_TASK.search(name)):
            labels = (
                f" with {describe_value(t.given['num_labels'])} labels" if t.given.get("num_labels") is not None else ""
            )
            t.note(
                f"$.architectures: {name} has a {task[1] or task[2]} head{labels} instead of the output layer: "
                "the head is left out, and the document describes the language model"
            )


_OTHER_TASK = re.compile(r"(?:For(\w*Classification|QuestionAnswering|MultipleChoice|RewardModel\w*)|(RewardModel))$")
_LONG_SEQUENCE = 16_384  # tokens; models are rarely pre-trained with longer sequences


def _resolve_aliases(given: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return the fields under their usual names.

    Raises:
        DocumentError: A field and its alias have different values.
    """
    fields: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        usual = architecture.aliases.get(name, name)
        # Types too, because 1 == True.
        if fields.setdefault(usual, value) != value or type(fields[usual]) is not type(value):
            problems.append(Problem(f"$.{name}", f"is an alias of {usual}, which has a different value"))
    if problems:
        raise DocumentError(problems)
    return fields


def _check(data: dict[str, Any], given: Mapping[str, Any], architecture: Architecture) -> None:
    """Check the document, reporting problems at the fields of config.json that they come from.

    Raises:
        DocumentError: The document is invalid.
    """
    try:
        Document(data).check()
    except DocumentError as error:
        raise DocumentError([_map_problem(problem, given, architecture) for problem in error.problems]) from error


def _map_problem(problem: Problem, given: Mapping[str, Any], architecture: Architecture) -> Problem:
    # In config.json, generation settings are at the top level.
    if problem.path.startswith(inside := "$.generation_config."):
        return Problem(problem.path.replace(inside, "$."), problem.message)
    path = problem.path.removeprefix("$.")
    sources = [name for row in architecture.rows if path in row.fields for name in row.names if name in given]
    if not sources:
        return problem
    return Problem(f"$.{sources[0]}", f"{path}: {problem.message}")


def _raise_problems(t: Translation) -> None:
    if t.problems:
        raise DocumentError(list(dict.fromkeys(t.problems)))  # several rows may report the same problem


def to_hf(data: Mapping[str, Any]) -> Converted:
    """Return the config.json of the model that a document describes, which versions 4 and 5 of transformers read.

    Args:
        data: The document.

    Raises:
        DocumentError: The document is invalid, or config.json cannot express it exactly: all problems, with the paths
            of their fields in the document.
        ConfigError: The entry point of an outside architecture is broken.
    """
    fields = read_fields(data)
    _check_sizes(fields)
    chosen = find_declared_architecture(fields)
    candidates = _find_by_class(fields["_target_"]) if chosen is None else [chosen]
    if not candidates:
        raise make_error("$._target_", f"transformers has no architecture for {fields['_target_']}")
    of_class = [one for one in candidates if fields["transformer._target_"] in one.transformers]
    architecture, t = find_closest(fields, of_class or candidates)
    if t.problems and chosen is None:
        which = f"no architecture can express this model; the closest is {architecture.model_type}"
        raise DocumentError([Problem("$", which), *dict.fromkeys(t.problems)])
    _raise_problems(t)
    heading = {"model_type": architecture.model_type, "architectures": [architecture.model_class]}
    return Converted(heading | t.output, t.notes)


def _find_by_class(target: str) -> list[Architecture]:
    """Return the shipped architectures whose documents have this config class.

    Only a document that names an outside architecture is written as one: what is installed changes no other document.
    """
    return [one for one in ARCHITECTURES.values() if one.target == target]


def _check_sizes(fields: Mapping[str, Any]) -> None:
    """Check the sizes that rows compute with.

    Raises:
        DocumentError: A size is out of range.
    """
    maxima = {"transformer.num_layers": MAX_LAYERS, "encoder_num_layers": MAX_LAYERS}
    sizes = ("transformer.hidden_size", "transformer.num_attention_heads", "transformer.kv_channels", *maxima)
    problems = []
    for path in sizes:
        size, maximum = fields.get(path), maxima.get(path)
        if size is not None and not 1 <= size <= (maximum or size):
            limits = "at least 1" if maximum is None else f"from 1 to {maximum:,}"
            problems.append(Problem(f"$.{path}", f"must be {limits}, got {describe_value(size)}"))
    if problems:
        raise DocumentError(problems)
