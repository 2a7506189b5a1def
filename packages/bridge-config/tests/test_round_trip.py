"""Round trips of a ModelConfig through `as_dict` and `from_dict`: kept values and errors."""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.config import (
    ConfigError,
    Document,
    DocumentError,
    ModelConfig,
    OmittedWarning,
    register,
)
from bridge.config.schema.registry_state import register_builder
from bridge.config.text.parse import parse_yaml


class Color(Enum):
    red = 1
    blue = 2


@register
def twice(x: Any, **options: Any) -> Any:
    return x


def unregistered(x: Any) -> Any:
    return x


class Builder:
    """A stand-in for a ModelBuilder."""


class OtherBuilder:
    """Another builder of the same configs."""


class ForeignBuilder:
    """A builder of other configs."""


@dataclass
class Layer:
    size: int
    dropout: float = 0.0


@dataclass
class WideLayer(Layer):
    width: int = 2


@dataclass
class Inner:
    num_layers: int
    ratio: float = 0.5
    color: Color = Color.red
    color_or_name: str | Color | None = None
    window: tuple[int, int] | None = None
    activation: Any = None
    function: Any = None
    choice: Literal["a", 1] = "a"
    frequency: int | list[int] = 1
    anything: Any = None
    scales: dict[str, float] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    computed: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.computed = self.num_layers * 2
        if self.num_layers < 0:
            raise ValueError("num_layers must not be negative")
        if isinstance(self.frequency, int):
            self.frequency = [self.frequency] * self.num_layers


@dataclass(kw_only=True)
class Sample(ModelConfig):
    builder: ClassVar[str] = f"{__name__}.Builder"
    inner: Inner
    vocab_size: int | None = None
    layers: list[Layer] = field(default_factory=list)
    layer: Layer | Color | None = None


@dataclass
class Flat(ModelConfig):
    builder: ClassVar[str] = f"{__name__}.Builder"
    size: int = 1


@dataclass
class Flatter(Flat):
    more: int = 2


register(WideLayer)
register(Inner)
register(Color)
register_builder(OtherBuilder, Sample)
register_builder(ForeignBuilder, Flatter)


def round_trip(config: ModelConfig) -> Any:
    """Write `config` as JSON and read it back; check that YAML gives the same data."""
    document = Document(config.as_dict())
    from_json = ModelConfig.from_dict(json.loads(document.to_json()))
    assert parse_yaml(document.to_yaml()).data == json.loads(document.to_json())
    return from_json


def problems(data: dict[str, Any], cls: type[ModelConfig] = Sample) -> dict[str, str]:
    with pytest.raises(DocumentError) as error:
        cls.from_dict(data)
    return {problem.path: problem.message for problem in error.value.problems}


def test_as_dict_names_classes_and_the_builder_once() -> None:
    data = Sample(inner=Inner(1), layers=[Layer(1)]).as_dict()
    assert list(data)[:2] == ["_target_", "_builder_"]
    assert (data["_target_"], data["_builder_"]) == (f"{__name__}.Sample", f"{__name__}.Builder")
    assert data["inner"]["_target_"] == f"{__name__}.Inner"
    assert data["layers"][0] == {"_target_": f"{__name__}.Layer", "size": 1, "dropout": 0.0}
    assert "_builder_" not in data["inner"]


def test_as_dict_shares_nothing() -> None:
    config = Sample(inner=Inner(1, scales={"a": 1.0}), layers=[Layer(1)])
    data = config.as_dict()
    data["layers"].clear()
    data["inner"]["scales"].clear()
    assert config.layers == [Layer(1)]
    assert config.inner.scales == {"a": 1.0}


def test_from_dict_on_the_base_returns_the_class_of_the_document() -> None:
    for config in (Flat(size=3), Flatter(size=1, more=5), Sample(inner=Inner(2), vocab_size=7)):
        back = ModelConfig.from_dict(config.as_dict())
        assert type(back) is type(config)
        assert back == config
    assert type(Flat.from_dict(Flatter().as_dict())) is Flatter


