"""The strict check of one class's fields: pydantic's rules, and ours for what stands for an object."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial, reduce
from operator import or_
from typing import Annotated, Any, Literal, NotRequired, Protocol, Required, TypedDict, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, PlainValidator, TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from bridge.config import hints
from bridge.config.errors import nearest
from bridge.config.paths import Path
from bridge.config.refusal import Found, ReadError, got

_WANTED = {
    "int_type": "an integer",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "none_required": "null",
}


class ObjectReader(Protocol):
    """Reads what pydantic knows nothing about."""

    def named(self, value: Any, members: tuple[Any, ...]) -> Any:
        """The object that `value` stands for, in a place annotated with the union of `members`."""
        ...

    def unwrapped(self, value: Any) -> Any:
        """`value`, or the built-in container that it is the long form of."""
        ...


def check(cls: type, given: dict[str, Any], reader: ObjectReader) -> dict[str, Any]:
    """The values of the init fields that `given` has, checked and with objects for what stands for them.

    Raises:
        ReadError: all that is wrong, missing fields included.
    """
    try:
        return dict(_schema(cls).validate_python(given, context=reader))
    except ValidationError as error:
        raise ReadError(_explained(error.errors(include_url=False), given)) from None


@cache
def _schema(cls: type) -> TypeAdapter[Any]:
    members = {
        slot.name: Required[_strict(slot.hint)] if slot.required else NotRequired[_strict(slot.hint)]
        for slot in hints.slots(cls) or ()
        if slot.init
    }
    schema = TypedDict(cls.__name__, members)  # type: ignore[misc]
    schema.__pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[attr-defined]
    return TypeAdapter(schema)


def _strict(hint: Any) -> Any:
    """The annotation that pydantic is to check instead of `hint`."""
    bare = hints.strip(hint)
    members = hints.alternatives(bare)
    checked = [_data(member) for member in members if _is_data(member)]
    if named := tuple(member for member in members if not _is_data(member)):
        checked.append(Annotated[Any, PlainValidator(partial(_read_named, members=named))])
    if bare is type(None) or type(None) in get_args(bare):
        checked.append(None)
    return reduce(or_, checked[1:], checked[0])


def _is_data(hint: Any) -> bool:
    """Whether `hint` is of plain data, with whatever is inside it."""
    kinds = (bool, int, float, str, list, tuple, dict, set, frozenset)
    return hint in kinds or get_origin(hint) in (*kinds, Literal) or hints.is_sequence(get_origin(hint) or hint)


def _data(hint: Any) -> Any:
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (bool, int, str):
        return origin
    if origin is float:
        return Annotated[Any, PlainValidator(_read_float)]
    if origin is Literal:
        return Annotated[Any, PlainValidator(partial(_read_literal, choices=args))]
    inner: list[Any] = [arg if arg is Ellipsis else _strict(arg) for arg in args]
    if origin is dict:
        return Annotated[_generic(dict, *(inner or (str, _strict(Any)))), BeforeValidator(_read_unwrapped)]
    if origin is tuple:
        checked = _generic(tuple, *(inner or (_strict(Any), Ellipsis)))
        return Annotated[checked, BeforeValidator(partial(_read_container, kind=tuple))]
    item = inner[0] if inner else _strict(Any)
    if origin in (set, frozenset):
        return Annotated[_generic(origin, item), BeforeValidator(partial(_read_container, kind=origin))]
    return Annotated[_generic(list, item), BeforeValidator(_read_unwrapped)]


def _generic(origin: Any, *args: Any) -> Any:
    return origin[args]


def _read_float(value: Any, info: ValidationInfo) -> Any:
    value = _read_unwrapped(value, info)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value  # an integer is a fine number, and stays the integer it was
    raise _expected("a number")


def _read_literal(value: Any, *, choices: tuple[Any, ...]) -> Any:
    # 1 == True and 1 == 1.0: the type counts too.
    if any(type(choice) is type(value) and choice == value for choice in choices):
        return value
    near = nearest(value, [choice for choice in choices if isinstance(choice, str)]) if isinstance(value, str) else ""
    raise _expected("one of " + ", ".join(repr(choice) for choice in choices), near)


def _read_container(value: Any, info: ValidationInfo, *, kind: type) -> Any:
    """A list as the tuple or set that is asked for; anything else is left to pydantic."""
    value = _read_unwrapped(value, info)
    try:
        return kind(value) if isinstance(value, list) else value
    except TypeError:
        raise _expected("a list of plain values") from None


def _read_unwrapped(value: Any, info: ValidationInfo) -> Any:
    return _carried(_reader(info).unwrapped, value)


def _read_named(value: Any, info: ValidationInfo, *, members: tuple[Any, ...]) -> Any:
    return _carried(_reader(info).named, value, members)


def _reader(info: ValidationInfo) -> ObjectReader:
    reader: ObjectReader | None = info.context
    assert reader is not None
    return reader


def _carried(read: Callable[..., Any], *args: Any) -> Any:
    """Carry what `read` refuses through pydantic, which adds where it was."""
    try:
        return read(*args)
    except ReadError as error:
        if error.wanted is not None:
            raise _expected(error.wanted, error.hint) from error
        raise PydanticCustomError("refused", "refused", {"found": error.found}) from error


def _expected(wanted: str, hint: str = "") -> PydanticCustomError:
    return PydanticCustomError("expected", "expected", {"wanted": wanted, "hint": hint})


def _explained(errors: Iterable[ErrorDetails], given: dict[str, Any]) -> Found:
    """Pydantic's errors as ours: one for each place, though a union reports each of its members."""
    fields: dict[Any, dict[Path, list[tuple[Path, ErrorDetails]]]] = {}
    for error in errors:
        path, member = _walked(error, given)
        fields.setdefault(path[0], {}).setdefault(member, []).append((path, error))
    found: Found = []
    for branches in fields.values():
        # Of a union's members, the one that fits farthest down is the one that was meant.
        depths = {member: max(_depth(*entry) for entry in branch) for member, branch in branches.items()}
        deepest = max(depths.values())
        found += _merged([e for member, branch in branches.items() if depths[member] == deepest for e in branch])
    return found


