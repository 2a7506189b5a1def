"""The names that documents may use, and the objects that they refer to.

A name resolves only if its object was registered in this process, or if an installed distribution declares it in the
entry-point group `bridge.targets`. For any other name, nothing is imported.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from types import MethodType
from typing import TypeVar

from bridge.config.errors import TargetError, did_you_mean, quote_name
from bridge.config.import_warnings import silence_imports
from bridge.config.schema import registry_state
from bridge.config.schema.names import get_qualified_name
from bridge.config.schema.table import get_shipped, get_shipped_aliases, list_nameable

T = TypeVar("T")

GROUP = "bridge.targets"

# Prefix -> distribution that declares its names: messages suggest installing it.
_HOMES = {"bridge.models.": "bridge-models", "megatron.": "bridge-builders", "torch.": "bridge-builders"}


def get_document_name(obj: object) -> str | None:
    """Return the name of a class or function in documents: as registered or declared, else `module.qualname`.

    A declared name is stable: the object may move to another module of its package without changing documents.
    """
    own = get_qualified_name(obj)
    if own is None or own in get_declarations():
        return own
    if isinstance(obj, type) and obj in registry_state.given_names:
        return registry_state.given_names[obj]
    return _get_declared_places().get(own, own)


def get_document_names(cls: type) -> tuple[str, ...]:
    """Return the document names of the classes in the MRO of `cls`, itself first, without `object`."""
    return tuple(name for base in cls.__mro__ if base is not object and (name := get_document_name(base)))


@cache
def _get_declared_places() -> dict[str, str]:
    """Return `module.qualname` -> declared name, for objects that are not defined where their name says."""
    places = {
        point.value.replace(":", "."): name
        for name, points in get_declarations().items()
        if "." in name
        for point in points
    }
    return {place: name for place, name in places.items() if place not in get_declarations()}


def register(obj: T, name: str | None = None) -> T:
    """Register `obj`, so that documents of this process may name it, and return it. Usable as a decorator.

    Args:
        obj: a function, class, dtype or other value. ModelConfig subclasses need no registration.
        name: the name in documents; by default `module.qualname`.

    Raises:
        TargetError: `obj` has no qualified name and none is given, or the name already refers to another object.
    """
    name = name or get_qualified_name(obj)
    if name is None:
        raise TargetError(f"{obj!r} has no qualified name: pass one, register(obj, name='...')")
    meant = get_shipped(name) if name != get_qualified_name(obj) else None
    if meant is not None and _get_loaded_by_path(meant.name) is not obj:
        raise TargetError(f"{name!r} already refers to {meant.name}: register {obj!r} under another name")
    return registry_state.register_object(obj, name)


@cache
def get_declarations() -> dict[str, list[EntryPoint]]:
    """Return the declarations of the installed distributions, by name. Cached, see `refresh`."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def refresh() -> None:
    """Drop cached declarations. Call this after installing a distribution into the running environment."""
    get_declarations.cache_clear()
    _load_declared.cache_clear()
    _get_declared_places.cache_clear()
    _is_installed.cache_clear()
    registry_state.descriptions.clear()
    registry_state.clear_names()


def list_known_names() -> list[str]:
    """Return every name that a document of this process may use, sorted."""
    return sorted({*filter(is_registered, registry_state.objects), *get_declarations(), *list_nameable()})


def is_registered(name: str) -> bool:
    """Return whether `name` is registered in this process and not replaced by a declared name."""
    return name in registry_state.objects and name not in _get_declared_places()


def resolve(name: str, *, suggest: bool = True) -> object:
    """Return the object that `name` refers to in documents of this process, importing it if it is declared.

    Args:
        name: the name.
        suggest: whether the message about an unknown name suggests a similar one, which takes milliseconds.

    Raises:
        TargetError: The name is neither registered nor declared, or its declaration is broken.
    """
    if is_registered(name):
        return registry_state.objects[name]
    if name not in get_declarations():
        raise TargetError(_explain_unknown(name, suggest=suggest))
    return _load_declared(name)


def check_declared(name: str) -> None:
    """Check that no distribution redeclares `name`, a name of the shipped table, as another object.

    Raises:
        TargetError: A distribution does.
    """
    if name in get_declarations():
        _get_declaration(name)


def _explain_unknown(name: str, *, suggest: bool) -> str:
    """Return the message about a name that is neither registered nor declared."""
    for prefix, home in _HOMES.items():
        if name.startswith(prefix) and (meant := get_shipped(name)) and not meant.nested and not _is_installed(home):
            return f"{name!r} is declared by {home}, which is not installed: pip install {home}"
    near = did_you_mean(name, list_known_names()) if suggest else ""
    return (
        f"{quote_name(name)} is not a name that documents may use here{f'{near} Otherwise' if near else ';'} install "
        f"the package that provides it, register it (bridge.config.register) or declare it in the entry-point group "
        f"{GROUP!r}"
    )