@pytest.mark.parametrize(
    ("keys", "paths"),
    [
        ({1: 2}, {"$[1]"}),
        ({None: 2}, {"$.null"}),
        ({-1: 2}, {"$.-1"}),
        ({b"x": 2, (1, 2): 3}, {"$[\"b'x'\"]", '$["(1, 2)"]'}),
        ({10**5000: 2}, {'$["a value too large to show"]'}),
        ({"__class__": 1, "__init__": 2}, {"$.__class__", "$.__init__"}),
        ({"extra_checkpoint_metadata": {b"x": {"_target_": "no"}}}, {"$.extra_checkpoint_metadata[\"b'x'\"]"}),
        ({"pre_wrap_hooks": [{"_target_": "silu", "_partial_": True, 1: 2}]}, {"$.pre_wrap_hooks[0][1]"}),
        ({"generation_config": {"_target_": None}}, {"$.generation_config._target_"}),
        ({"generation_config": {"_target_": "builtins.list", "_args_": [[]], 1: 2}}, {"$.generation_config[1]"}),
        ({"restore_modelopt_state": 10**5000}, {"$.restore_modelopt_state"}),
        ({"_omitted_": [{"path": b"x", "reason": 1}]}, {"$._omitted_[0].path", "$._omitted_[0].reason"}),
        ({"_omitted_": {"path": "x"}, "_builder_": 1}, {"$._omitted_", "$._builder_"}),
    ],
)
def test_values_that_cannot_be_written_are_refused_by_path(keys: dict[Any, Any], paths: set[str]) -> None:
    data = Flat().as_dict() | keys
    assert set(problems(data, Flat)) == paths
    with pytest.raises(DocumentError) as error:
        Document(data).check()
    assert {problem.path for problem in error.value.problems} == paths


def test_reported_problems_are_limited_and_the_rest_counted() -> None:
    with pytest.raises(DocumentError) as error:
        ModelConfig.from_dict(Flat().as_dict() | {f"key{i}": 0 for i in range(250)})
    found = [(problem.path, problem.message) for problem in error.value.problems]
    assert [path for path, _ in found] == [*(f"$.key{i}" for i in range(100)), "$"]
    assert found[-1][1] == "150 more problems"


def test_the_reason_of_an_omission_is_one_readable_line() -> None:
    class Wordy:
        def __call__(self) -> None: ...

        def __repr__(self) -> str:
            return "a long\n" * 1000

    config = Flat()
    config.generation_config = Wordy()
    with pytest.warns(OmittedWarning):
        data = config.as_dict()
    [entry] = data["_omitted_"]
    assert entry["reason"].isprintable()
    with pytest.warns(OmittedWarning, match="a long"):
        assert ModelConfig.from_dict(data) == Flat()


def test_from_dict_on_another_class_is_refused() -> None:
    found = problems(Flat().as_dict(), Flatter)
    assert found == {"$._target_": f"expected a Flatter, but '{__name__}.Flat' is the class Flat"}


def test_a_missing_target_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="missing '_target_'"):
        ModelConfig.from_dict({"size": 1})


def test_a_missing_builder_defaults_to_that_of_the_class() -> None:
    data = Flat().as_dict()
    del data["_builder_"]
    assert Flat.from_dict(data).builder == Flat.builder


def test_a_builder_in_the_document_applies_to_the_instance() -> None:
    name = f"{__name__}.OtherBuilder"
    data = Sample(inner=Inner(1)).as_dict() | {"_builder_": name}
    config = Sample.from_dict(data)
    assert config.get_builder_cls() is OtherBuilder
    assert config.as_dict()["_builder_"] == name
    assert Sample(inner=Inner(1)).builder == f"{__name__}.Builder"


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        ("os.system", "'os.system' is not a name that documents may use"),
        (f"{__name__}.ForeignBuilder", f"{__name__}.ForeignBuilder builds Flatter, not Sample"),
        (f"{__name__}.Inner", "is not a ModelBuilder"),
        (7, "expected the name of a ModelBuilder, got 7"),
    ],
)
def test_unauthorised_or_unsuitable_builders_are_refused(builder: object, message: str) -> None:
    found = problems(Sample(inner=Inner(1)).as_dict() | {"_builder_": builder})
    assert list(found) == ["$._builder_"]
    assert message in found["$._builder_"]


FULL = Inner(
    3,
    ratio=2,
    color=Color.blue,
    color_or_name=Color.red,
    window=(1, 2),
    function=partial(twice, 1, key=(1, 2)),
    choice=1,
    frequency=[1, 2],
    anything={"tuple": (1, {2}), 3: math.inf, "_target_": "not a name", "enum": Color.red, "layer": WideLayer(1)},
    scales={"a": 1, "b": -math.inf},
    tags={"x"},
)


