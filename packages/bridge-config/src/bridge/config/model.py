"""ModelConfig: the base class of model configurations, which describe models as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from bridge.config.errors import ConfigError, TargetError
from bridge.config.problems import describe_value
from bridge.config.schema import registry_state
from bridge.config.schema.declaration import check_class, check_definition
from bridge.config.schema.generation import FIELD as GENERATION_FIELD
from bridge.config.schema.generation import GenerationSettings
from bridge.config.schema.names import get_qualified_name

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

    from bridge.config.schema.versions import Schema


@dataclass
class ModelConfig:
    """Base of all model configurations: pure data, built by the `ModelBuilder` that `builder` names.

    A subclass must be a dataclass and set `builder`. Defining it registers it for documents under `module.qualname`.
    """

    builder: ClassVar[str]
    """Dotted name of the ModelBuilder class that builds this configuration."""

    schema: ClassVar[Schema]
    """The schema version of this class and its changes since version 1; by default version 1."""

    restore_modelopt_state: bool = False
    """Whether the model has ModelOpt quantization or sparsity state, which needs layers that can hold it."""

    hf_model_id: str | None = None
    """The Hugging Face model that this configuration came from."""

    generation_config: Any | None = None
    """The generation settings to ship with the model. Settings from a document become a transformers GenerationConfig
    when this attribute is first read; if transformers is not installed, they stay a mapping."""

    # Keyword-only, since Megatron Bridge's ModelConfig lacks it and its positional order must stay valid.
    extra_checkpoint_metadata: dict[str, Any] | None = field(default=None, kw_only=True)
    """Additional metadata to save with checkpoints."""

    pre_wrap_hooks: list[Callable[[list[MegatronModule]], list[MegatronModule]]] = field(default_factory=list)
    """Called in order on the list of stages before they are wrapped; each returns the list for the next."""

    post_wrap_hooks: list[Callable[[list[MegatronModule]], list[MegatronModule]]] = field(default_factory=list)
    """Called in order on the list of stages after they are wrapped."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_definition(cls)
        registry_state.register_object(cls, get_qualified_name(cls) or "")

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        check_class(cls)  # not in __init_subclass__, which runs before @dataclass
        return super().__new__(cls)

    def get_builder_cls(self) -> type:
        """Return the ModelBuilder class that builds this configuration.

        Raises:
            TargetError: The class has no builder, or it cannot be imported.
        """
        builder = getattr(self, "builder", None)
        if builder is None:
            raise TargetError(f"{type(self).__qualname__} has no builder: set its `builder` ClassVar")
        from bridge.config.schema.registry import import_builder  # searching entry points takes milliseconds

        return import_builder(builder)

    def as_dict(self) -> dict[str, Any]:
        """Return this configuration as plain data (JSON types only), with `_target_` and `_builder_`.

        A value that cannot be encoded (a lambda, a live object) is left out, listed under `_omitted_`, and reported
        as an OmittedWarning.
        """
        from bridge.config.serialize import encode_config

        return encode_config(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the configuration that `data` describes, an instance of the class that `_target_` names.

        Raises:
            DocumentError: `data` is invalid or does not describe an instance of this class; it lists all problems.
        """
        from bridge.config.read.decode import decode_config

        return decode_config(data, cls)


class _GenerationField:
    """Descriptor of `ModelConfig.generation_config`: builds a GenerationConfig from a document's settings when read.

    The settings stay data if transformers is not installed, or its class is not registered for documents.
    """

    keeps_generation_data = True  # see `schema.generation.KEEPS_DATA`

    def __get__(self, config: object, owner: type | None = None) -> Any:
        if config is None:
            return None  # @dataclass reads the field's default from the class
        value = vars(config).get(GENERATION_FIELD)
        if isinstance(value, GenerationSettings):
            # It imports transformers, as nothing before it does.
            from bridge.config.read.generation import build_generation_config

            value = vars(config)[GENERATION_FIELD] = build_generation_config(value)
        return value

    def __set__(self, config: object, value: Any) -> None:
        vars(config)[GENERATION_FIELD] = value


class _HooksField:
    """Descriptor of a list of hooks. It validates on assignment, so that errors show where it was set."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, config: object, owner: type | None = None) -> Any:
        if config is None or self._name not in vars(config):
            raise AttributeError(self._name)  # for @dataclass: the field has a default factory, no default in the class
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


# Assigned after the class body, where @dataclass would take them for field defaults.
ModelConfig.generation_config = _GenerationField()
ModelConfig.pre_wrap_hooks = _HooksField("pre_wrap_hooks")  # type: ignore[assignment]
ModelConfig.post_wrap_hooks = _HooksField("post_wrap_hooks")  # type: ignore[assignment]
