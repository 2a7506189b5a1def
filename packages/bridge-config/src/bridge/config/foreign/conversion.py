"""Conversion, the base class of the conversions from other systems."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from bridge.config.foreign.names import ENUMS, HETEROGENEOUS, MLA, SET_BY_TRAINING_LOOP, TRANSFORMER, YARN
from bridge.config.migration import Migration
from bridge.config.paths import Path
from bridge.config.schema.annotations import Dtype, Function, Plain, Type, get_inner_type
from bridge.config.schema.names import GENERATION_CONFIG
from bridge.config.schema.table import get_shipped, get_shipped_dtypes
from bridge.config.schema.target import Field, Target
from bridge.config.write.notation import encode_enum_member, encode_named

_NAMES = {
    # Built-in functions of torch report internal modules as `__module__`.
    "torch._C._nn.gelu": "torch.nn.functional.gelu",
    "torch._C._nn.softplus": "torch.nn.functional.softplus",
    "torch._VariableFunctionsClass.tanh": "torch.tanh",
    "torch._VariableFunctionsClass.sigmoid": "torch.sigmoid",
    "torch.nn.functional.tanh": "torch.tanh",
    "torch.nn.functional.sigmoid": "torch.sigmoid",
}
_ACTIVATIONS = {"relu2": "squared_relu", "gelu_pytorch_tanh": "fast_gelu"}
_RUNTIME = frozenset((*SET_BY_TRAINING_LOOP, "pre_wrap_hooks", "post_wrap_hooks"))
_HETEROGENEOUS_FIELDS = ("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json")


class Conversion:
    """Converts another system's model to a Bridge document."""

    def __init__(self, target: str, at: Path, names: Mapping[str, str] | None = None) -> None:
        """Start an empty document.

        Args:
            target: Name of the configuration class of the result.
            at: Path of the model in the original document.
            names: Bridge's names of the other system's classes and functions.
        """
        self.at = at
        self.result = Migration({}, moves=[((), at)] if at else [])
        self.top: dict[str, Any] = {"_target_": target}
        self.transformer: dict[str, Any] = {}
        self._names = {**_NAMES, **(names or {})}
        self._left_out: dict[str, list[str]] = {}

    def finish(self) -> Migration:
        """Return the document, with its notes and problems."""
        for why, names in self._left_out.items():
            self.note(f"left out, {why}: {', '.join(names)}")
        self.result.data = self.top
        return self.result

    def note(self, text: str) -> None:
        """Add a note."""
        self.result.notes.append(text)

    def refuse(self, path: Path, message: str) -> None:
        """Record a problem with the value at `path`."""
        self.result.problems.append((path, message))

    def record_move(self, new_path: Path, old_path: Path) -> None:
        """Record that the value at `new_path` was at `old_path` in the original."""
        self.result.moves.append((new_path, old_path))

    def leave_out(self, why: str, path: Path) -> None:
        """Note that the value at `path` is left out. Values with the same reason share a note."""
        self._left_out.setdefault(why, []).append(".".join(str(step) for step in path[len(self.at) :]))

    def convert_field(self, where: dict[str, Any], field: Field, value: Any, path: Path) -> None:
        """Set `where[field.name]` to the converted value, or leave the value out."""
        if field.name in _RUNTIME:
            if value:
                self.leave_out("set by the training loop", path)
        elif field.name.startswith("_") or not field.init:
            self.leave_out("private or computed", path)
        elif value is None and _allows_only(field.type, "bool"):  # a flag without a value is off
            where[field.name] = False
        elif field.name == "activation_func" and isinstance(value, str):
            where[field.name] = _ACTIVATIONS.get(value, self.rename(value))
        else:
            where[field.name] = self._convert_value(value, field.type)

    def handle_unknown(self, key: str, value: Any, path: Path) -> None:
        """Leave out a value without a field in Bridge, or refuse it if it may affect the model."""
        if str(key).startswith("_"):
            self.leave_out("private or computed", path)
        elif is_off(value):
            self.leave_out("disabled and unknown to Bridge", path)
        else:
            self.refuse(path, "unknown to Bridge: remove it if it does not affect the model")

    def rename(self, name: Any) -> Any:
        """Return Bridge's name of a class or function; return other values unchanged."""
        return self._names.get(name, name) if isinstance(name, str) else name

    def _convert_value(self, value: Any, type_: Type) -> Any:
        """Convert a value, either written or a live Python object. Names are written alone where a document may."""
        if isinstance(value, Enum):
            enum = f"{type(value).__module__}.{type(value).__qualname__}"
            return self._convert_value({"_target_": enum, "_name_": value.name}, type_)
        if isinstance(value, float) and value.is_integer() and _allows_only(type_, "int"):
            return int(value)
        if isinstance(value, list):
            return [self._convert_value(item, get_inner_type(type_)) for item in value]
        if not isinstance(value, dict):
            return encode_named(str(value), Dtype(), type_) if _is_dtype(value) else value
        name = value.get("_target_")
        if not isinstance(name, str):
            return {key: self._convert_value(item, get_inner_type(type_)) for key, item in value.items()}
        if name == f"{GENERATION_CONFIG}.from_dict":
            settings = value.get("config_dict")
            kept = (
                {key: item for key, item in settings.items() if str(key)[:1] != "_"}
                if isinstance(settings, dict)
                else {}
            )
            return {"_target_": GENERATION_CONFIG, **kept}
        name = self.rename(name)
        if value.get("_callable_") is True or (value.keys() == {"_target_", "_call_"} and value["_call_"] is False):
            is_dtype = name.removeprefix("torch.") in get_shipped_dtypes()
            return encode_named(name, Dtype() if is_dtype else Function(), type_)
        target = get_shipped(name)
        if target is not None and (member := _find_enum_member(target, value)) is not None:
            return encode_enum_member(member, target, type_)
        return {"_target_": name} | {
            key: self._convert_value(item, ())
            for key, item in value.items()
            if key != "_target_" and not (key == "_call_" and item is True) and not (key == "_args_" and item == [])
        }


def choose_transformer(data: Mapping[str, Any], cls: Any = None) -> Any:
    """Return the name of a transformer class with the fields in `data`: `cls`, or one that adds what `cls` lacks."""
    if cls is None and data.get("multi_latent_attention"):
        cls = MLA
    if cls is None and any(data.get(key) for key in _HETEROGENEOUS_FIELDS):
        return HETEROGENEOUS
    if cls in (None, TRANSFORMER) and any(data[key] is not None for key in data if str(key).startswith("yarn_")):
        return YARN
    return cls or TRANSFORMER


def is_off(value: object) -> bool:
    """Return whether a value means that a feature is off."""
    return value is None or value is False or value in ("", [], {})


def _find_enum_member(target: Target, value: Mapping[str, Any]) -> str | None:
    """Return the enum member that a call such as `{_target_: Color, _args_: [1]}` creates; None if unknown."""
    if target.kind != "enum":
        return None
    match value:
        case {"_name_": str(member)}:
            return member
        case {"_args_": [str(member)]} if member in target.members:
            return member
        case {"_args_": [int(number)]} if target.name.startswith(ENUMS) and 0 < number <= len(target.members):
            return target.members[number - 1]
    return None


def _allows_only(type_: Type, kind: str) -> bool:
    """Return whether `kind` is the only plain kind that a type allows, strings aside."""
    return {member.kind for member in type_ if isinstance(member, Plain)} - {"str"} == {kind}


def _is_dtype(value: object) -> bool:
    return type(value).__module__ == "torch" and type(value).__name__ == "dtype"
