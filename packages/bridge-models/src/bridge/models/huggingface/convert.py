"""From the config.json of transformers to a document, and back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from bridge.config.canonical import canonical
from bridge.config.document import STANDARD_INPUT, Document, nearest_source, read_file
from bridge.config.errors import DocumentError, Problem, nearest, quoted
from bridge.config.files import parse_json
from bridge.config.refusal import got
from bridge.config.tables import shipped
from bridge.models.huggingface import dense, experts, latent, mamba, t5
from bridge.models.huggingface.common import GENERATION
from bridge.models.huggingface.document_fields import AFFECTS_COMPUTATION
from bridge.models.huggingface.fields import IGNORED, SHOWN, STORAGE
from bridge.models.huggingface.mapping import (
    MAX_LAYERS,
    TRANSFORMER,
    Architecture,
    Translation,
    refuse_unknown,
    translated,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    one.model_type: one
    for one in (
        dense.GPT2,
        dense.LLAMA,
        dense.MISTRAL,
        dense.QWEN2,
        dense.QWEN3,
        dense.PHI3,
        dense.GEMMA,
        experts.MIXTRAL,
        experts.QWEN2_MOE,
        experts.QWEN3_MOE,
        experts.GPT_OSS,
        latent.DEEPSEEK_V2,
        latent.DEEPSEEK_V3,
        mamba.MAMBA2,
        mamba.NEMOTRON_H,
        t5.T5_MODEL,
    )
}
"""By ``model_type``. A document that several can say is written as the first of them, unless it says which."""

_MORE_NORMS = "it also normalises what attention and feed-forward layers give, which there are no layers for"
_CAPS = {
    "attn_logit_softcapping": "Megatron-Core does not cap scores of attention",
    "final_logit_softcapping": "Megatron-Core does not cap logits",
}
_TWO_BASES = {"rope_local_base_freq": "Megatron-Core has one base of rotary positions for all layers"}
BEYOND: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "gemma2": (_MORE_NORMS, _CAPS),
    "gemma3_text": (_MORE_NORMS, _CAPS | _TWO_BASES),
    "gemma3": (_MORE_NORMS, {"vision_config": "Bridge has no models of pictures"}),
}
"""What is known, by ``model_type``, and why there is no document of it; and fields that have no place in one either."""

MODEL_TYPE = "hf_model_type"
"""The key of ``extra_checkpoint_metadata`` where a document says its ``model_type``, if its fields do not."""


@dataclass(frozen=True)
class Converted:
    """A document or a config.json, and what the user should know about how it came to be."""

    data: dict[str, Any]
    notes: list[str]


def load_config_json(source: str) -> Document:
    """The content of a config.json, of that in a folder, or of standard input, with the memory of where values stand.

    Python writes infinity as ``Infinity``, which JSON has not: it becomes ``{"__float__": "Infinity"}``, as version 5
    of transformers writes it.

    Raises:
        DocumentError: It cannot be read, or is no JSON object.
    """
    file = Path(source)
    if file.is_dir():
        file /= "config.json"
    name = str(file)
    if source != STANDARD_INPUT and not os.path.exists(file):
        raise _refused("$", f"no such file, nor a folder with a config.json{nearest_source(name)}", name)
    text = read_file(name)
    parsed = parse_json(_without_infinity(text), name)
    if not isinstance(parsed.data, dict):
        raise _refused("$", f"expected a mapping at the top, got {got(parsed.data)}", name)
    return Document(parsed.data, name, parsed)


_TEXT_OR_INFINITY = re.compile(
    r'"(?:[^"\\]|\\.)*+"?|-?Infinity\b', re.DOTALL
)  # text without an end is not looked at twice


def _without_infinity(text: str) -> str:
    def replaced(match: re.Match[str]) -> str:
        found = match[0]
        return found if found.startswith('"') else f'{{"__float__": "{found}"}}'

    return _TEXT_OR_INFINITY.sub(replaced, text)


def from_hf(given: Mapping[str, Any], *, model_id: str | None = None) -> Converted:
    """The document of the model that a config.json describes.

    Args:
        given: The content of config.json, as version 4 or 5 of transformers writes it.
        model_id: The model's name, in place of ``_name_or_path``.

    Raises:
        DocumentError: Bridge does not know the architecture, or the document cannot say all of it: every problem, with
            the path of its field in config.json.
    """
    architecture = _architecture(given)
    fields = _unaliased(given, architecture)
    if model_id is not None:
        fields["_name_or_path"] = model_id
    t = Translation(fields, architecture.names)
    translated(t, (row.read for row in architecture.rows))
    known = {*architecture.names, *architecture.ignored, *IGNORED}
    for name in (name for name in fields if name not in known):
        if name == STORAGE:
            t.note(f"$.{STORAGE} is left out: it is about how published weights are stored")
        else:
            refuse_unknown(t, name, architecture.names)
    _note_heads(t)
    _raise_any(t)
    data = _document(t.made, architecture)
    _check(data, fields, architecture)
    if data.get("seq_length", 0) > _LONG:
        t.note(
            f"seq_length is {data['seq_length']:,}, the longest that the model was made for: training and plans take "
            "sequences of this length unless you set it"
        )
    if _best(data) is not architecture:
        data["extra_checkpoint_metadata"] = {MODEL_TYPE: architecture.model_type}
        data["transformer"] = data.pop("transformer")  # the long one stays the last
    return Converted(data, t.notes)


def _note_heads(t: Translation) -> None:
    """Say which classes of transformers have another head than that of a language model."""
    classes = t.given.get("architectures")
    for name in classes if isinstance(classes, list) else ():
        if isinstance(name, str) and (task := _OTHER_TASK.search(name)):
            labels = f", of {got(t.given['num_labels'])} labels," if t.given.get("num_labels") is not None else ""
            t.note(
                f"$.architectures: {name} has a head for {task[1] or task[2]}{labels} in place of the output layer: "
                "the document describes the language model, and the head is left out"
            )


_OTHER_TASK = re.compile(r"(?:For(\w*Classification|QuestionAnswering|MultipleChoice|RewardModel\w*)|(RewardModel))$")
_LONG = 16_384


def _architecture(given: Mapping[str, Any]) -> Architecture:
    model_type = given.get("model_type")
    if (inside := _text_model(given)) is not None and model_type not in (*ARCHITECTURES, *BEYOND):
        raise _refused(
            "$.text_config", f"the language model is in here, a {inside}: save this part as a file of its own"
        )
    if not isinstance(model_type, str):
        missing = "missing: is this the config.json of a model?"
        raise _refused("$.model_type", missing if model_type is None else f"expected text, got {got(model_type)}")
    if model_type in BEYOND:
        raise DocumentError(_beyond(model_type, given))
    found = ARCHITECTURES.get(model_type)
    if found is None:
        near = nearest(model_type, ARCHITECTURES)
        known = ", ".join(ARCHITECTURES)
        raise _refused("$.model_type", f"{quoted(model_type)} is not known to Bridge{near}; known are {known}")
    return found


def _text_model(given: Mapping[str, Any]) -> str | None:
    """The ``model_type`` of the language model inside a model of several parts; None if there is none."""
    inside = given.get("text_config")
    model_type = inside.get("model_type") if isinstance(inside, dict) else None
    return model_type if isinstance(model_type, str) else None


def _beyond(model_type: str, given: Mapping[str, Any]) -> list[Problem]:
    """Why there are no documents of an architecture, and what else in this one has no place in one."""
    reason, fields = BEYOND[model_type]
    problems = [Problem("$.model_type", f"megatron-core 0.19.2 cannot say {model_type}: {reason}")]
    return problems + [Problem(f"$.{name}", why) for name, why in fields.items() if given.get(name) is not None]


def _refused(path: str, message: str, file: str | None = None) -> DocumentError:
    return DocumentError([Problem(path, message, file)])


def _unaliased(given: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The fields by their usual names.

    Raises:
        DocumentError: Two names of one field have different values.
    """
    fields: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        usual = architecture.aliases.get(name, name)
        if fields.setdefault(usual, value) != value or type(fields[usual]) is not type(value):
            problems.append(Problem(f"$.{name}", f"is another name of {usual}, which has another value"))
    if problems:
        raise DocumentError(problems)
    return fields


