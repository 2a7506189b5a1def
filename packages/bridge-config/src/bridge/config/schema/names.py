"""Dotted names of classes and functions.

Classes are recognized by the names of their base classes, so that nothing has to be imported to recognize one.
"""

from __future__ import annotations

MODEL_CONFIG = "bridge.config.model.ModelConfig"
WRITE_THROUGH = "bridge.config.writethrough.WriteThrough"
SCHEMA = "bridge.config.schema.versions.Schema"
GENERATION_CONFIG = "transformers.generation.configuration_utils.GenerationConfig"


def get_qualified_name(obj: object) -> str | None:
    """Return `module.qualname` of a class or function; None if `obj` has no such name."""
    module = getattr(obj, "__module__", None)
    qualname = getattr(obj, "__qualname__", None)
    return f"{module}.{qualname}" if isinstance(module, str) and isinstance(qualname, str) else None


def get_base_names(cls: type) -> tuple[str, ...]:
    """Return the dotted names of the classes in the MRO of `cls`, itself first, without `object`."""
    return tuple(name for base in cls.__mro__ if base is not object and (name := get_qualified_name(base)))
