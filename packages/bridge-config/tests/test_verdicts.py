"""`check` and `from_dict` agree, and values that `as_dict` writes without a warning are read back equal."""

from __future__ import annotations

import functools
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from enum import Enum, IntEnum
from pathlib import PurePath
from typing import Any, ClassVar, Literal, NamedTuple, NotRequired, Protocol, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.config import Document, DocumentError, ModelConfig, OmittedWarning, register
from bridge.config.schema.registry_state import register_builder
from bridge.config.text.parse import parse_yaml

HOME = __name__


@register
class Color(Enum):
    RED = 1
    ROT = 1  # noqa: PIE796  (a second name of the first)
    BLUE = 2


@register
class Text(str, Enum):  # noqa: UP042  (which is the older form, and has other members)
    RED = "red"


@register
class Number(IntEnum):
    NONE = 0
    ONE = 1


class Hidden(Enum):
    RED = 1


@register
@dataclass(frozen=True)
class Point:
    x: int = 0
    name: str = "a"


@register
@dataclass(frozen=True)
class Tagged:
    tags: list[int] = field(default_factory=list)


@register
@dataclass
class Layer:
    size: int = 1


@dataclass
class Unregistered:
    size: int = 1


@register
class Pair(NamedTuple):
    x: int
    y: Color = Color.RED


class HiddenPair(NamedTuple):
    x: int


class Options(TypedDict):
    color: Color
    size: NotRequired[tuple[int, int]]


class Sized(Protocol):
    size: int


@register
def function(*args: Any, **keywords: Any) -> Any: ...


def unregistered(*args: Any, **keywords: Any) -> Any: ...


@dataclass
class Verdicts(ModelConfig):
    builder: ClassVar[str] = "nowhere.Builder"
    by_color: dict[Color, float] = field(default_factory=dict)
    by_text: dict[Text | str, float] = field(default_factory=dict)
    by_point: dict[Point | Tagged, int] = field(default_factory=dict)
    colors: set[Color] = field(default_factory=set)
    points: set[Point | Tagged | Layer] = field(default_factory=set)
    anything: Any = None
    either: dict[str, int] | dict[str, Color] | dict[str, list[int]] | None = None
    literal: Literal[Color.RED, 3, "blue"] | None = None
    pair: Pair = Pair(1)  # noqa: RUF009  (a tuple)
    options: Options | None = None
    window: tuple[int, int] | list[int] | None = None
    number: int = 1
    rate: float = 0.5
    name: str = "a"
    layers: list[Layer] = field(default_factory=list)
    act: Callable[..., Any] | None = None
    sized: Sized | None = None


class OtherBuilder:
    """Another builder of the same configs."""


register_builder(OtherBuilder, Verdicts)

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.floats(allow_nan=True)
    | st.sampled_from(["RED", "red", "blue", "a", "", "_target_", float("inf"), 2**70])
    | st.sampled_from([*Color, *Text, *Number, Hidden.RED, function, unregistered, len, Layer, Unregistered, Point])
    | st.builds(lambda: lambda: 0)
    | st.sampled_from([Point(), Point(1), Tagged(), HiddenPair(1), Pair(1), Pair(2, Color.BLUE)])
    | st.builds(Pair, st.sampled_from([1, "1", None]), st.sampled_from([Color.RED, Text.RED]))
    | st.builds(Layer, st.sampled_from([1, 2, "1", 1.5]))
    | st.builds(Unregistered)
    | st.builds(functools.partial, st.sampled_from([function, unregistered, len]), st.integers(0, 1) | st.tuples())
    | st.builds(
        functools.partial, st.sampled_from([function, unregistered]), size=st.integers(0, 1) | st.lists(st.none())
    )
    | st.sampled_from([PurePath("a"), object, b"a", OrderedDict(a=1)])
)
hashable = st.sampled_from(
    [
        "a",
        "red",
        "RED",
        0,
        1,
        1.5,
        None,
        *Color,
        *Text,
        *Number,
        Point(),
        Point(1),
        Pair(1),
        function,
        (1, 2),
        Hidden.RED,
    ]
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.tuples(inner, inner)
        | st.dictionaries(hashable, inner, max_size=2)
        | st.sets(hashable, max_size=2)
        | st.frozensets(hashable, max_size=2)
        | st.fixed_dictionaries({"color": inner}, optional={"size": inner})
    ),
    max_leaves=6,
)
FIELDS = [name for name in Verdicts.__dataclass_fields__ if name not in ("builder", "schema")]