def _check(data: dict[str, Any], given: Mapping[str, Any], architecture: Architecture) -> None:
    """Check the document; what is wrong with a field is wrong with that of config.json which it comes from.

    Raises:
        DocumentError: There is something wrong.
    """
    try:
        Document(data).check()
    except DocumentError as error:
        raise DocumentError([_of_config_json(problem, given, architecture) for problem in error.problems]) from error


def _of_config_json(problem: Problem, given: Mapping[str, Any], architecture: Architecture) -> Problem:
    if problem.path.startswith(inside := "$.generation_config."):
        return Problem(problem.path.replace(inside, "$."), problem.message)
    path = problem.path.removeprefix("$.")
    sources = [name for row in architecture.rows if path in row.fields for name in row.names if name in given]
    if not sources:
        return problem
    return Problem(f"$.{sources[0]}", f"{path}: {problem.message}")


def _raise_any(t: Translation) -> None:
    if t.problems:
        raise DocumentError(list(dict.fromkeys(t.problems)))


def _document(made: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The fields as a document, without those that have our default and are no news to a reader."""
    target = shipped(architecture.target)
    inner = made.get("transformer._target_", TRANSFORMER)
    transformer = shipped(inner)
    assert target
    assert transformer
    top: dict[str, Any] = {"_target_": architecture.target}
    inside: dict[str, Any] = {} if inner == TRANSFORMER else {"_target_": inner}
    for path, value in made.items():
        outer, dot, name = path.partition(".")
        if name == "_target_":
            continue
        known = (transformer.fields[name] if dot else target.fields[outer]).default
        is_default = known is not MISSING and known == value and type(known) is type(value)
        if is_default and path not in SHOWN:
            continue
        (inside if dot else top)[name or outer] = value
    return top | {"transformer": inside}


def to_hf(data: Mapping[str, Any]) -> Converted:
    """The config.json of the model that a document describes, with fields as both version 4 and 5 read them.

    Args:
        data: The document.

    Raises:
        DocumentError: The document describes no configuration, or config.json cannot say all of it: every problem, with
            the path of its field in the document.
    """
    fields = _fields(data)
    _check_sizes(fields)
    candidates = [one for one in ARCHITECTURES.values() if one.target == fields["_target_"]]
    if (chosen := _chosen(fields)) is not None:
        candidates = [chosen]
    if not candidates:
        raise _refused("$._target_", f"transformers has no model of the class {fields['_target_']}")
    of_class = [one for one in candidates if fields["transformer._target_"] in one.transformers]
    written = [(one, _written(fields, one)) for one in of_class or candidates]
    architecture, t = min(written, key=lambda pair: len(pair[1].problems))
    if t.problems and chosen is None:
        which = f"no architecture is the same model; the nearest is {architecture.model_type}"
        raise DocumentError([Problem("$", which), *dict.fromkeys(t.problems)])
    _raise_any(t)
    heading = {"model_type": architecture.model_type, "architectures": [architecture.causal]}
    return Converted(heading | t.made, t.notes)


def _check_sizes(fields: Mapping[str, Any]) -> None:
    """Check the sizes that others are computed from.

    Raises:
        DocumentError: One is of no model.
    """
    most = {"transformer.num_layers": MAX_LAYERS, "encoder_num_layers": MAX_LAYERS}
    sizes = ("transformer.hidden_size", "transformer.num_attention_heads", "transformer.kv_channels", *most)
    wrong = {
        path: size for path in sizes if (size := fields.get(path)) is not None and not 1 <= size <= most.get(path, size)
    }
    if wrong:
        raise DocumentError([Problem(f"$.{path}", f"no model has {got(size)}") for path, size in wrong.items()])


def _fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a document by dotted path, with defaults; settings of generation as they are."""
    whole = canonical(data, defaults=True)
    transformer = whole.pop("transformer")
    generation = canonical(data).get("generation_config")
    is_theirs = isinstance(generation, dict) and generation.get("_target_") == GENERATION
    whole["generation_config"] = generation if is_theirs else None
    return whole | {f"transformer.{name}": value for name, value in transformer.items()}


def _chosen(fields: Mapping[str, Any]) -> Architecture | None:
    """The architecture that a document says it is.

    Raises:
        DocumentError: There is no such one.
    """
    metadata = fields.get("extra_checkpoint_metadata") or {}
    model_type = metadata.get(MODEL_TYPE)
    if model_type is None:
        return None
    path = f"$.extra_checkpoint_metadata.{MODEL_TYPE}"
    found = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise _refused(path, f"{got(model_type)} is not known; known are {', '.join(ARCHITECTURES)}")
    if found.target != fields["_target_"]:
        raise _refused(path, f"{model_type} is a {found.target}, which this document is not")
    return found


def _written(fields: Mapping[str, Any], architecture: Architecture) -> Translation:
    t = Translation(fields, {})
    if fields["transformer._target_"] not in architecture.transformers:
        t.refuse("transformer._target_", f"{architecture.model_type} is a {' or a '.join(architecture.transformers)}")
        return t
    translated(t, (row.write for row in architecture.rows))
    for path in sorted(_not_default(fields, SHAPING - architecture.fields)):
        t.refuse(path, f"config.json of {architecture.model_type} has no field for it")
    return t


def _not_default(fields: Mapping[str, Any], paths: Iterable[str]) -> Iterable[str]:
    target = shipped(str(fields["_target_"]))
    transformer = shipped(str(fields["transformer._target_"]))
    assert target
    assert transformer
    for path in paths:
        outer, dot, name = path.partition(".")
        known = (transformer if dot else target).fields.get(name or outer)
        if known is not None and path in fields and fields[path] != known.default:
            yield path


def _best(data: Mapping[str, Any]) -> Architecture | None:
    """The architecture that a document is written as if it does not say which."""
    fields = _fields(data)
    fitting = (one for one in ARCHITECTURES.values() if one.target == data["_target_"])
    return next((one for one in fitting if not _written(fields, one).problems), None)
