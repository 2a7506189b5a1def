"""Read and write `run_config.yaml`, which megatron.training and Megatron Bridge store with checkpoints.

The model is in the section `model`, or is the whole document. Values that a form cannot express are listed by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from bridge.config.errors import DocumentError, Problem
from bridge.config.foreign import megatron_training
from bridge.config.foreign.families import FAMILIES, HYBRID_FAMILY
from bridge.config.foreign.names import ENUMS, EXTENDED
from bridge.config.migration import Migration
from bridge.config.paths import Path
from bridge.config.schema.annotations import (
    Anything,
    Choice,
    Class,
    Dtype,
    Fixed,
    Function,
    Instance,
    Items,
    Plain,
    Type,
    get_inner_type,
)
from bridge.config.schema.inspection import find_config
from bridge.config.schema.table import get_shipped, get_shipped_aliases, get_shipped_dtypes
from bridge.config.schema.target import Target

_FOREIGN_PREFIXES = ("megatron.training.", "megatron.bridge.")
# Fields that no configuration of megatron.training has or writes, and the values at which nothing is lost.
_BRIDGE_ONLY_FIELDS: dict[str, Any] = {
    "hf_model_id": None,
    "generation_config": None,
    "pre_wrap_hooks": [],
    "post_wrap_hooks": [],
}


def read_run_config(data: object) -> Migration | None:
    """Convert a `run_config.yaml`, or its model section alone; return None for any other document.

    Raises:
        DocumentError: Bridge has no configuration for the model.
    """
    found = _find_model(data)
    return megatron_training.convert(*found) if found is not None else None


def _find_model(data: object) -> tuple[dict[str, Any], Path, list[str]] | None:
    """Return the model in a `run_config.yaml`, its path, and the names of the other sections."""
    if not isinstance(data, dict):
        return None
    model = data.get("model")
    if _is_foreign(model) and ("_target_" not in data or _is_foreign(data)):
        return model, ("model",), [str(key) for key in data if key not in ("model", "_target_")]
    return (data, (), []) if _is_foreign(data) else None


def _is_foreign(data: object) -> TypeGuard[dict[str, Any]]:
    name = data.get("_target_") if isinstance(data, dict) else None
    return isinstance(name, str) and name.startswith(_FOREIGN_PREFIXES)


def to_run_config(data: Mapping[str, Any]) -> Migration:
    """Convert a GPT or hybrid document to the `model` section of a `run_config.yaml`.

    Values that megatron.training and Megatron Bridge cannot express are left out and listed in the notes.

    Args:
        data: A document without problems, in canonical form.

    Raises:
        DocumentError: megatron.training has no such model.
    """
    family = next((one for one in FAMILIES if one.megatron_configs and data.get("_target_") == one.config), None)
    model = get_shipped(family.config) if family else None
    if family is None or model is None:
        known = " or ".join(one.config for one in FAMILIES if one.megatron_configs)
        raise DocumentError([Problem("$._target_", f"only {known} can be written for megatron.training")])
    builder = data.get("_builder_", family.builder)
    notes = []
    if builder != family.builder:
        notes.append(f"left out, specific to Bridge: the builder {builder}")
    section: dict[str, Any] = {"_target_": family.megatron_configs[0], "_builder_": family.megatron_builder}
    bridge_only_fields = _BRIDGE_ONLY_FIELDS | family.bridge_only_fields
    for key, value in data.items():
        if key in bridge_only_fields:
            if value != bridge_only_fields[key]:
                notes.append(f"left out, megatron.training has no field for it: {key}")
        elif (field := model.fields.get(key)) is not None and field.init:
            section[key] = _encode_value(value, field.type)
    if family is HYBRID_FAMILY:
        notes += _write_pattern(section)
    notes += _drop_extensions(section)
    notes += [f"left out, as in the document: {entry['path']}" for entry in data.get("_omitted_", ())]
    notes += [f"read by megatron.training as a list, not a tuple: {name}" for name in _find_tuples(data, model)]
    return Migration(section, notes=notes)


def _write_pattern(section: dict[str, Any]) -> list[str]:
    """Write the layer pattern, with the stage borders that megatron.training expects; return notes about it."""
    transformer = section["transformer"]
    given = section.get("hybrid_layer_pattern")
    main, slash, predictions = (given or "M" * transformer.get("num_layers", 0)).partition("/")
    ranks = transformer.get("pipeline_model_parallel_size", 1)
    virtual = transformer.get("virtual_pipeline_model_parallel_size") or 1
    # megatron-core 0.19.2 splits a pattern without borders evenly over ranks, but requires borders for virtual stages.
    # On a single rank it builds only the layers before the first border.
    if ranks == 1:
        main = main.replace("|", "")
    elif virtual > 1 and "|" not in main:
        size = max(1, len(main) // (ranks * virtual))
        main = "|".join(main[at : at + size] for at in range(0, len(main), size))
    section["hybrid_layer_pattern"] = main + slash + predictions
    return [] if section["hybrid_layer_pattern"] == given else [f"hybrid_layer_pattern: set to {main}"]


def _drop_extensions(section: dict[str, Any]) -> list[str]:
    """Replace Bridge's transformer in `section` by its base class in megatron-core; return notes about lost fields."""
    transformer = section["transformer"]
    base = get_shipped(EXTENDED.get(transformer["_target_"], ""))
    if base is None:
        return []
    lost = [key for key in transformer if key != "_target_" and key not in base.fields]
    section["transformer"] = {key: value for key, value in transformer.items() if key not in lost}
    section["transformer"]["_target_"] = base.name
    return [f"left out, megatron.training has no field for it: transformer.{key}" for key in lost]