def find_document_name(obj: object) -> str | None:
    """Return a name under which a document can refer to `obj`: registered, declared or qualified; None if none does.

    Declared names count only if their module is already loaded: this function imports nothing.
    """
    if isinstance(obj, MethodType):
        return _find_method_name(obj)
    if id(obj) not in registry_state.names:
        name = _search_name(obj)
        if name is None:
            return None
        registry_state.names[id(obj)] = (obj, name)
    return registry_state.names[id(obj)][1]


def find_accepted_config(name: str) -> type | None:
    """Return the config class that the ModelBuilder `name` builds; None if this process defines no such builder."""
    is_defined = name in registry_state.builders and name not in _get_declared_places()
    return registry_state.builders[name][1] if is_defined else None


def import_builder(name: str) -> type:
    """Return the builder class `name`, importing it if needed. Only for names from config classes, never documents.

    Raises:
        TargetError: The builder cannot be imported, or is not a class.
    """
    if name in registry_state.builders:
        return registry_state.builders[name][0]
    place = get_declarations()[name][0].value.replace(":", ".") if name in get_declarations() else name
    module, _, attribute = place.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise TargetError(f"the builder {name!r} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise TargetError(f"the builder {name!r} is {found!r}, not a class")
    return found


def _find_method_name(method: MethodType) -> str | None:
    """Return the name of a bound classmethod. Each access creates a new object, so it is compared by value."""
    owner = method.__self__
    if not isinstance(owner, type) or _get_loaded_by_path(get_qualified_name(owner) or "") is not owner:
        return None
    same = getattr(owner, method.__name__, None) == method
    return f"{get_qualified_name(owner)}.{method.__name__}" if same else None


def _search_name(obj: object) -> str | None:
    for name, present in registry_state.objects.items():
        if present is obj:
            return _get_declared_places().get(name, name)
    aliases = []
    for name, points in get_declarations().items():
        if any(_get_loaded(point.value) is obj for point in points):
            if "." in name:
                return name
            aliases.append(name)
    own = get_qualified_name(obj)
    # Compare by identity: a decorated or replaced function must not be read back as the original.
    if own is not None and _get_loaded_by_path(own) is obj:
        return own
    return aliases[0] if aliases else None


@cache
def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _get_declaration(name: str) -> EntryPoint:
    """Return the declaration of `name`.

    Raises:
        TargetError: Distributions disagree, or the declared object is not the one that the name implies.
    """
    points = get_declarations()[name]
    if len({point.value for point in points}) > 1:
        owners = ", ".join(f"{point.dist.name if point.dist else '?'} ({point.value})" for point in points)
        raise TargetError(f"{name!r} is declared differently by several distributions: {owners}")
    point, own = points[0], get_shipped_aliases().get(name, name)
    # Names must not be hijacked: a dotted name is its own object, and an alias of the table is the table's object.
    if ("." in name or own != name) and not _is_place_of(own, point.value):
        raise TargetError(
            f"{_get_owner(point)} declares {name!r} as {point.value!r}, but that name is reserved for {own!r}"
        )
    return point


def _is_place_of(name: str, value: str) -> bool:
    """Return whether the object at `value` (`module:qualname`) may be declared as `name`: both in the same package."""
    module, _, qualname = value.partition(":")
    return name == f"{module}.{qualname}" or (
        name.endswith(f".{qualname}") and name.partition(".")[0] == module.partition(".")[0]
    )


def _get_owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an unnamed distribution"


@cache
def _load_declared(name: str) -> object:
    point = _get_declaration(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # import warnings of a library do not concern the document
            silence_imports()
            return point.load()
    except Exception as error:
        raise TargetError(f"{name!r}, declared by {_get_owner(point)}, cannot be loaded: {error}") from error


def _get_loaded(value: str) -> object:
    """Return the object of an entry point's value; `_NOTHING` if its module is not loaded."""
    module, _, attributes = value.partition(":")
    return _get_attribute(sys.modules.get(module, _NOTHING), attributes)


def _get_loaded_by_path(name: str) -> object:
    """Return the object at a dotted path; `_NOTHING` if no loaded module has it."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        if (module := sys.modules.get(".".join(parts[:split]))) is not None:
            return _get_attribute(module, ".".join(parts[split:]))
    return _NOTHING


def _get_attribute(obj: object, path: str) -> object:
    for part in path.split("."):
        # Not getattr: a module's __getattr__ may import other modules.
        obj = vars(obj).get(part, _NOTHING) if hasattr(obj, "__dict__") else _NOTHING
    return obj


_NOTHING = object()
