"""WriteThrough: a config that embeds another one, and reads and writes its fields as if they were its own."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

from bridge.config.errors import ConfigError, nearest


class WriteThrough:
    """Mixin for a dataclass with a required field that holds another dataclass, both read and written through.

    `config.num_layers` reads `config.transformer.num_layers`, and assigning it writes there. One owner per field: a
    field that both declare is owned by the embedded config for as long as that has it. Assigning a name that neither
    has is an AttributeError.

    Type checkers know the embedded fields of a config that says what they are, in a base class that is no dataclass,
    so that its constructor does not take them (`bridge.builders.EmbedsTransformer` does so for a TransformerConfig):

        class EmbedsEncoder(WriteThrough):
            _embeds = "encoder"

            if TYPE_CHECKING:
                num_layers: int

    `dataclasses.replace(config, transformer=other)` hands `other` also the values of the fields that both declare, and
    is refused where they conflict. To exchange the embedded config of a copy, assign it to the copy.
    """

    _embeds: ClassVar[str] = "transformer"
    """Name of the field that holds the embedded config."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Only a config given to the constructor can be asked, before __init__, which fields it owns.
        if cls._embeds in vars(cls):
            raise TypeError(f"{cls.__qualname__}.{cls._embeds} must be a required field: it embeds a config")

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        given = kwargs
        if args:
            positional = (f.name for f in fields(cls) if f.init and not f.kw_only)
            given = dict(zip(positional, args, strict=False)) | kwargs
        shared = _shared(cls, type(given.get(cls._embeds)))
        for name in sorted(shared & given.keys()):
            value, owned = given[name], getattr(given[cls._embeds], name)
            if value != owned:
                raise ConfigError(
                    f"{cls.__qualname__}: {name}={value!r} conflicts with {cls._embeds}.{name}={owned!r}; "
                    f"{cls._embeds} owns this field, give it there only"
                )
        # The generated __init__ assigns each field once; these must not overwrite the owner's values with defaults.
        if unset := shared - given.keys():
            self.__dict__["_unset"] = set(unset)
        return self

    def _read(self, name: str) -> Any:
        # Reached only when normal lookup failed. Dunder names are never forwarded: copy and pickle probe for them.
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
            self._settle(name)
        elif name in _unshared(cls, type(embedded)):
            object.__setattr__(self, name, value)
        elif name == cls._embeds:
            self._embed(value)
        elif hasattr(getattr(cls, name, None), "__set__"):
            object.__setattr__(self, name, value)
        elif name in field_names(embedded):
            setattr(embedded, name, value)
        elif hasattr(cls, name) or name in field_names(self):
            object.__setattr__(self, name, value)
        else:
            known = field_names(self) | field_names(embedded)
            raise AttributeError(f"{cls.__qualname__!r} has no field {name!r}{nearest(name, sorted(known))}")

    if not TYPE_CHECKING:  # a type checker would take every name for a field
        __getattr__ = _read
        __setattr__ = _write

    def _settle(self, name: str) -> None:
        """Take note that __init__ has passed the shared field `name`."""
        unset: set[str] = self.__dict__["_unset"]
        unset.discard(name)
        if not unset:
            del self.__dict__["_unset"]

    def _embed(self, embedded: object) -> None:
        """Put `embedded` in its place and hand the fields that both declare to it, or back from the one before."""
        cls = type(self)
        before = self.__dict__.get(cls._embeds)
        taken, freed = _shared(cls, type(embedded)), _shared(cls, type(before))
        for name in taken:
            self.__dict__.pop(name, None)
            _uncover(cls, name)
        for name in freed - taken:
            self.__dict__[name] = getattr(before, name)
        object.__setattr__(self, cls._embeds, embedded)


def field_names(config: object) -> frozenset[str]:
    """The names of a dataclass instance's fields; none for anything else."""
    return _field_names(type(config))


def shared_names(config: object) -> frozenset[str]:
    """The fields that `config` declares but leaves to the config it embeds; none unless it is a `WriteThrough`."""
    if not isinstance(config, WriteThrough):
        return frozenset()
    return _shared(type(config), type(getattr(config, config._embeds)))


@cache
def _field_names(cls: type) -> frozenset[str]:
    return frozenset(f.name for f in fields(cls)) if is_dataclass(cls) else frozenset()


@cache
def _shared(cls: type[WriteThrough], embedded: type) -> frozenset[str]:
    """The fields that both declare, and `embedded` owns."""
    return _field_names(cls) & _field_names(embedded) - {cls._embeds}


@cache
def _unshared(cls: type[WriteThrough], embedded: type) -> frozenset[str]:
    """The fields that `cls` alone declares, without the one that embeds."""
    return _field_names(cls) - _field_names(embedded) - {cls._embeds}


def _uncover(cls: type, name: str) -> None:
    """Remove a field's default from the class, where a dataclass leaves it: it would hide the embedded config's value.

    The generated __init__ holds its own copy of the default.
    """
    for owner in cls.__mro__:
        if name in vars(owner) and "__dataclass_fields__" in vars(owner):
            delattr(owner, name)
