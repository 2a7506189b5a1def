"""The names of a folder's tensors, as the weight table of its architecture spells them."""

from __future__ import annotations

from collections.abc import Mapping, Set

from bridge.models.errors import WeightsError
from bridge.models.huggingface.folder.headers import format_tensor
from bridge.models.huggingface.folder.stored import Stored, make_problem


def rename(stored: Mapping[str, Stored], *, base: str, known: Set[str]) -> tuple[dict[str, Stored], list[str]]:
    """Return the tensors under the names of the table, and the names of those outside the language model.

    A folder of a base model has names without the prefix ``base``. A multimodal model has its language model in a
    module of its own. Version 5 of transformers has ``model.`` for ``backbone.`` in memory. TensorFlow calls the
    parameters of norms ``gamma`` and ``beta``.

    Args:
        stored: The tensors by the names that the folder gives them.
        base: The prefix of the base model within the model with the output layer.
        known: The names of the table.

    Raises:
        WeightsError: Two tensors have the same name then.
    """
    prefix = _find_prefix(stored, base, known)
    renamed: dict[str, Stored] = {}
    outside = []
    problems = []
    for name, tensor in stored.items():
        if _LANGUAGE_MODEL in prefix and not _is_output(name) and not name.startswith(prefix):
            outside.append(name)
            continue
        first = renamed.setdefault(_replace_prefix(name, prefix, base), tensor)
        if first is not tensor:
            message = f"is the same weight as {format_tensor(first.values.name)}: expected one of the two"
            problems.append(make_problem(tensor, message))
    if problems:
        raise WeightsError(problems)
    return renamed, outside


_LANGUAGE_MODEL = "language_model."
_OUTPUT = "lm_head."
_MODERN = {".gamma": ".weight", ".beta": ".bias"}


def _find_prefix(stored: Mapping[str, Stored], base: str, known: Set[str]) -> str:
    """Return the prefix of the folder's names that stands for ``base``: the first one that makes a name known."""
    inner = [name for name in stored if not _is_output(name)]
    prefixes = (base, "", "model.", _LANGUAGE_MODEL + base, base + _LANGUAGE_MODEL, _LANGUAGE_MODEL)
    found = (one for one in prefixes if any(_replace_prefix(name, one, base) in known for name in inner))
    return next(found, base)


def _is_output(name: str) -> bool:
    return name.removeprefix(_LANGUAGE_MODEL).startswith(_OUTPUT)


def _replace_prefix(name: str, prefix: str, base: str) -> str:
    if _is_output(name):
        name = name.removeprefix(_LANGUAGE_MODEL)
    elif name.startswith(prefix):
        name = base + name.removeprefix(prefix)
    for legacy, modern in _MODERN.items():
        if name.endswith(legacy):
            return name.removesuffix(legacy) + modern
    return name