def test_every_kind_of_value_survives() -> None:
    config = Sample(inner=FULL, layers=[Layer(1), WideLayer(2, width=3)], layer=Layer(4), pre_wrap_hooks=[twice])
    config.extra_checkpoint_metadata = {"function": twice, "list": [1, None, "x"]}
    back = round_trip(config)
    function = back.inner.function
    assert (function.func, function.args, function.keywords) == (twice, (1,), {"key": (1, 2)})
    back.inner.function = FULL.function
    assert back == config
    assert type(back.inner.ratio) is int
    assert type(back.layers[1]) is WideLayer


def test_a_string_and_an_enum_member_stay_distinct() -> None:
    for value in ("red", Color.red, None):
        back = round_trip(Sample(inner=Inner(1, color_or_name=value)))
        assert back.inner.color_or_name == value
        assert type(back.inner.color_or_name) is type(value)


def test_a_nested_target_may_be_left_out() -> None:
    data = {"_target_": f"{__name__}.Sample", "inner": {"num_layers": 2}, "layers": [{"size": 1}]}
    assert ModelConfig.from_dict(data) == Sample(inner=Inner(2), layers=[Layer(1)])


def test_live_values_are_accepted() -> None:
    data = Sample(inner=Inner(1)).as_dict()
    data["inner"] |= {"color": Color.blue, "window": (3, 4)}
    data["layers"] = [WideLayer(2)]
    assert Sample.from_dict(data) == Sample(inner=Inner(1, color=Color.blue, window=(3, 4)), layers=[WideLayer(2)])


def test_computed_fields_are_recomputed() -> None:
    data = Sample(inner=Inner(3)).as_dict()
    assert data["inner"]["computed"] == 6
    data["inner"]["computed"] = 99
    assert Sample.from_dict(data).inner.computed == 6


def test_full_mappings_restore_state_and_partial_ones_construct() -> None:
    config = Sample(inner=Inner(3))
    config.inner.frequency = 7
    assert round_trip(config).inner.frequency == 7
    data = config.as_dict()
    del data["inner"]["ratio"]
    assert Sample.from_dict(data).inner.frequency == [7, 7, 7]


def test_unwritable_values_are_declared_and_warned_of_on_write_and_read() -> None:
    config = Sample(inner=Inner(3, anything={"a": [1, lambda: 0], "b": 2}), layer=Layer(1))
    config.inner.frequency = 7
    config.generation_config = object()
    with pytest.warns(OmittedWarning, match=r"Sample is written without .*generation_config"):
        data = config.as_dict()
    assert [entry["path"] for entry in data["_omitted_"]] == ["$.generation_config", "$.inner.anything.a"]
    assert re.match(r"\$\.inner\.anything\.a\[1\]: <function .*lambda", data["_omitted_"][1]["reason"])
    assert data["inner"]["anything"] == {"b": 2}
    with pytest.warns(OmittedWarning, match="generation_config"):
        back = Sample.from_dict(json.loads(json.dumps(data)))
    assert back.inner.anything == {"b": 2}
    assert back.inner.frequency == 7, "the mapping is still read as a full state despite the omission"


def test_an_unregistered_function_is_written_but_not_read() -> None:
    data = Flat(post_wrap_hooks=[unregistered]).as_dict()
    assert data["post_wrap_hooks"] == [f"{__name__}.unregistered"]
    assert "register it" in problems(data, Flat)["$.post_wrap_hooks[0]"]


def test_a_function_with_a_false_name_is_not_written() -> None:
    def impostor() -> None: ...

    impostor.__module__, impostor.__qualname__ = "json", "loads"
    with pytest.warns(OmittedWarning, match="no importable name"):
        assert Flat(pre_wrap_hooks=[impostor]).as_dict()["_omitted_"][0]["path"] == "$.pre_wrap_hooks"  # type: ignore[list-item]


def test_an_unwritable_item_omits_the_whole_list() -> None:
    with pytest.warns(OmittedWarning):
        data = Flat(pre_wrap_hooks=[twice, lambda stages: stages]).as_dict()
    [entry] = data["_omitted_"]
    assert entry["path"] == "$.pre_wrap_hooks", "the first hook is omitted, too"
    assert entry["reason"].startswith("$.pre_wrap_hooks[1]: ")


