"""Checks that a config class is declared so that its documents are lossless, when it is defined and first used."""

from __future__ import annotations

import dataclasses
import inspect

from bridge.config.errors import TargetError
from bridge.config.schema.names import MODEL_CONFIG, SCHEMA, WRITE_THROUGH, get_base_names

_checked: set[type] = set()


def check_definition(cls: type) -> None:
    """Check a subclass of ModelConfig in `__init_subclass__`, before `@dataclass` has processed it.

    Raises:
        TargetError: The declaration is wrong; the message says what to write instead.
    """
    name, annotated = cls.__qualname__, inspect.get_annotations(cls)
    if "ClassVar" not in str(annotated.get("builder", "ClassVar")):
        raise TargetError(f"{name}.builder is declared as a field: write `builder: ClassVar[str] = ...`")
    if "builder" in vars(cls):
        _check_builder(name, vars(cls)["builder"])
    inherited = {one.name for one in dataclasses.fields(cls)}
    for field, value in vars(cls).items():
        if field in inherited and field not in annotated and not hasattr(value, "__get__"):
            raise TargetError(
                f"{name}.{field} has no annotation, so @dataclass ignores it: write `{field}: <its type> = {value!r}`"
            )


def check_class(cls: type) -> None:
    """Check a class on first use, when its decorators have run. A checked class is not checked again.

    Raises:
        TargetError: The class lacks `@dataclass`, its embedded field, or a valid schema.
    """
    if cls in _checked:
        return
    bases = get_base_names(cls)
    if MODEL_CONFIG in bases:
        for base in cls.__mro__:
            if MODEL_CONFIG in get_base_names(base):
                _check_decorated(base)
        _check_schema(cls)
    if WRITE_THROUGH in bases:
        _check_embeds(cls, cls._embeds)  # type: ignore[attr-defined]
    _checked.add(cls)


def _check_builder(name: str, builder: object) -> None:
    if isinstance(builder, type):
        message = f"a class: write its dotted name, '{builder.__module__}.{builder.__qualname__}'"
    elif not isinstance(builder, str) or "." not in builder.strip("."):
        message = f"{builder!r}: write the dotted name of the builder's class, such as 'my_package.MyBuilder'"
    else:
        return
    raise TargetError(f"{name}.builder is {message}")


def _check_decorated(cls: type) -> None:
    annotated = [name for name, hint in inspect.get_annotations(cls).items() if "ClassVar" not in str(hint)]
    if annotated and "__dataclass_fields__" not in vars(cls):
        raise TargetError(f"{cls.__qualname__} has the fields {', '.join(annotated)}: decorate it with @dataclass")


def _check_embeds(cls: type, embeds: str) -> None:
    if embeds not in getattr(cls, "__dataclass_fields__", {}):
        raise TargetError(
            f"{cls.__qualname__} inherits WriteThrough, but has no field {embeds!r}: declare it, or set _embeds"
        )


def _check_schema(cls: type) -> None:
    if (schema := getattr(cls, "schema", None)) is None or "schema" in {one.name for one in dataclasses.fields(cls)}:
        return
    if SCHEMA not in get_base_names(type(schema)):
        raise TargetError(f"{cls.__qualname__}.schema is {schema!r}: make it a bridge.config.Schema")
