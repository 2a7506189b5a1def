"""WriteThrough: a mixin for configs that embed another config and expose its fields as their own."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from bridge.config.errors import ConfigError, did_you_mean
from bridge.config.problems import abbreviate


class _FieldOwners(NamedTuple):
    """The owners of a config's fields, given the class of its embedded config."""

    alone: frozenset[str]
    """Declared only by the outer config, without the field that holds the embedded config."""

    shared: frozenset[str]
    """Declared by both configs. The embedded config owns them."""


_names_cache: dict[type, frozenset[str]] = {}
_owners_cache: dict[tuple[type, type], _FieldOwners] = {}


class WriteThrough:
    """Mixin for a dataclass that forwards attribute reads and writes to the dataclass in one of its required fields.

    `config.num_layers` reads `config.transformer.num_layers`, and assigning it writes there. Each field has one owner:
    a field that both configs declare belongs to the embedded config as long as that config has it. Assigning a name
    that neither config has raises an AttributeError.

    To make the embedded fields visible to type checkers, declare them in a base class that is not a dataclass, so that
    the constructor does not take them (`bridge.builders.EmbedsTransformer` does this for a TransformerConfig):

        class EmbedsEncoder(WriteThrough):
            _embeds = "encoder"

            if TYPE_CHECKING:
                num_layers: int

    `dataclasses.replace(config, transformer=other)` also passes the current values of the shared fields, and raises a
    ConfigError if they conflict with `other`. To replace the embedded config of a copy, assign it to the copy.
    """

    _embeds: ClassVar[str] = "transformer"
    """Name of the field that holds the embedded config."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # __new__ needs the embedded config to see which fields it owns, so a default is not enough.
        if cls._embeds in vars(cls):
            raise TypeError(f"{cls.__qualname__}.{cls._embeds} must be a required field: it embeds a config")

    def __new__(cls, /, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        given = kwargs
        if args:
            own = getattr(cls, "__dataclass_fields__", {}).values()
            positional = (f.name for f in own if f.init and not f.kw_only)
            given = dict(zip(positional, args, strict=False)) | kwargs
        shared = _split_fields(cls, given.get(cls._embeds)).shared
        for name in sorted(shared & given.keys()):
            value, owned = given[name], getattr(given[cls._embeds], name)
            if value != owned:
                given_twice = f"{name}={abbreviate(value)} conflicts with {cls._embeds}.{name}={abbreviate(owned)}"
                raise ConfigError(
                    f"{cls.__qualname__}: {given_twice}; {cls._embeds} owns this field, set it there only"
                )
        # The generated __init__ assigns every field once. For these it would overwrite the owner's values with
        # defaults, so `_write` ignores the first assignment of each.
        if unset := shared - given.keys():
            self.__dict__["_unset"] = set(unset)
        return self

    def _read(self, name: str) -> Any:
        # Python calls this only when normal lookup fails. Dunder names are never forwarded: copy and pickle probe them.
        embedded = self.__dict__.get(type(self)._embeds)
        if embedded is not None and not (name.startswith("__") and name.endswith("__")):
            try:
                return getattr(embedded, name)
            except AttributeError:
                pass
        also = f", nor has its {type(self)._embeds} ({type(embedded).__name__})" if embedded is not None else ""
        raise AttributeError(f"{type(self).__qualname__!r} has no attribute {name!r}{also}")

    def _write(self, name: str, value: Any) -> None:
        cls = type(self)
        embedded = self.__dict__.get(cls._embeds)
        if name in self.__dict__.get("_unset", ()):
            self._mark_assigned(name)
        elif name in _split_fields(cls, embedded).alone:
            object.__setattr__(self, name, value)
        elif name == cls._embeds:
            self._embed(value)
        elif hasattr(getattr(cls, name, None), "__set__"):
            object.__setattr__(self, name, value)
        elif name in _field_names(type(embedded)):
            setattr(embedded, name, value)
        elif hasattr(cls, name) or name in _field_names(cls):
            object.__setattr__(self, name, value)
        else:
            known = _field_names(cls) | _field_names(type(embedded))
            raise AttributeError(f"{cls.__qualname__!r} has no field {name!r}{did_you_mean(name, sorted(known))}")

    if not TYPE_CHECKING:  # with __getattr__, a type checker would accept every name
        __getattr__ = _read
        __setattr__ = _write

    def _mark_assigned(self, name: str) -> None:
        """Record that __init__ has assigned the shared field `name`."""
        unset: set[str] = self.__dict__["_unset"]
        unset.discard(name)
        if not unset:
            del self.__dict__["_unset"]

    def _embed(self, embedded: object) -> None:
        """Set the embedded config, and move the ownership of shared fields to it.

        Fields that only the previous embedded config had return to the outer config, with their values.
        """
        cls = type(self)
        before = self.__dict__.get(cls._embeds)
        taken, freed = _split_fields(cls, embedded).shared, _split_fields(cls, before).shared
        for name in taken:
            self.__dict__.pop(name, None)
            _forward_field(cls, name)
        for name in freed - taken:
            self.__dict__[name] = getattr(before, name)
        object.__setattr__(self, cls._embeds, embedded)


def get_shared_names(config: object) -> frozenset[str]:
    """Return the fields of `config` that its embedded config owns; empty unless `config` is a `WriteThrough`."""
    if not isinstance(config, WriteThrough):
        return frozenset()
    return _split_fields(type(config), getattr(config, config._embeds)).shared


def _split_fields(cls: type[WriteThrough], embedded: object) -> _FieldOwners:
    key = cls, type(embedded)
    if key not in _owners_cache:
        own, other = _field_names(cls) - {cls._embeds}, _field_names(type(embedded))
        _owners_cache[key] = _FieldOwners(alone=own - other, shared=own & other)
    return _owners_cache[key]


def _field_names(cls: type) -> frozenset[str]:
    """Return the field names of a dataclass; empty for any other class."""
    if cls not in _names_cache:
        _names_cache[cls] = frozenset(f.name for f in fields(cls)) if is_dataclass(cls) else frozenset()
    return _names_cache[cls]


class _ForwardedField:
    """Replaces the class attribute with a field's default, which would hide the embedded config's value.

    It is a non-data descriptor: an instance that owns the field has it in its `__dict__`, which takes precedence.
    """

    def __init__(self, name: str, default: object) -> None:
        self._name = name
        self._default = default

    def __get__(self, config: WriteThrough | None, owner: type) -> Any:
        return self._default if config is None else config._read(self._name)


def _forward_field(cls: type[WriteThrough], name: str) -> None:
    """Make reads of the shared field `name` go to the embedded config. Only `cls` itself is changed."""
    default = inspect.getattr_static(cls, name, MISSING)
    if default is not MISSING and not hasattr(default, "__get__"):
        setattr(cls, name, _ForwardedField(name, default))
