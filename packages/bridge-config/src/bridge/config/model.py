"""ModelConfig: the description of a model, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from bridge.config.errors import ConfigError, TargetError
from bridge.config.problems import describe_value
from bridge.config.schema import registered
from bridge.config.schema.declaration import check_class, check_definition
from bridge.config.schema.generation import FIELD as GENERATION_FIELD
from bridge.config.schema.generation import GenerationSettings
from bridge.config.schema.names import qualified_name

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

    from bridge.config.schema.versions import Schema


@dataclass
class ModelConfig:
    """Base of all model configurations: pure data, built by the `ModelBuilder` that `builder` names.

    A subclass is a dataclass and sets `builder`. It is known to documents by being defined, under `module.qualname`.
    """

    builder: ClassVar[str]
    """Dotted name of the ModelBuilder class that builds this configuration."""

    schema: ClassVar[Schema]
    """The version of this class's form in documents, and what changed since the first; by default the first."""

    restore_modelopt_state: bool = False
    """The model carries ModelOpt quantisation or sparsity state: builders choose layers that can hold it."""

    hf_model_id: str | None = None
    """The Hugging Face model that this configuration came from."""

    generation_config: Any | None = None
    """The generation settings to ship with the model. Those of a document become an object of transformers when this is
    read; where transformers is not installed, they stay a mapping."""

    # Keyword-only: the positional order of Megatron Bridge's ModelConfig has no such field.
    extra_checkpoint_metadata: dict[str, Any] | None = field(default=None, kw_only=True)
    """More metadata to save with checkpoints."""

    pre_wrap_hooks: list[Callable[[list[MegatronModule]], list[MegatronModule]]] = field(default_factory=list)
    """Called in order on the list of stages before they are wrapped; each returns the list for the next."""

    post_wrap_hooks: list[Callable[[list[MegatronModule]], list[MegatronModule]]] = field(default_factory=list)
    """Called in order on the list of stages after they are wrapped."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_definition(cls)
        registered.enter(cls, qualified_name(cls) or "")

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        check_class(cls)  # no earlier: a class is decorated after it was defined
        return super().__new__(cls)

    def get_builder_cls(self) -> type:
        """Return the ModelBuilder class that builds this configuration.

        Raises:
            TargetError: the class names no builder, or one that cannot be imported.
        """
        builder = getattr(self, "builder", None)
        if builder is None:
            raise TargetError(f"{type(self).__qualname__} has no builder: set its `builder` ClassVar")
        from bridge.config.schema.registry import import_builder  # entry points take milliseconds to find

        return import_builder(builder)

    def as_dict(self) -> dict[str, Any]:
        """Return this configuration as plain data (JSON types only), with `_target_` and `_builder_`.

        A value without a written form (a lambda, a live object) is left out, listed under `_omitted_` and warned about.
        """
        from bridge.config.serialize import encode_config

        return encode_config(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the configuration that `data` describes: an instance of the class that its `_target_` names.

        Raises:
            DocumentError: `data` does not describe an instance of this class; lists all problems.
        """
        from bridge.config.read.decode import decode_config

        return decode_config(data, cls)


class _GenerationField:
    """`ModelConfig.generation_config`: settings that a document gave become transformers' object when they are read.

    They stay data where transformers is not installed, or documents may not name its class.
    """

    keeps_generation_data = True  # see `schema.generation.KEEPS_DATA`

    def __get__(self, config: object, owner: type | None = None) -> Any:
        if config is None:
            return None  # the field's default, which a dataclass keeps in its class
        value = vars(config).get(GENERATION_FIELD)
        if isinstance(value, GenerationSettings):
            from bridge.config.read.generation import (
                build_generation_config,
            )  # it imports transformers, as nothing before it does

            value = vars(config)[GENERATION_FIELD] = build_generation_config(value)
        return value

    def __set__(self, config: object, value: Any) -> None:
        vars(config)[GENERATION_FIELD] = value


class _HooksField:
    """A list of hooks: refused when it is assigned, not when the model is built, if it is none."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, config: object, owner: type | None = None) -> Any:
        if config is None or self._name not in vars(config):
            raise AttributeError(self._name)  # a dataclass looks for a default in its class
        return vars(config)[self._name]

    def __set__(self, config: object, value: Any) -> None:
        where = f"{type(config).__qualname__}.{self._name}"
        if callable(value):
            raise ConfigError(f"{where}: expected a list of hooks, got one hook: write [{describe_value(value)}]")
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list of hooks, got {describe_value(value)}")
        for number, hook in enumerate(value, 1):
            if not callable(hook):
                raise ConfigError(f"{where}: hook {number} is {describe_value(hook)}, which is not callable")
        vars(config)[self._name] = value


# Not in the class body, where a dataclass would take them for the fields' defaults.
ModelConfig.generation_config = _GenerationField()
ModelConfig.pre_wrap_hooks = _HooksField("pre_wrap_hooks")  # type: ignore[assignment]
ModelConfig.post_wrap_hooks = _HooksField("post_wrap_hooks")  # type: ignore[assignment]