def _encode_value(value: Any, type_: Type) -> Any:
    """Return a value of a valid document as megatron.training writes it."""
    if isinstance(value, str):
        return _encode_name(value, type_)
    if isinstance(value, list):
        return [_encode_value(item, get_inner_type(type_)) for item in value]
    if not isinstance(value, dict):
        return value
    if (target := find_config(value, type_, get_shipped)) is not None:
        return {"_target_": target.name} | {
            key: _encode_value(item, target.fields[key].type)
            for key, item in value.items()
            if key in target.fields and target.fields[key].init and not key.startswith("_")
        }
    match value:
        case {"_target_": str(name), "_name_": str(member)}:
            return _encode_enum(get_shipped(name), member)
        case {"_target_": "builtins.float", "_args_": [item]}:
            return float(item)
        case {"_target_": "builtins.dict", "_args_": [pairs]}:
            return {_encode_value(key, ()): _encode_value(item, ()) for key, item in pairs}
        case {"_target_": str(name), "_args_": [items]} if name.startswith("builtins."):
            return _encode_value(items, ())
        case {"_target_": str(name), "_partial_": True}:
            rest = {key: _encode_value(item, ()) for key, item in value.items() if key != "_target_"}
            return {"_target_": _resolve_alias(name), "_args_": [], **rest}
    return {key: _encode_value(item, get_inner_type(type_)) for key, item in value.items()}


def _encode_name(value: str, type_: Type) -> Any:
    """Return a name as megatron.training writes a value of this type."""
    for member in type_:
        match member:
            case Plain("str") | Anything():
                return value
            case Choice(values) if value in values:
                return value
            case Dtype() if (dtype := get_shipped_dtypes().get(value.removeprefix("torch."))) is not None:
                return {"_target_": dtype, "_call_": False}
            case Instance(name) if (enum := get_shipped(name)) is not None and value in enum.members:
                return _encode_enum(enum, value)
            case Function() | Class():
                return {"_target_": _resolve_alias(value), "_call_": False}
    return value


def _resolve_alias(name: str) -> str:
    return get_shipped_aliases().get(name, name)


def _encode_enum(target: Target | None, member: str) -> Any:
    """Return an enum member as megatron.training writes it."""
    if target is None or not target.name.startswith(ENUMS):
        # Without the member's value, the member is named as an attribute, which they can resolve too.
        return {"_target_": f"{target.name if target else ''}.{member}", "_call_": False}
    number = target.members.index(member) + 1
    return {"_target_": target.name, "_call_": True, "_args_": [number], "_name_": member}


def _find_tuples(data: Mapping[str, Any], target: Target) -> list[str]:
    """Return the fields whose value is a tuple."""
    found = []
    for key, value in data.items():
        type_ = target.fields[key].type if key in target.fields else ()
        if isinstance(value, dict):
            if (inner := find_config(value, type_, get_shipped)) is not None:
                found += [f"{key}.{name}" for name in _find_tuples(value, inner)]
            elif value.get("_target_") == "builtins.tuple":
                found.append(key)
        elif isinstance(value, list):
            kinds = {"tuple" if isinstance(m, Fixed) else m.kind for m in type_ if isinstance(m, (Fixed, Items))}
            if kinds == {"tuple"}:
                found.append(key)
    return found
