"""The API of ModelConfig, which is that of megatron.training, and errors in definitions of subclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from bridge.config import (
    ConfigError,
    DocumentError,
    ModelConfig,
    Serializable,
    TargetError,
    WriteThrough,
    register,
)


@register
def twice(x: Any, **options: Any) -> Any:
    return x


def unregistered(x: Any) -> Any:
    return x


class Builder:
    """A stand-in for a ModelBuilder."""


@dataclass
class Flat(ModelConfig):
    builder: ClassVar[str] = f"{__name__}.Builder"
    size: int = 1


def test_defaults() -> None:
    assert dataclasses.asdict(ModelConfig()) == {
        "restore_modelopt_state": False,
        "hf_model_id": None,
        "generation_config": None,
        "extra_checkpoint_metadata": None,
        "pre_wrap_hooks": [],
        "post_wrap_hooks": [],
    }
    assert isinstance(Flat(), Serializable)
    assert not isinstance(object(), Serializable)


def test_positional_order_matches_megatron_training() -> None:
    config = Flat(True, "a/model", None, [twice], [unregistered], 7)
    assert (config.pre_wrap_hooks, config.post_wrap_hooks, config.size) == ([twice], [unregistered], 7)
    assert config.extra_checkpoint_metadata is None
    with pytest.raises(TypeError, match="positional"):
        ModelConfig(True, "a/model", None, [], [], {})  # type: ignore[misc]


@pytest.mark.parametrize("name", ["pre_wrap_hooks", "post_wrap_hooks"])
@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (twice, r"expected a list of hooks, got one hook: write \[<function twice"),
        ((twice,), r"expected a list of hooks, got \(<function twice"),
        (None, "expected a list of hooks, got null"),
        ("twice", "expected a list of hooks, got 'twice'"),
        ([twice, "twice"], "hook 2 is 'twice', which is not callable"),
    ],
)
def test_hooks_that_are_not_a_list_are_refused_by_the_constructor(name: str, hooks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"Flat\.{name}: {message}"):
        Flat(**{name: hooks})
    config = Flat()
    with pytest.raises(ConfigError, match=message):
        setattr(config, name, hooks)
    assert config == Flat()


def test_an_invalid_builder_name_is_refused_when_the_class_is_defined() -> None:
    with pytest.raises(TargetError, match=r"Field.builder is declared as a field: write `builder: ClassVar\[str\]"):

        class Field(ModelConfig):
            builder: str = "a.Builder"  # type: ignore[misc]

    for name in ("Thing", "", None, 3, ".Thing"):
        with pytest.raises(TargetError, match=f"Undotted.builder is {name!r}: write the dotted name"):

            class Undotted(ModelConfig):
                builder: ClassVar[Any] = name

    with pytest.raises(TargetError, match=f"is a class: write its dotted name, '{__name__}.Builder'"):

        class Class(ModelConfig):
            builder = Builder  # type: ignore[assignment]


def test_a_default_without_annotation_is_refused_when_the_class_is_defined() -> None:
    with pytest.raises(TargetError, match=r"Larger.size has no annotation, so @dataclass ignores it: write `size: "):

        class Larger(Flat):
            size = 5


def test_get_builder_cls_returns_the_named_class() -> None:
    @dataclass
    class Ordered(ModelConfig):
        builder: ClassVar[str] = "collections.OrderedDict"

    import collections

    assert Ordered().get_builder_cls() is collections.OrderedDict


@pytest.mark.parametrize("path", ["nowhere.Builder", "collections.Nothing", "json.loads"])
def test_a_missing_builder_is_an_error(path: str) -> None:
    @dataclass
    class Broken(ModelConfig):
        builder: ClassVar[str] = path

    with pytest.raises(TargetError, match="the builder"):
        Broken().get_builder_cls()


def test_a_config_without_builder_is_an_error() -> None:
    with pytest.raises(TargetError, match="set its `builder` ClassVar"):
        ModelConfig().get_builder_cls()


def test_a_class_that_would_lose_values_in_documents_is_refused() -> None:
    class Undecorated(Flat):
        more: int = 3

    @dataclass
    class Unversioned(Flat):
        schema: ClassVar[Any] = {"version": 2}

    @dataclass
    class Hollow(WriteThrough, Flat):
        pass

    @dataclass
    class Below(Undecorated):
        pass

    for cls, message in (
        (Below, "Undecorated has the fields more: decorate it with @dataclass"),
        (Undecorated, "has the fields more: decorate it with @dataclass"),
        (Unversioned, "make it a bridge.config.Schema"),
        (Hollow, "inherits WriteThrough, but has no field 'transformer'"),
    ):
        with pytest.raises(TargetError, match=message):
            cls()
        with pytest.raises(DocumentError, match=message):
            cls.from_dict({"_target_": f"{cls.__module__}.{cls.__qualname__}"})