def warnings_and_document(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        document = config.as_dict()
    return "\n".join(str(warning.message) for warning in caught), document


def problems_of(read: Callable[[], object]) -> list[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except DocumentError as error:
            return [(problem.path, problem.message) for problem in error.problems]
    return []


def agreed_problems(data: Any) -> list[tuple[str, str]]:
    """Return the problems of a document; check that `check` and `from_dict` find the same ones."""
    found = problems_of(lambda: ModelConfig.from_dict(data))
    assert problems_of(Document(data).check) == found
    return found


def is_equal(one: Any, other: Any) -> bool:
    """Compare values and types; NaN equals NaN, and partials are compared by their parts."""
    if type(one) is not type(other):
        return False
    if isinstance(one, functools.partial):
        return is_equal((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    if hasattr(one, "__dataclass_fields__") and not isinstance(one, type):
        return all(is_equal(getattr(one, name), getattr(other, name)) for name in vars(one))
    if isinstance(one, dict):
        return list(one) == list(other) and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return bool(one == other) or (one != one and other != other)


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(st.sampled_from([name for name in FIELDS if "hooks" not in name]), values, max_size=2))
def test_values_written_without_a_warning_are_read_back_equal(fields: dict[str, Any]) -> None:
    config = Verdicts(**fields)
    warned, data = warnings_and_document(config)
    data = json.loads(json.dumps(data))
    found = agreed_problems(data)
    if not warned:
        assert not found
        back = ModelConfig.from_dict(data)
        assert is_equal(back, config)
        assert parse_yaml(Document(data).to_yaml()).data == data
    for path, _ in found:  # every value that is refused when read gave a warning when written
        assert path in warned or "is written without" in warned


documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 3)
    | st.floats(allow_nan=True)
    | st.sampled_from(["RED", "ROT", "red", "a", "blue", f"{HOME}.function", f"{HOME}.Layer", "os.system"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["RED", "ROT", "BLUE", "red", "a", "color", "size", "x"]), inner, max_size=3)
        | st.builds(
            lambda name, rest: {"_target_": f"{HOME}.{name}"} | rest,
            st.sampled_from(
                ["Point", "Tagged", "Layer", "Pair", "Options", "Color", "Text", "Number", "function", "Hidden"]
            ),
            st.sampled_from([{}, {"_call_": False}, {"_name_": "RED"}, {"_name_": "ROT"}, {"_name_": "ONE"}, {"x": 0}])
            | st.fixed_dictionaries(
                {}, optional={"x": inner, "size": inner, "tags": inner, "_partial_": st.just(True)}
            ),
        )
        | st.builds(
            lambda kind, items: {"_target_": f"builtins.{kind}", "_args_": [items]},
            st.sampled_from(["list", "tuple", "set", "frozenset", "dict"]),
            st.lists(inner, max_size=3) | st.lists(st.tuples(inner, inner).map(list), max_size=3),
        )
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(st.sampled_from(FIELDS), documents, min_size=1, max_size=3))
def test_check_and_from_dict_agree(fields: dict[str, Any]) -> None:
    agreed_problems({"_target_": f"{HOME}.Verdicts"} | fields)


def enum_member(enum: str, name: str) -> dict[str, Any]:
    return {"_target_": f"{HOME}.{enum}", "_name_": name}


def pairs(*items: list[Any]) -> dict[str, Any]:
    return {"_target_": "builtins.dict", "_args_": [list(items)]}


POINT = {"_target_": f"{HOME}.Point"}


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"by_color": {"RED": 1.0}, "colors": ["RED", "BLUE"]}, {}),
        ({"by_color": {"RED": 1.0, "ROT": 2.0}}, {"$.by_color.ROT": "duplicate key"}),
        (
            {"by_text": pairs([enum_member("Text", "RED"), 1], ["red", 2])},
            {"$.by_text._args_[0][1][0]": "duplicate key"},
        ),
        ({"points": [POINT | {"x": 1}], "by_point": pairs([POINT, 1], [POINT | {"x": 1}, 2])}, {}),
        ({"by_point": pairs([POINT, 1], [POINT | {"x": 0}, 2])}, {"$.by_point._args_[0][1][0]": "duplicate key"}),
        ({"points": [{"_target_": f"{HOME}.Tagged"}]}, {"$.points": "expected a list of plain values"}),
        ({"points": [{"_target_": f"{HOME}.Layer"}]}, {"$.points": "expected a list of plain values"}),
        (
            {"by_point": pairs([{"_target_": f"{HOME}.Tagged"}, 1])},
            {"$.by_point._args_[0][0][0]": "a key must be a scalar"},
        ),
        ({"either": {"a": [1], "b": []}}, {}),
        ({"either": {"a": "BLUE"}}, {}),
        ({"either": pairs(["a", [1]])}, {}),
        ({"either": {"a": "GREEN"}}, {"$.either.a": "expected an integer, got 'GREEN'"}),
        ({"literal": "ROT"}, {"$.literal": "expected one of 3, 'blue' or one of RED, got 'ROT'"}),
        ({"literal": enum_member("Color", "BLUE")}, {"$.literal._name_": "expected one of RED, got 'BLUE'"}),
        ({"options": {"color": "RED"}, "pair": {"x": 1}}, {}),
        (
            {"options": {"colour": "RED"}, "pair": {"y": "RED"}},
            {
                "$.options.colour": "unknown key of Options; did you mean 'color'?",
                "$.options.color": "required, but missing",
                "$.pair.x": "required, but missing",
            },
        ),
    ],
)
def test_verdicts_are_as_expected(fields: dict[str, Any], found: dict[str, str]) -> None:
    assert dict(agreed_problems({"_target_": f"{HOME}.Verdicts"} | fields)) == found


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pre_wrap_hooks", [unregistered], "$.pre_wrap_hooks[0] ('{home}.unregistered' is not a name"),
        ("act", unregistered, "$.act ('{home}.unregistered' is not a name"),
        ("act", functools.partial(unregistered, 1), "$.act._target_ ('{home}.unregistered' is not a name"),
        ("anything", Hidden.RED, "$.anything._target_ ('{home}.Hidden' is not a name"),
        ("anything", {"a": [Unregistered()]}, "$.anything.a[0]._target_ ('{home}.Unregistered' is not a name"),
        ("anything", HiddenPair(1), "$.anything._target_ ('{home}.HiddenPair' is not a name"),
        ("anything", OrderedDict(a=1), "$.anything (a value of type OrderedDict is read back as one of type dict)"),
        ("number", "1", "$.number (expected an integer, got '1')"),
        ("number", True, "$.number (expected an integer, got true)"),
        ("name", None, "$.name (expected text, got null)"),
        ("name", [], "$.name (expected text, got a list)"),
        ("rate", float("nan"), ""),
        ("pair", (1, Color.RED), "$.pair._args_[0] (expected a Pair, got a tuple)"),
        ("literal", Color.BLUE, "$.literal"),
        ("layers", [Layer("1")], "$.layers[0].size (expected an integer, got '1')"),  # type: ignore[arg-type]
        ("layers", (Layer(),), "$.layers._args_[0] (expected a list, got a tuple)"),
        ("pair", Pair(1, Text.RED), "$.pair.y"),  # type: ignore[arg-type]
        (
            "options",
            {"color": Color.RED, "size": [1, 2]},
            "$.options.size (a value of type list is read back as one of type tuple)",
        ),
        ("either", {"a": "RED"}, "$.either.a (a value of type str is read back as one of type Color)"),
        ("extra_checkpoint_metadata", {1: 2}, "$.extra_checkpoint_metadata._args_[0][0][0] (expected text, got 1)"),
    ],
)
def test_values_that_cannot_be_read_back_give_a_warning(field: str, value: Any, message: str) -> None:
    warned, data = warnings_and_document(Verdicts(**{field: value}))
    assert message.format(home=HOME) in warned
    assert bool(warned) == bool(message)
    assert field in data, "it has a written form, and its names may be registered in another process"


