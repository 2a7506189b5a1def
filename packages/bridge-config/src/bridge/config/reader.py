"""Reading what stands for an object: a nested config, an enumeration member, a dtype, a function, a partial.

Nothing that a document names is imported before it is authorised (`bridge.config.targets`), nothing is called but the
constructors of configs, and whatever a name stands for must fit the annotation of its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, get_args, get_origin

from bridge.config import hints, targets
from bridge.config.errors import TargetError, nearest
from bridge.config.refusal import Found, ReadError, below, got, kind, refused, unexpected, wanted_for
from bridge.config.schema import check
from bridge.config.writethrough import WriteThrough, shared_names

_BUILTINS: dict[str, Callable[[Any], Any]] = {
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.dict": dict,
    "builtins.float": float,
}


class Reader:
    """Reads the values of one document."""

    def __init__(self, omitted: dict[int, set[str]]) -> None:
        """`omitted`: the fields that the document says it leaves out, by the identity of the mapping they miss from."""
        self._omitted = omitted

    def object(self, data: dict[str, Any], cls: type) -> Any:
        """The instance of `cls`, a class with slots, that the mapping `data` describes."""
        given = {key: value for key, value in data.items() if key != "_target_"}
        # Fields that the class computes itself (init=False) are written for people's eyes, and not read.
        init = {slot.name for slot in hints.slots(cls) or () if slot.init}
        found = _misplaced(given, cls)
        values: dict[str, Any] = {}
        try:
            values = check(cls, {key: value for key, value in given.items() if key in init}, self)
        except ReadError as error:
            found += error.found
        if found:
            raise ReadError(found)
        made = _constructed(cls, values)
        if init - shared_names(made) - self._omitted.get(id(data), set()) <= values.keys():
            _restore(made, values)
        return made

    def named(self, value: Any, members: tuple[Any, ...]) -> Any:
        """The object that `value` stands for, in a place annotated with the union of `members`."""
        if any(hints.is_any(member) for member in members) and not (isinstance(value, dict) and "_target_" in value):
            return self._anything(value)
        if isinstance(value, str):
            return _by_name(value, members)
        if isinstance(value, dict):
            return self._by_mapping(value, members)
        if any(_fits(value, member) for member in members):
            return value
        raise unexpected(wanted_for(members), value)

    def unwrapped(self, value: Any) -> Any:
        """`value`, or the built-in container or number that it is the long form of."""
        if isinstance(value, dict) and _is_builtin(value.get("_target_")):
            return self._builtin(value)
        return value

    def _anything(self, value: Any) -> Any:
        """A value about which the annotation says nothing: itself, except for mappings with `_target_` inside it."""
        if isinstance(value, list):
            return self._each(enumerate(value))
        if isinstance(value, dict):
            return dict(zip(value, self._each(value.items()), strict=True))
        return value

    def _each(self, items: Iterable[tuple[Any, Any]]) -> list[Any]:
        found: Found = []
        read = []
        for key, item in items:
            try:
                read.append(self.named(item, (Any,)))
            except ReadError as error:
                found += [((key, *path), message) for path, message in error.found]
        if found:
            raise ReadError(found)
        return read

    def _by_mapping(self, data: dict[str, Any], members: tuple[Any, ...]) -> Any:
        if _is_builtin(data.get("_target_")):
            made = self._builtin(data)
            if not any(_fits(made, member) for member in members):
                raise unexpected(wanted_for(members), made)
            return made
        if "_partial_" in data:
            return self._partial(data, members)
        if "_name_" in data:
            return _enum_member(data, members)
        if "_call_" in data:
            _only(data, {"_target_", "_call_"})
            if data["_call_"] is not False:
                raise refused("must be false: a document calls nothing", "_call_")
            with below("_target_"):
                return _fitting(data.get("_target_"), members)
        return self.object(data, class_in(data, members))

    def _builtin(self, data: dict[str, Any]) -> Any:
        """A built-in container or number, written as {_target_: builtins.tuple, _args_: [[...]]}."""
        _only(data, {"_target_", "_args_"})
        args = data.get("_args_")
        if not isinstance(args, list) or len(args) != 1:
            raise refused("expected a list of one value", "_args_")
        with below("_args_", 0):
            inner = self.named(args[0], (Any,))
            try:
                return _BUILTINS[data["_target_"]](inner)
            except (TypeError, ValueError) as error:
                raise refused(f"makes no {data['_target_'].removeprefix('builtins.')}: {error}") from error

    def _partial(self, data: dict[str, Any], members: tuple[Any, ...]) -> Any:
        if not any(hints.is_any(member) or hints.is_callable(member) for member in members):
            raise unexpected(wanted_for(members), data)
        if data["_partial_"] is not True:
            raise refused(f"expected true, got {got(data['_partial_'])}", "_partial_")
        args = data.get("_args_", [])
        keywords = {key: value for key, value in data.items() if key not in ("_target_", "_partial_", "_args_")}
        if strange := [key for key in keywords if not key.isidentifier() or key.startswith("_")]:
            raise ReadError([((key,), "unknown key of a partial") for key in strange])
        if not isinstance(args, list):
            raise refused(f"expected a list, got {got(args)}", "_args_")
        with below("_target_"):
            function = _fitting(data.get("_target_"), (Callable,))
        with below("_args_"):
            args = self._anything(args)
        return partial(function, *args, **self._anything(keywords))


def class_named(name: object, members: tuple[Any, ...]) -> Any:
    """The class that `name` stands for, a subclass of one of `members`."""
    found = _resolved(name, members)
    bounds = tuple(member for member in members if isinstance(member, type))
    if not isinstance(found, type) or not (issubclass(found, bounds) or any(hints.is_any(m) for m in members)):
        raise refused(f"expected {wanted_for(members)}, but {name!r} is {kind(found)}")
    return found


def class_in(data: dict[str, Any], members: tuple[Any, ...]) -> Any:
    """The class with slots that the mapping `data` describes an instance of."""
    if "_target_" in data:
        with below("_target_"):
            cls = class_named(data["_target_"], members)
            if hints.slots(cls) is None:
                raise refused(f"{data['_target_']!r} is not a config: documents describe only dataclasses")
            return cls
    candidates = [member for member in members if isinstance(member, type) and hints.slots(member) is not None]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise refused("missing '_target_': " + " or ".join(repr(targets.qualified_name(one)) for one in candidates))
    raise unexpected(wanted_for(members), data)


def _constructed(cls: type, values: dict[str, Any]) -> Any:
    try:
        return cls(**values)
    except Exception as error:  # whatever its own checks raise is about these values
        raise refused(f"{cls.__name__} refuses these values: {str(error) or type(error).__name__}") from error


def _restore(made: object, values: dict[str, Any]) -> None:
    """Put back what the constructor of `made` turned into something else.

    Only for a mapping that gives every field, as `as_dict` writes it: that is the state of an object, whose derived
    values may have been changed. A mapping that gives some is a description, and the constructor has the last word.
    """
    parameters = getattr(type(made), "__dataclass_params__", None)
    put = object.__setattr__ if parameters and parameters.frozen else setattr
    for slot in hints.slots(type(made)) or ():
        if slot.name in values:
            value, now = values[slot.name], getattr(made, slot.attribute)
            if now is not value and not (type(now) is type(value) and now == value):
                put(made, slot.attribute, value)


def _misplaced(given: dict[str, Any], cls: type) -> Found:
    """Unknown keys, and fields given to a config that leaves them to the one it embeds."""
    own = {slot.name: slot for slot in hints.slots(cls) or ()}
    embeds, inner = "", set[str]()
    if issubclass(cls, WriteThrough) and cls._embeds in own:
        embeds = cls._embeds
        inner = _field_names(given.get(embeds), own[embeds].hint)
    found: Found = []
    for key in given:
        if key in inner:
            found.append(((key,), f"belongs to {embeds}: give it as {embeds}.{key}"))
        elif key not in own:
            near = nearest(str(key), own) or nearest(str(key), inner, prefix=f"{embeds}.")
            found.append(((key,), f"unknown key of {cls.__name__}{near}"))
    return found


def _field_names(data: object, hint: Any) -> set[str]:
    """The fields of the class that `data`, in a place annotated `hint`, would become an instance of."""
    try:
        cls = class_in(data, hints.alternatives(hint)) if isinstance(data, dict) else type(data)
    except ReadError:
        return set()
    return {slot.name for slot in hints.slots(cls) or ()}


def _by_name(name: str, members: tuple[Any, ...]) -> Any:
    choices: list[str] = []
    for member in members:
        if hints.is_enum(member):
            if name in member.__members__:
                return member[name]
            choices += member.__members__
        elif hints.is_dtype(member):
            if (dtype := hints.dtype(name)) is not None:
                return dtype
            choices += hints.dtypes()
    if any(hints.is_callable(member) or hints.is_class(member) for member in members):
        return _fitting(name, members)
    raise unexpected(wanted_for(members), name, nearest(name, choices))


def _enum_member(data: dict[str, Any], members: tuple[Any, ...]) -> Any:
    """An enumeration member, written as {_target_: module.Enum, _name_: member} where its bare name would be text."""
    _only(data, {"_target_", "_name_"})
    with below("_target_"):
        cls = class_named(data.get("_target_"), members)
        if not hints.is_enum(cls):
            raise refused(f"{data['_target_']!r} is not an enumeration")
    name = data["_name_"]
    if name not in cls.__members__:
        raise refused(f"{cls.__name__} has no member {name!r}{nearest(str(name), cls.__members__)}", "_name_")
    return cls[name]


def _fitting(name: object, members: tuple[Any, ...]) -> Any:
    """The object itself that `name` stands for, if it fits the place."""
    found = _resolved(name, members)
    if not any(_fits(found, member) for member in members):
        raise refused(f"expected {wanted_for(members)}, but {name!r} is {kind(found)}")
    return found


def _fits(value: object, member: Any) -> bool:
    if hints.is_any(member):
        return True
    if hints.is_callable(member):
        # A config class can be called too, but it is no function.
        return callable(value) and not (isinstance(value, type) and hints.slots(value) is not None)
    if hints.is_class(member):
        bound = get_args(member)[0] if get_args(member) else object
        return isinstance(value, type) and (not isinstance(bound, type) or issubclass(value, bound))
    try:
        return isinstance(value, get_origin(member) or member)
    except TypeError:
        return True  # a TypeVar or the like, which says nothing that can be checked here


def _resolved(name: object, members: tuple[Any, ...]) -> Any:
    """The object that `name` stands for. The classes of an annotation are code: they need no registration."""
    if not isinstance(name, str):
        raise refused(f"expected a name, got {got(name)}")
    for member in members:
        if isinstance(member, type) and targets.qualified_name(member) == name:
            return member
    if name.startswith("torch.") and (dtype := hints.dtype(name)) is not None:
        return dtype
    if name in hints.PLAIN_CLASSES and (found := targets.loaded(name)) is not None:
        return found
    try:
        return targets.resolve(name)
    except TargetError as error:
        raise refused(str(error)) from error


def _is_builtin(name: object) -> bool:
    return isinstance(name, str) and name in _BUILTINS


def _only(data: dict[str, Any], keys: set[str]) -> None:
    """Refuse keys of `data` beside `keys`."""
    if strange := [key for key in data if key not in keys]:
        beside = " and ".join(sorted(keys & data.keys()))
        raise ReadError([((key,), f"unknown key beside {beside}") for key in strange])
