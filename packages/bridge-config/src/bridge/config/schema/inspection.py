"""Inspection of live objects: builds the Target that describes a class, function or value of this process."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
from collections.abc import Callable
from dataclasses import MISSING
from enum import Enum
from typing import (
    Annotated,
    Any,
    Literal,
    NewType,
    NotRequired,
    Required,
    TypeAliasType,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from bridge.config.schema.annotations import (
    ANYTHING,
    Anything,
    Choice,
    Class,
    Dtype,
    Fixed,
    Function,
    Instance,
    Items,
    ItemsKind,
    Mapping,
    Member,
    Plain,
    Type,
)
from bridge.config.schema.declaration import check_class
from bridge.config.schema.names import (
    GENERATION_CONFIG,
    MODEL_CONFIG,
    WRITE_THROUGH,
    get_base_names,
    get_qualified_name,
)
from bridge.config.schema.registry import get_document_name, get_document_names
from bridge.config.schema.registry_state import descriptions, get_accepted_config
from bridge.config.schema.table import get_shipped
from bridge.config.schema.target import Field, Target
from bridge.config.schema.versions import Schema, load_declared_schema

# Serializable classes that are not dataclasses: constructor argument -> attribute that holds it.
# Keyed by name, since importing megatron-core here would take seconds.
PLAIN_CLASSES: dict[str, dict[str, str]] = {
    "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout": {
        "layout": "input_data",
        "pipeline_model_parallel_size": "pipeline_model_parallel_size",
    },
    "megatron.core.quantization.quant_config.RecipeConfig": {"matchers": "matchers", "config_dict": "configs"},
    "megatron.core.quantization.quant_config.GlobMatcher": {"pattern": "pattern", "config_key": "config_key"},
}

# Classes whose constructor takes any keyword, and the method that returns those keywords.
OPEN_CLASSES = {GENERATION_CONFIG: "to_diff_dict"}

# Fields that may be None although megatron-core 0.19.2 does not annotate them so: its code checks them with `is None`.
NULLABLE_FIELDS: dict[str, frozenset[str]] = {
    "megatron.core.transformer.transformer_config.MLATransformerConfig": frozenset({"q_lora_rank"}),
}

# Fields that name a file which the constructor reads, unless the other field holds its content.
FILE_FIELDS: dict[str, dict[str, str]] = {
    "megatron.core.transformer.heterogeneous.heterogeneous_config.HeterogeneousTransformerConfig": {
        "heterogeneous_layers_config_path": "heterogeneous_layers_config_encoded_json"
    }
}

_MODULE_SPEC = "megatron.core.transformer.spec_utils.ModuleSpec"

TargetOf = Callable[[str], Target | None]
"""Looks up the description of a dotted name; None if unknown."""


def describe(obj: object, name: str | None = None) -> Target:
    """Return the description of `obj`.

    Args:
        obj: a class, dtype, function or other value.
        name: its name in documents; by default the one that `get_document_name` returns. Ignored for classes.
    """
    if isinstance(obj, type):
        if obj not in descriptions:
            descriptions[obj] = _describe_class(obj)
        return descriptions[obj]
    name = name or get_document_name(obj) or repr(obj)
    if is_dtype(type(obj)):
        return Target(str(obj), "dtype", obj=obj)
    if callable(obj):
        return Target(name, "function", obj=obj)
    return Target(name, "value", bases=get_document_names(type(obj)), obj=obj)


def describe_annotated(member: Instance) -> Target | None:
    """Return the description of an annotated class; None if it is neither live nor in the shipped table."""
    return describe(member.cls) if member.cls is not None else get_shipped(member.name)


def find_config(value: collections.abc.Mapping[str, Any], type_: Type, named: TargetOf) -> Target | None:
    """Return the config class that a mapping describes; None if it is unknown or ambiguous.

    The class is the one that `_target_` names, or without `_target_` the only config class in `type_`.

    Args:
        value: the mapping.
        type_: the type of the field that holds it.
        named: looks up the description of a name.
    """
    if "_target_" in value:
        name = value["_target_"]
        own = [
            _find_annotated(member, named) for member in type_ if isinstance(member, Instance) and member.name == name
        ]
        found = own or ([named(name)] if isinstance(name, str) else [])
    else:
        found = [_find_annotated(member, named) for member in type_ if isinstance(member, Instance)]
    configs = [target for target in found if target is not None and target.kind == "config"]
    return configs[0] if len(configs) == 1 else None


def _find_annotated(member: Instance, named: TargetOf) -> Target | None:
    """Return the description of an annotated class. Annotations are trusted: the class need not be registered."""
    return describe_annotated(member) or named(member.name)


def is_dtype(cls: type) -> bool:
    """Return whether `cls` is torch.dtype, without importing torch."""
    return get_qualified_name(cls) == "torch.dtype"


def parse_annotation(hint: Any) -> Type:
    """Convert the annotation `hint` to plain data, in the order in which alternatives are tried."""
    members = dict.fromkeys(_parse_hint(hint))
    if Class() in members and any(isinstance(one, Instance) and one.name == _MODULE_SPEC for one in members):
        # megatron-core 0.19.2 annotates parts of layers with `ModuleSpec | type`, and puts functions there too.
        members[Function()] = None
    return tuple(sorted(members, key=_rank)) or ANYTHING


def _describe_class(cls: type) -> Target:
    name, bases = get_document_name(cls) or cls.__name__, get_document_names(cls)
    if issubclass(cls, Enum):
        return Target(name, "enum", bases=bases, members=tuple(cls.__members__), obj=cls)
    if (accepts := get_accepted_config(cls)) is not None:
        return Target(name, "builder", bases=bases, accepts=get_document_name(accepts), obj=cls)
    fields = _describe_fields(cls)
    if fields is None:
        return Target(name, "class", bases=bases, obj=cls)
    check_class(cls)
    own = getattr(cls, "schema", Schema() if MODEL_CONFIG in bases else None)
    return Target(
        name,
        "config",
        bases=bases,
        fields=fields,
        open=name in OPEN_CLASSES,
        files={name: content for base in bases for name, content in FILE_FIELDS.get(base, {}).items()},
        calls=any("__call__" in vars(base) for base in cls.__mro__),
        embeds=cls._embeds if WRITE_THROUGH in bases else None,  # type: ignore[attr-defined]
        builder=getattr(cls, "builder", None) if dataclasses.is_dataclass(cls) else None,
        schema=own if isinstance(own, Schema) else load_declared_schema(name),
        positional=_get_positional(cls),
        hashed=_get_compared_fields(cls),
        obj=cls,
    )


def _get_positional(cls: type) -> tuple[str, ...]:
    if not dataclasses.is_dataclass(cls):
        return ()
    # Not the fields: a class may define its own __init__.
    _, *arguments = inspect.signature(cls.__init__).parameters.values()
    by_position = all(one.kind is one.POSITIONAL_OR_KEYWORD for one in arguments)
    return tuple(one.name for one in arguments) if by_position else ()


def _get_compared_fields(cls: type) -> tuple[str, ...] | None:
    """Return the value of `Target.hashed` for `cls`."""
    if getattr(cls, "__hash__", None) is None:
        return None
    if issubclass(cls, tuple):
        return tuple(cls._fields)  # type: ignore[attr-defined]
    parameters = getattr(cls, "__dataclass_params__", None)
    if parameters is None or not parameters.eq or not (parameters.frozen or parameters.unsafe_hash):
        return ()  # by identity, or by a custom method that we cannot inspect
    return tuple(one.name for one in dataclasses.fields(cls) if one.compare)  # type: ignore[arg-type]


def _describe_fields(cls: type) -> dict[str, Field] | None:
    """Return the fields of a dataclass, named tuple, typed dict or class of `PLAIN_CLASSES`; None for other classes."""
    if dataclasses.is_dataclass(cls):
        hints = _resolve_hints(cls)
        nullable = {name for base in get_base_names(cls) for name in NULLABLE_FIELDS.get(base, ())}
        given = cls.__dataclass_fields__
        kept = {f.name for f in dataclasses.fields(cls)}
        return {
            name: _make_dataclass_field(f, hints[name], nullable=name in nullable, kept=name in kept)
            for name, f in given.items()
            if name in kept or isinstance(hints[name], dataclasses.InitVar)
        }
    if is_typeddict(cls):
        return {name: _make_item_field(cls, name, hint) for name, hint in _resolve_hints(cls).items()}
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        hints = _resolve_hints(cls)
        return {name: _make_tuple_field(cls, name, parse_annotation(hints.get(name, Any))) for name in cls._fields}
    if get_qualified_name(cls) in OPEN_CLASSES:
        return {}
    attributes = PLAIN_CLASSES.get(get_qualified_name(cls) or "")
    if attributes is None:
        return None
    hints = _resolve_hints(cls.__init__)  # type: ignore[misc]
    parameters = inspect.signature(cls).parameters
    return {
        name: Field(
            name,
            parse_annotation(hints.get(name, Any)),
            required=parameters[name].default is inspect.Parameter.empty,
            attribute=attribute,
        )
        for name, attribute in attributes.items()
    }


def _make_item_field(cls: Any, name: str, hint: Any) -> Field:
    """Return the field for a key of a typed dict.

    `__required_keys__` is wrong for string annotations, which hide `NotRequired`: check the hint first.
    """
    origin = get_origin(hint)
    required = origin is Required or (origin is not NotRequired and name in cls.__required_keys__)
    return Field(name, parse_annotation(hint), required=required)


def _make_tuple_field(cls: Any, name: str, type_: Type) -> Field:
    if name not in cls._field_defaults:
        return Field(name, type_, required=True, attribute=name)
    return Field(name, type_, attribute=name, make_default=lambda: cls._field_defaults[name])


def _make_dataclass_field(f: dataclasses.Field[Any], hint: Any, *, nullable: bool, kept: bool) -> Field:
    # megatron-core 0.19.2 declares `pipeline_dtype: torch.dtype = None`: accept None wherever it is the default.
    type_ = parse_annotation(Union[hint, None] if nullable or f.default is None else hint)  # noqa: UP007  (a hint may not support |)
    required = f.init and f.default is f.default_factory is MISSING
    return Field(
        f.name, type_, required=required, init=f.init, attribute=f.name, kept=kept, make_default=_get_default_factory(f)
    )


def _get_default_factory(f: dataclasses.Field[Any]) -> Callable[[], Any] | None:
    if f.default_factory is not MISSING:
        return f.default_factory
    return None if f.default is MISSING else lambda: f.default


def _resolve_hints(obj: Any) -> dict[str, Any]:
    """Return the type hints of `obj`. Names that cannot be resolved (imported under TYPE_CHECKING) become Any."""
    unresolved: dict[str, Any] = {}
    while True:
        try:
            return get_type_hints(obj, localns=dict(unresolved), include_extras=True)
        except NameError as error:
            if error.name is None or error.name in unresolved:
                raise
            unresolved[error.name] = Any


def _parse_hint(hint: Any) -> list[Member]:
    hint = _unwrap(hint)
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return [member for arg in args for member in _parse_hint(arg)]
    if origin is Literal:
        return _parse_literal(args)
    if origin is Callable or origin is collections.abc.Callable:
        return [Function()]
    if origin is type:
        bound = args[0] if args and isinstance(args[0], type) and args[0] is not object else None
        return [Class(get_document_name(bound) if bound else None, bound)]
    if hint in _PLAIN:
        return [_PLAIN[hint]]
    if origin in _ITEMS:
        if origin is tuple and args and args[-1] is not Ellipsis:
            return [Fixed(tuple(map(parse_annotation, args)))]
        return [Items(kind, parse_annotation(args[0]) if args else ANYTHING) for kind in _ITEMS[origin]]
    if origin in (dict, collections.abc.Mapping, collections.abc.MutableMapping):
        key, value = map(parse_annotation, args or (Any, Any))
        return [Mapping(key, value)]
    if getattr(origin, "_is_protocol", False) and "__call__" in vars(origin):
        return [Function()]
    if getattr(origin, "_is_protocol", False) and not getattr(origin, "_is_runtime_protocol", False):
        return [Anything()]
    if isinstance(origin, type) and origin not in (Any, object):
        return [Dtype() if is_dtype(origin) else Instance(get_document_name(origin) or origin.__name__, origin)]
    return [Anything()]  # Any, object or an unbound TypeVar: nothing to check


def _parse_literal(values: tuple[Any, ...]) -> list[Member]:
    """Return the members for a `Literal`: one Choice of plain values, and an Instance per enum."""
    found: list[Member] = []
    if plain := tuple(value for value in values if not isinstance(value, Enum)):
        found.append(Choice(plain))
    for enum in dict.fromkeys(type(value) for value in values if isinstance(value, Enum)):
        names = tuple(value.name for value in values if isinstance(value, enum))
        found.append(Instance(get_document_name(enum) or enum.__name__, enum, names))
    return found


_PLAIN: dict[Any, Member] = {
    bool: Plain("bool"),
    int: Plain("int"),
    float: Plain("float"),
    str: Plain("str"),
    type(None): Plain("null"),
}
_ITEMS: dict[Any, tuple[ItemsKind, ...]] = {
    list: ("list",),
    tuple: ("tuple",),
    set: ("set",),
    frozenset: ("frozenset",),
    collections.abc.Sequence: ("list", "tuple"),
    collections.abc.MutableSequence: ("list",),
    collections.abc.Iterable: ("list", "tuple", "set", "frozenset"),
    collections.abc.Collection: ("list", "tuple", "set", "frozenset"),
    collections.abc.Set: ("set", "frozenset"),
    collections.abc.MutableSet: ("set",),
}


def _rank(member: Member) -> int:
    """Return the sort key of an alternative, which gives the order of trial when reading and of mention in messages.

    Plain values come first, then named things, then containers, then Any; null comes last.
    """
    if isinstance(member, Plain):
        return 0 if member.kind != "null" else 7
    if isinstance(member, Items) and member.kind == "list":
        return 3  # before tuple and set: JSON writes all three as a list
    ranks: dict[type, int] = {Choice: 1, Dtype: 2, Instance: 2, Function: 2, Class: 2, Anything: 6}
    return ranks.get(type(member), 4)


def _unwrap(hint: Any) -> Any:
    """Return `hint` without wrappers such as Annotated, Required, InitVar, NewType, type aliases and bound TypeVars."""
    while True:
        if get_origin(hint) in (Annotated, Required, NotRequired):
            hint = get_args(hint)[0]
        elif isinstance(hint, dataclasses.InitVar):
            hint = hint.type
        elif isinstance(hint, NewType):
            hint = hint.__supertype__
        elif isinstance(hint, TypeAliasType):
            hint = hint.__value__
        elif isinstance(hint, TypeVar) and hint.__bound__ is not None:
            hint = hint.__bound__
        else:
            return hint