def _walked(error: ErrorDetails, data: Any) -> tuple[Path, Path]:
    """Split pydantic's location into the path through `data`, and the marks of union members that lie between."""
    path: list[str | int] = []
    marks: list[str | int] = []
    last = len(error["loc"]) - 1
    for index, step in enumerate(error["loc"]):
        inside = step in data if isinstance(data, dict) else isinstance(step, int) and step < _length(data)
        if inside:
            data = data[step]
        if inside or not path or (error["type"] == "missing" and index == last):
            path.append(step)
        else:
            marks.append(step)
    return tuple(path), tuple(marks)


def _length(data: Any) -> int:
    return len(data) if isinstance(data, (list, tuple)) else 0


def _depth(path: Path, error: ErrorDetails) -> int:
    below: Found = error.get("ctx", {}).get("found", [])
    return len(path) + max((len(inner) for inner, _ in below), default=0)


def _merged(entries: list[tuple[Path, ErrorDetails]]) -> Found:
    found: Found = []
    expected: dict[Path, list[ErrorDetails]] = {}
    for path, error in entries:
        if error["type"] == "refused":
            found += [((*path, *inner), message) for inner, message in error["ctx"]["found"]]
        elif error["type"] == "missing":
            found.append((path, "required, but missing"))
        else:
            expected.setdefault(path, []).append(error)
    for path, errors in expected.items():
        wanted = " or ".join(dict.fromkeys(_wanted(error) for error in errors))
        hints_ = "".join(error.get("ctx", {}).get("hint", "") for error in errors)
        found.append((path, f"expected {wanted}, got {got(errors[0]['input'])}{hints_}"))
    return found


def _wanted(error: ErrorDetails) -> str:
    if error["type"] == "expected":
        return str(error["ctx"]["wanted"])
    return _WANTED.get(error["type"], error["msg"])