def test_registering_a_hook_ends_the_warning() -> None:
    def hook(stages: Any) -> Any:
        return stages

    hook.__qualname__ = "hook_of_this_test"
    globals()["hook_of_this_test"] = hook
    config = Verdicts(post_wrap_hooks=[hook])
    with pytest.warns(OmittedWarning, match=r"cannot be read back: \$\.post_wrap_hooks\[0\]"):
        config.as_dict()
    register(hook)
    warned, data = warnings_and_document(config)
    assert warned == ""
    assert ModelConfig.from_dict(data) == config


@dataclass
class Seeded(ModelConfig):
    builder: ClassVar[str] = "nowhere.Builder"
    first: int = 1
    seed: InitVar[int] = 0
    last: int = 2
    drawn: int = 0

    def __post_init__(self, seed: int) -> None:
        self.drawn = self.drawn or 100 * seed


def test_an_init_var_is_declared_omitted() -> None:
    config = Seeded(first=10, seed=7, last=20)
    with pytest.warns(OmittedWarning, match=r"without \$\.seed \(an InitVar, which instances do not keep\)"):
        data = config.as_dict()
    with pytest.warns(OmittedWarning, match=r"without \$\.seed"):
        assert ModelConfig.from_dict(data) == config
    given = {"_target_": f"{HOME}.Seeded", "first": 1, "seed": 3, "last": 2}
    assert ModelConfig.from_dict(given) == Seeded(drawn=300)
    assert agreed_problems(given | {"seed": "x"}) == [("$.seed", "expected an integer, got 'x'")]


