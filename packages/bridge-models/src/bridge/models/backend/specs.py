"""Resolve the layer specs of a configuration, and replace modules in a spec."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from bridge.config import ModelConfig
from bridge.models.errors import LayerSpecError

SpecT = TypeVar("SpecT")

LayerSpec = ModuleSpec | TransformerBlockSubmodules
"""The spec of one layer, which is repeated, or of the layers of one pipeline stage."""


def replace_modules(spec: SpecT, replace: Callable[[Any], Any]) -> SpecT:
    """Return a copy of a spec in which modules are replaced; ``spec`` is not changed.

    Args:
        spec: A ModuleSpec, or a part of one: a dataclass, a partial or a list.
        replace: Called with each part, outer ones first. It returns the part's replacement, or the part itself to
            continue with its own parts.
    """
    replacement: Any = replace(spec)
    if replacement is not spec:
        return cast(SpecT, replacement)
    if isinstance(spec, partial):
        keywords = {name: replace_modules(value, replace) for name, value in spec.keywords.items()}
        return cast(SpecT, partial(replace_modules(spec.func, replace), *spec.args, **keywords))
    if isinstance(spec, list):
        return cast(SpecT, [replace_modules(item, replace) for item in spec])
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        fields = [field.name for field in dataclasses.fields(spec) if field.init]
        return dataclasses.replace(spec, **{name: replace_modules(getattr(spec, name), replace) for name in fields})
    return spec


def resolve_spec(
    given: object, config: ModelConfig, *, field: str, kinds: tuple[type, ...], vp_stage: int | None = None
) -> Any:
    """Return a configuration's layer spec, calling it if it is a function.

    Args:
        given: The spec, or a function that returns it. The function takes the configuration or no argument, and
            optionally ``vp_stage`` by name.
        config: The argument for the function.
        field: The name of the field, for error messages.
        kinds: The accepted spec classes.
        vp_stage: Virtual pipeline stage, None without a virtual pipeline.

    Raises:
        LayerSpecError: The value is neither, or the function does not return a spec.
    """
    if isinstance(given, kinds):  # before callable(): a ModuleSpec is also callable
        return given
    if not callable(given):
        raise LayerSpecError(f"{field} is {given!r}: set it to a ModuleSpec, a function that returns one, or None")
    parameters = inspect.signature(given).parameters
    by_name = {"vp_stage": vp_stage} if "vp_stage" in parameters else {}
    spec: object = given(config, **by_name) if parameters else given()
    if not isinstance(spec, kinds):
        name = getattr(given, "__qualname__", repr(given))
        wanted = " or a ".join(kind.__name__ for kind in kinds)
        raise LayerSpecError(f"{field} {name} returned {spec!r}: it must return a {wanted}")
    return spec


def resolve_layer_spec(given: object, config: ModelConfig, *, field: str, vp_stage: int | None = None) -> LayerSpec:
    """Return a configuration's layer or block spec, see ``resolve_spec``.

    Raises:
        LayerSpecError: The value is neither a spec nor a function that returns one.
    """
    kinds = (ModuleSpec, TransformerBlockSubmodules)
    return cast(LayerSpec, resolve_spec(given, config, field=field, kinds=kinds, vp_stage=vp_stage))
