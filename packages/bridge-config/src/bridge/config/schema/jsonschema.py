"""JSON Schemas of configuration documents, for editors and other tools, made from the shipped table alone.

A schema covers the current version of documents and the names in the table; there it accepts whatever the checker
(`bridge.config.read.decode.check`) accepts. Some rules cannot be expressed in JSON Schema and are left to the checker:
1.0 is not an integer here, names must be authorized, and fields must be consistent with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING
from typing import Any

from bridge.config.errors import TargetError, did_you_mean, quote_name
from bridge.config.schema.annotations import (
    Anything,
    Choice,
    Class,
    Dtype,
    Fixed,
    Function,
    Instance,
    Items,
    Mapping,
    Member,
    Plain,
    Type,
)
from bridge.config.schema.arithmetic import NEEDED_SIZES
from bridge.config.schema.names import MODEL_CONFIG
from bridge.config.schema.ranges import TRANSFORMER, Range, get_ranges
from bridge.config.schema.table import get_shipped, get_shipped_dtypes, list_shipped_names
from bridge.config.schema.target import Field, Target, is_model
from bridge.config.schema.versions import VERSION_KEY

Json = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TEXT: Json = {"type": "string"}
_JSON_TYPES = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "null": "null"}


def _make_bounds(allowed: Range) -> Json:
    bounds = {
        "exclusiveMinimum" if allowed.exclusive else "minimum": allowed.minimum,
        "maximum": allowed.maximum,
    }
    return {key: value for key, value in bounds.items() if value is not None}


def list_schema_targets() -> dict[str, str]:
    """Return the configs that have a schema, model configs first: dotted name -> one-line description."""
    found = sorted(_list_configs(), key=lambda target: (not is_model(target), target.name))
    return {target.name: target.doc for target in found}


def make_json_schema(name: str) -> Json:
    """Return the JSON Schema (draft 2020-12) for documents of the config class `name`.

    Raises:
        TargetError: The shipped table has no config with this name.
    """
    target = get_shipped(name)
    if target is None or target.kind != "config":
        near = did_you_mean(name, list_schema_targets()) or "; `bridge schema` lists those that have one"
        raise TargetError(f"{quote_name(name)} is not a config with a schema{near}")
    definitions = _Definitions()
    schema = definitions.make_mapping(target)
    schema["properties"] |= _make_top_keys(target)
    schema["required"] = ["_target_", *schema["required"]]
    return {"$schema": _DIALECT, **schema, "$defs": definitions.schemas}


def _make_top_keys(target: Target) -> Json:
    """Return the schemas of the keys that only the top level of a document has: `_builder_` and `_omitted_`."""
    keys: Json = {}
    if is_model(target):
        about = "The ModelBuilder that builds this model; defaults to the builder of its class."
        names = [one.name for one in _list_targets() if one.kind == "builder" and one.accepts in target.bases]
        keys["_builder_"] = {"description": about, **_make_suggestion(names)}
    entry = _make_closed({"path": _TEXT, "reason": _TEXT})
    keys["_omitted_"] = {
        "description": "Values that were left out because they cannot be written.",
        "type": "array",
        "items": entry,
    }
    return keys


class _Definitions:
    """The `$defs` of one schema. Each class, and each form that several fields share, is defined once."""

    def __init__(self) -> None:
        self.schemas: Json = {}
        self._keys: dict[str, str] = {}

    def make_mapping(self, target: Target) -> Json:
        """Return the schema of a mapping that describes an instance of the config `target`."""
        embedded = _find_configs(target.fields[target.embeds].type) if target.embeds else []
        # Fields that every embeddable config owns are never allowed here. Fields that only some of them own are allowed
        # or not depending on the embedded config of the document: these become the rules in `allOf`.
        elsewhere = set.intersection(*(set(one.fields) for one in embedded)) if embedded else set()
        own = [field for field in target.fields.values() if field.name not in elsewhere]
        ranges = get_ranges(target.bases)
        needed = NEEDED_SIZES if TRANSFORMER in target.bases else ()
        schema: Json = {
            "title": target.short_name,
            "description": target.doc,
            "type": "object",
            "properties": _make_heading(target)
            | {field.name: self._make_field(field, ranges.get(field.name)) for field in own},
            "required": [field.name for field in own if field.required or field.name in needed],
            "additionalProperties": target.open,
        }
        if target.embeds and (
            rules := [rule for one in embedded if (rule := _make_owner_rule(own, one, at=target.embeds))]
        ):
            schema["allOf"] = rules
        return schema

    def _make_field(self, field: Field, allowed: Range | None) -> Json:
        about: Json = {"description": field.doc} if field.doc else {}
        if not field.init:  # computed by the class: written for readers, ignored on input
            return about | {"readOnly": True}
        if field.default is not MISSING:
            about["default"] = field.default
        return about | self._make_type(field.type) | (_make_bounds(allowed) if allowed else {})

    def _make_type(self, type_: Type) -> Json:
        if Anything() in type_:
            return {}
        forms = [form for member in type_ for form in self._list_forms(member)]
        # Merge plain alternatives for readable errors: {"type": ["integer", "null"]}.
        plain = [form["type"] for form in forms if form.keys() == {"type"}]
        others = [form for form in forms if form.keys() != {"type"}]
        if plain:
            others.insert(0, {"type": plain[0] if len(plain) == 1 else plain})
        return others[0] if len(others) == 1 else {"anyOf": others}

    def _list_forms(self, member: Member) -> list[Json]:
        """Return a schema for each way to write a value of `member`."""
        match member:
            case Plain("float"):
                return [{"type": "number"}, self._make_long_form("float")]
            case Plain(kind):
                return [{"type": _JSON_TYPES[kind]}]
            case Choice(values):
                return [{"enum": list(values)}]
            case Items(kind, item):
                return [{"type": "array", "items": self._make_type(item)}, self._make_long_form(kind)]
            case Fixed(items):
                return [self._make_fixed(items), self._make_long_form("tuple")]
            case Mapping(_, value):
                entries = {"type": "object", "properties": {"_target_": False}}
                return [entries | {"additionalProperties": self._make_type(value)}, self._make_long_form("dict")]
            case Dtype():
                return [self._make_dtype()]
            case Function():
                return [self._get_function()]
            case Class():
                return [_TEXT, self._make_named()]
            case Instance(name):
                return [self._make_instance(name)]
            case Anything():
                return [{}]

    def _make_fixed(self, items: tuple[Type, ...]) -> Json:
        size = len(items)
        prefix = [self._make_type(item) for item in items]
        return {"type": "array", "prefixItems": prefix, "items": False, "minItems": size, "maxItems": size}

    def _make_long_form(self, kind: str) -> Json:
        """Return the schema of a built-in written out, such as {_target_: builtins.tuple, _args_: [[1, 2]]}."""
        kinds = dict.fromkeys([kind] if kind in ("float", "dict") else [kind, "list"])
        target = {"enum": [f"builtins.{one}" for one in kinds]}
        args = {"type": "array", "minItems": 1, "maxItems": 1}
        return self._define(f"builtin-{kind}", lambda: _make_closed({"_target_": target, "_args_": args}))

    def _make_named(self) -> Json:
        """Return the schema of `{_target_: name, _call_: false}`, for fields where a bare name would be a string."""
        return self._define("itself", lambda: _make_closed({"_target_": _TEXT, "_call_": {"const": False}}))

    def _make_dtype(self) -> Json:
        names = sorted(get_shipped_dtypes())
        known = {"enum": [*(f"torch.{name}" for name in names), *names]}
        return self._define("dtype", lambda: {"title": "dtype", "anyOf": [known, self._make_named()]})

    def _get_function(self) -> Json:
        return self._define("function", self._make_function)

    def _make_function(self) -> Json:
        names = [
            name for name in list_shipped_names() if (one := get_shipped(name)) is not None and one.kind == "function"
        ]
        name = self._define("function-name", lambda: _make_suggestion(names))
        partial = _make_closed({"_target_": name, "_partial_": {"const": True}})
        partial["properties"]["_args_"] = {"type": "array"}
        partial["patternProperties"] = {"^[^_]": {}}
        return {"title": "function", "anyOf": [name, self._make_named(), partial]}

    def _make_instance(self, name: str) -> Json:
        target = get_shipped(name)
        if target is not None and target.kind == "enum":
            return self._define(name, lambda: _make_enum(target))
        if configs := _find_configs((Instance(name),)):
            return self._make_one_of(configs, bare=target)
        return self._make_named()

    def _make_one_of(self, configs: list[Target], *, bare: Target | None) -> Json:
        """Return the schema of a mapping that describes one of `configs`. Without `_target_` it describes `bare`."""
        schema: Json = self._define_config(bare) if bare in configs else {"required": ["_target_"]}
        if configs == [bare]:
            return schema
        # Use if/then/else instead of `anyOf`, so that validators report errors for the class that `_target_` names.
        for config in configs:
            if config is not bare:
                schema = {"if": _match_target(config), "then": self._define_config(config), "else": schema}
        return {"type": "object", "properties": {"_target_": {"enum": [config.name for config in configs]}}} | schema

    def _define_config(self, target: Target) -> Json:
        return self._define(target.name, lambda: self.make_mapping(target))

    def _define(self, name: str, make: Callable[[], Json]) -> Json:
        """Return a reference to the definition `name`, calling `make` on first use."""
        if name not in self._keys:
            short = name.rpartition(".")[2]
            key = self._keys[name] = name if short in self.schemas else short
            self.schemas[key] = {}  # reserve the key before the call: a config may refer to itself
            self.schemas[key] = make()
        return {"$ref": f"#/$defs/{self._keys[name]}"}


def _list_targets() -> list[Target]:
    """Return every target in the table, each once although aliases repeat it."""
    found = {target.name: target for name in list_shipped_names() if (target := get_shipped(name)) is not None}
    return list(found.values())


def _list_configs() -> list[Target]:
    return [target for target in _list_targets() if target.kind == "config" and target.name != MODEL_CONFIG]


def _find_configs(type_: Type) -> list[Target]:
    """Return the configs that a field of this type accepts; those that the annotation names come first."""
    names = [member.name for member in type_ if isinstance(member, Instance)]
    found = [config for config in _list_configs() if not set(names).isdisjoint(config.bases)]
    return sorted(found, key=lambda config: (config.name not in names, config.name))


def _make_heading(target: Target) -> Json:
    keys: Json = {"_target_": {"description": target.doc, "const": target.name}}
    if target.schema is not None:
        about = "Schema version of this config."
        keys[VERSION_KEY] = {"description": about, "const": target.schema.version}
    return keys


def _make_enum(target: Target) -> Json:
    names = {"enum": list(target.members)}
    long_form = _make_closed({"_target_": {"const": target.name}, "_name_": names})
    long_form["properties"]["_args_"] = {}  # Megatron Bridge writes the member's value too
    return {"title": target.short_name, "description": target.doc, "anyOf": [names, long_form]}


def _make_owner_rule(fields: list[Field], config: Target, *, at: str) -> Json:
    """Return the rule that forbids the `fields` that `config`, embedded under `at`, owns; empty if there are none."""
    owned = [field.name for field in fields if field.name in config.fields]
    embedded = {"properties": {at: _match_target(config)}, "required": [at]}
    return {"if": embedded, "then": {"properties": dict.fromkeys(owned, False)}} if owned else {}


def _match_target(config: Target) -> Json:
    return {"type": "object", "properties": {"_target_": {"const": config.name}}, "required": ["_target_"]}


def _make_suggestion(names: Sequence[str]) -> Json:
    """Return the schema of a name: editors complete `names`, but any other registered name is allowed too."""
    return {"anyOf": [{"enum": sorted(names)}, _TEXT]} if names else _TEXT


def _make_closed(properties: Json) -> Json:
    """Return the schema of a mapping with exactly these keys."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
