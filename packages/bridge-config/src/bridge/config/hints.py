"""What the annotations of a class say about its fields."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, NewType, TypeAliasType, Union, get_args, get_origin, get_type_hints

from bridge.config.targets import qualified_name

# Classes that are not dataclasses and yet have a written form: constructor argument -> the attribute that holds it.
# They are not imported here; each row counts once the class is loaded.
PLAIN_CLASSES: dict[str, dict[str, str]] = {
    "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout": {
        "layout": "input_data",
        "pipeline_model_parallel_size": "pipeline_model_parallel_size",
    },
    "megatron.core.quantization.quant_config.RecipeConfig": {"matchers": "matchers", "config_dict": "configs"},
    "megatron.core.quantization.quant_config.GlobMatcher": {"pattern": "pattern", "config_key": "config_key"},
}


@dataclass(frozen=True)
class Slot:
    """One field of a class: its name in documents, its annotation, and where an instance keeps it."""

    name: str
    hint: Any
    attribute: str
    init: bool
    required: bool


_known: dict[type, tuple[Slot, ...] | None] = {}


def slots(cls: type) -> tuple[Slot, ...] | None:
    """The fields of a dataclass, or of a class in `PLAIN_CLASSES`; None for any other class."""
    if cls not in _known:
        _known[cls] = _slots(cls)
    return _known[cls]


def _slots(cls: type) -> tuple[Slot, ...] | None:
    if dataclasses.is_dataclass(cls):
        hints = _resolved(cls)
        return tuple(
            Slot(
                f.name,
                _field_hint(f, hints[f.name]),
                f.name,
                f.init,
                f.init and f.default is f.default_factory is MISSING,
            )
            for f in dataclasses.fields(cls)
        )
    attributes = PLAIN_CLASSES.get(qualified_name(cls) or "")
    if attributes is None:
        return None
    hints = _resolved(cls.__init__)  # type: ignore[misc]
    defaults = inspect.signature(cls).parameters
    return tuple(
        Slot(name, hints.get(name, Any), attribute, True, defaults[name].default is inspect.Parameter.empty)
        for name, attribute in attributes.items()
    )


def _field_hint(f: dataclasses.Field[Any], hint: Any) -> Any:
    # megatron-core 0.19.2 declares `pipeline_dtype: torch.dtype = None`: what a field holds by default, it may hold.
    return Union[hint, None] if f.default is None else hint  # noqa: UP007  (a hint may not support |)


def _resolved(obj: Any) -> dict[str, Any]:
    """The type hints of `obj`; a name that cannot be resolved (imported for type checkers only) counts as Any."""
    unresolved: dict[str, Any] = {}
    while True:
        try:
            return get_type_hints(obj, localns=dict(unresolved), include_extras=True)
        except NameError as error:
            if error.name is None or error.name in unresolved:
                raise
            unresolved[error.name] = Any


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union without None, as they stand in the annotation; a plain annotation is its only member."""
    try:
        return _alternatives(hint)
    except TypeError:  # an unhashable annotation, which the cache cannot hold
        return _alternatives.__wrapped__(hint)


@cache
def _alternatives(hint: Any) -> tuple[Any, ...]:
    hint = strip(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(dict.fromkeys(inner for member in get_args(hint) for inner in alternatives(member)))
    return () if hint is type(None) else (hint,)


def strip(hint: Any) -> Any:
    """`hint` without Annotated, NewType and type alias wrappers."""
    while True:
        if get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        elif isinstance(hint, NewType):
            hint = hint.__supertype__
        elif isinstance(hint, TypeAliasType):
            hint = hint.__value__
        else:
            return hint


def is_any(hint: Any) -> bool:
    """Whether `hint` says nothing about the value."""
    return hint is Any or hint is object


def is_callable(hint: Any) -> bool:
    """Whether `hint` asks for a function."""
    return hint is Callable or get_origin(hint) is collections.abc.Callable


def is_class(hint: Any) -> bool:
    """Whether `hint` asks for a class rather than an instance."""
    return hint is type or get_origin(hint) is type


def is_sequence(origin: Any) -> bool:
    """Whether `origin` is the origin of an abstract sequence annotation, which a list satisfies."""
    return origin in (collections.abc.Sequence, collections.abc.MutableSequence, collections.abc.Iterable)


def is_enum(hint: Any) -> bool:
    """Whether `hint` is an enumeration."""
    return isinstance(hint, type) and issubclass(hint, Enum)


def is_dtype(hint: Any) -> bool:
    """Whether `hint` is torch.dtype; torch itself need not be there."""
    return isinstance(hint, type) and qualified_name(hint) == "torch.dtype"


def reads_text(hint: Any) -> bool:
    """Whether text in a document can stand for a value of `hint`."""
    return (
        is_any(hint)
        or hint is str
        or (get_origin(hint) is Literal and any(isinstance(value, str) for value in get_args(hint)))
        or is_named(hint)
    )


def is_named(hint: Any) -> bool:
    """Whether values of `hint` are written as a name."""
    return is_enum(hint) or is_dtype(hint) or is_callable(hint) or is_class(hint)


def dtype(name: str) -> object | None:
    """The dtype called `name`, with or without `torch.`; None if there is none, or torch is not loaded."""
    torch = sys.modules.get("torch")
    # vars, not getattr: torch imports modules for the asking.
    found = vars(torch).get(name.removeprefix("torch.")) if torch else None
    return found if is_dtype(type(found)) else None


def dtypes() -> list[str]:
    """The names of torch's dtypes, aliases such as `torch.half` included; empty if torch is not loaded."""
    torch = sys.modules.get("torch")
    return [f"torch.{name}" for name, value in vars(torch).items() if is_dtype(type(value))] if torch else []