@dataclass
class OwnOrder(ModelConfig):
    """A config whose constructor takes the fields in another order."""

    builder: ClassVar[str] = "nowhere.Builder"
    first: int = 1
    last: int = 2

    def __init__(self, last: int = 2, first: int = 1, **rest: Any) -> None:
        super().__init__(**rest)
        self.first, self.last = first, last


def test_a_constructor_with_another_field_order_gets_the_right_values() -> None:
    assert ModelConfig.from_dict(OwnOrder(first=5, last=6).as_dict()) == OwnOrder(first=5, last=6)


@pytest.mark.parametrize(
    "value",
    [
        Pair(1, Color.BLUE),
        {"a": Pair(2)},
        {Color.RED: 1, Text.RED: 2},
        {function, len} - {len},
        {Point(1), Point(2)},
    ],
)
def test_self_describing_values_are_read_back_in_any_field(value: Any) -> None:
    warned, data = warnings_and_document(Verdicts(anything=value))
    assert warned == ""
    assert is_equal(ModelConfig.from_dict(json.loads(json.dumps(data))).anything, value)  # type: ignore[attr-defined]


def test_unreadable_builders_and_generation_settings_give_a_warning() -> None:
    config = Verdicts()
    object.__setattr__(config, "builder", f"{HOME}.OtherBuilder")
    assert warnings_and_document(config)[0] == ""
    object.__setattr__(config, "builder", "os.system")
    assert "$._builder_ ('os.system' is not a name" in warnings_and_document(config)[0]
    assert "$._target_ (bridge.config.model.ModelConfig is the abstract base" in warnings_and_document(ModelConfig())[0]


def test_sequences_in_a_union_keep_their_type() -> None:
    for window in ((1, 2), [1, 2], [1, 2, 3]):
        warned, data = warnings_and_document(Verdicts(window=window))
        assert (warned, is_equal(ModelConfig.from_dict(data).window, window)) == ("", True)  # type: ignore[attr-defined]
