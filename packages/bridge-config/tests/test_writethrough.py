"""WriteThrough: a config exposes the fields of an embedded config."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from bridge.config import ConfigError, ModelConfig, WriteThrough


@dataclass
class Plain:
    num_layers: int = 1
    hidden_size: int = 8

    def head_size(self, heads: int) -> int:
        return self.hidden_size // heads


@dataclass
class Rotary(Plain):
    rotary_base: float = 3.5


@dataclass(kw_only=True)
class Outer(WriteThrough, ModelConfig):
    builder: ClassVar[str] = "nowhere.Builder"
    rotary_base: int = 10000  # before and after the embedded config: both orders must work
    transformer: Plain
    vocab_size: int | None = None
    rotary_percent: float = 1.0
    names: list[str] = field(default_factory=list)

    @property
    def vocab(self) -> int | None:
        return self.vocab_size

    @vocab.setter
    def vocab(self, value: int) -> None:
        self.vocab_size = value


def test_reads_and_writes_go_to_the_embedded_config() -> None:
    config = Outer(transformer=Plain(num_layers=2), vocab_size=5)
    assert (config.num_layers, config.head_size(4)) == (2, 2)
    config.num_layers = 3
    config.vocab_size = 6
    assert config.transformer == Plain(num_layers=3)
    assert "num_layers" not in vars(config)
    assert config.vocab_size == 6


def test_properties_work() -> None:
    config = Outer(transformer=Plain())
    config.vocab = 7
    assert config.vocab_size == 7


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    config = Outer(transformer=Plain())
    with pytest.raises(AttributeError, match=r"'Outer' has no field 'num_layer'; did you mean 'num_layers'\?"):
        config.num_layer = 3
    with pytest.raises(AttributeError, match=r"no field 'vocb_size'; did you mean 'vocab_size'\?"):
        config.vocb_size = 3
    with pytest.raises(AttributeError, match="'Outer' has no attribute 'nothing', nor has its transformer"):
        _ = config.nothing
    assert not hasattr(config, "nothing")


def test_a_shared_field_belongs_to_the_embedded_config() -> None:
    config = Outer(transformer=Rotary(rotary_base=2.5))
    assert config.rotary_base == 2.5
    config.rotary_base = 4
    assert config.transformer == Rotary(rotary_base=4)
    config.transformer.rotary_base = 5
    assert config.rotary_base == 5
    assert config.as_dict().keys().isdisjoint({"rotary_base"})
    assert config.as_dict()["transformer"]["rotary_base"] == 5


def test_an_outer_field_stays_on_the_outer_config() -> None:
    assert Outer(transformer=Plain()).rotary_base == 10000
    config = Outer(transformer=Plain(), rotary_base=7)
    assert config.as_dict()["rotary_base"] == 7


def test_the_outer_config_keeps_a_field_that_the_new_embedded_one_lacks() -> None:
    config = Outer(transformer=Plain(), rotary_base=7)
    config.transformer = Rotary(rotary_base=2.5)
    assert config.rotary_base == 2.5
    config.transformer = Plain()
    assert config.rotary_base == 2.5
    assert Outer(transformer=Plain()).rotary_base == 10000


def test_a_conflicting_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rotary_base=10000 conflicts with transformer.rotary_base=3.5"):
        Outer(transformer=Rotary(), rotary_base=10000)
    assert Outer(transformer=Rotary(rotary_base=9), rotary_base=9).rotary_base == 9


@pytest.mark.parametrize("embedded", [Plain(num_layers=4), Rotary(rotary_base=2.5)], ids=["plain", "shared field"])
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it)), dataclasses.replace],
    ids=["copy", "deepcopy", "pickle", "replace"],
)
def test_copies_are_equal_and_independent(embedded: Plain, copied: Callable[[Any], Any]) -> None:
    config = Outer(transformer=embedded, vocab_size=3)
    other = copied(config)
    assert other == config
    assert repr(other) == repr(config)
    assert other.rotary_base == config.rotary_base
    other.vocab_size = 4
    assert config.vocab_size == 3
    assert other != config


def test_a_copy_can_get_another_embedded_config() -> None:
    config = Outer(transformer=Rotary(rotary_base=2.5), vocab_size=3)
    other = copy.copy(config)
    other.transformer = Rotary(rotary_base=9)
    assert other == Outer(transformer=Rotary(rotary_base=9), vocab_size=3)
    assert config == Outer(transformer=Rotary(rotary_base=2.5), vocab_size=3)
    # dataclasses.replace passes all fields to the constructor, including those that belong to the embedded config.
    with pytest.raises(ConfigError, match=r"rotary_base=2.5 conflicts with transformer.rotary_base=9"):
        dataclasses.replace(config, transformer=Rotary(rotary_base=9))


def test_deepcopy_copies_the_embedded_config() -> None:
    config = Outer(transformer=Rotary())
    other = copy.deepcopy(config)
    other.rotary_base = 9
    assert config.rotary_base == 3.5


def test_the_embedded_config_must_be_required() -> None:
    with pytest.raises(TypeError, match="must be a required field"):

        class Wrong(WriteThrough):
            transformer: Plain = Plain()


@dataclass
class Elsewhere:
    """A plain dataclass that is not a WriteThrough."""

    num_layers: int = 7


@dataclass(kw_only=True)
class Mixed(WriteThrough, Elsewhere):
    transformer: Plain


def test_class_attributes_are_kept() -> None:
    assert Outer(transformer=Rotary()).rotary_base == 3.5
    assert Outer.rotary_base == 10000
    config = Mixed(transformer=Plain(num_layers=2))
    assert (config.num_layers, Mixed.num_layers, Elsewhere.num_layers, Elsewhere().num_layers) == (2, 7, 7, 7)
    config.num_layers = 3
    assert (config, config.transformer.num_layers) == (Mixed(transformer=Plain(num_layers=3)), 3)


def test_a_subclass_has_its_own_defaults() -> None:
    Outer(transformer=Rotary())

    @dataclass(kw_only=True)
    class Inherits(Outer):
        rotary_base: int

    @dataclass(kw_only=True)
    class Overrides(Outer):
        rotary_base: int = 6

    assert Inherits(transformer=Plain()).rotary_base == 10000
    assert Overrides(transformer=Plain()).rotary_base == 6
    assert Overrides(transformer=Rotary()).rotary_base == 3.5