@dataclass
class Sequences(ModelConfig):
    builder: ClassVar[str] = f"{__name__}.Builder"
    tuple_or_list: tuple[int, ...] | list[int] | None = None
    set_or_list: set[int] | list[int] | None = None
    sequence: Sequence[int] = ()
    iterable: Iterable[int] = ()
    mapping: dict | None = None  # type: ignore[type-arg]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, kind((1,))) for name in ("tuple_or_list", "set_or_list", "sequence", "iterable") for kind in (list,)),
        ("tuple_or_list", (1,)),
        ("sequence", (1,)),
        ("set_or_list", {1}),
        ("iterable", {1}),
        ("iterable", frozenset({1})),
        ("mapping", {1: 2, "a": "b"}),
    ],
)
def test_sequences_keep_their_type(field: str, value: Any) -> None:
    back = getattr(round_trip(Sequences(**{field: value})), field)
    assert (type(back), back) == (type(value), value)


def test_all_problems_are_reported_together_with_their_paths() -> None:
    data = {
        "_target_": f"{__name__}.Sample",
        "vocab_sze": 1,
        "_secret_": 1,
        "restore_modelopt_state": 1,
        "vocab_size": True,
        "inner": {
            "num_layers": "1",
            "ratio": "0.5",
            "color": "bleu",
            "color_or_name": 5,
            "window": [1],
            "choice": True,
            "frequency": [1, "2"],
            "scales": {"a": "x"},
            "num_layer": 3,
        },
        "layers": [{"size": 1}, {}, {"size": 1, "_target_": "os.system"}, 5],
        "layer": {"_target_": f"{__name__}.Inner", "num_layers": 1},
    }
    assert problems(data) == {
        "$.vocab_sze": "unknown key of Sample; did you mean 'vocab_size'?",
        "$._secret_": "unknown key of Sample",
        "$.restore_modelopt_state": "expected true or false, got 1",
        "$.vocab_size": "expected an integer, got true",
        "$.inner.num_layer": "unknown key of Inner; did you mean 'num_layers'?",
        "$.inner.num_layers": "expected an integer, got '1'",
        "$.inner.ratio": "expected a number, got '0.5'",
        "$.inner.color": "expected one of red, blue, got 'bleu'; did you mean 'blue'?",
        "$.inner.color_or_name": "expected text or one of red, blue, got 5",
        "$.inner.window[1]": "required, but missing",
        "$.inner.choice": "expected one of 'a', 1, got true",
        "$.inner.frequency[1]": "expected an integer, got '2'",
        "$.inner.scales.a": "expected a number, got 'x'",
        "$.layers[1].size": "required, but missing",
        "$.layers[2]._target_": problems({"_target_": "os.system"})["$._target_"],
        "$.layers[3]": "expected a Layer, got 5",
        "$.layer._target_": f"expected a Layer or one of red, blue, but '{__name__}.Inner' is the class Inner",
    }


def test_an_error_in_the_constructor_is_a_problem_at_its_path() -> None:
    data = Sample(inner=Inner(1)).as_dict()
    data["inner"]["num_layers"] = -1
    assert problems(data) == {"$.inner": "Inner refuses these values: num_layers must not be negative"}


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_a_document_must_be_a_mapping(data: Any) -> None:
    with pytest.raises(DocumentError, match="expected a mapping that describes a Sample"):
        Sample.from_dict(data)


def test_cyclic_data_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    with pytest.raises(DocumentError, match="nested too deeply"):
        Flat.from_dict(Flat().as_dict() | {"generation_config": endless})


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.just("_target_"), inner, max_size=4)
        | st.frozensets(st.integers() | st.text(), max_size=3)
        | st.sampled_from([Color.red, twice, Layer])
    ),
    max_leaves=12,
)


register(Layer)


@settings(deadline=None)
@given(plain, st.integers(0, 9), st.none() | st.tuples(st.integers(), st.integers()))
def test_any_value_survives(value: Any, num_layers: int, window: Any) -> None:
    config = Sample(inner=Inner(num_layers, anything=value, window=window), extra_checkpoint_metadata={"x": value})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert round_trip(config) == config


@settings(deadline=None)
@given(plain)
def test_any_data_gives_a_config_or_a_config_error(value: Any) -> None:
    for data in (value, Flat().as_dict() | {"generation_config": value, "size": value}):
        with contextlib.suppress(ConfigError):
            ModelConfig.from_dict(data)
