"""Canonical forms, fingerprints and differences of documents."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bridge.config import ConfigError, Document, DocumentError, ModelConfig, register
from bridge.config.canonical import canonicalize, fingerprint
from bridge.config.schema.versions import Changed, Moved, Schema


class Mode(Enum):
    fast = 1
    slow = 2


@register
def hook(stages: Any) -> Any:
    return stages


@dataclass
class Part:
    size: int = 4
    scale: float = 1.0
    mode: Mode = Mode.fast
    window: tuple[int, int] | None = None
    anything: Any = None


@dataclass
class BigPart(Part):
    extra: int = 0


register(BigPart)
register(Mode)
register(hook, "test_canonical.hook_alias")


@dataclass
class Whole(ModelConfig):
    builder: ClassVar[str] = "nowhere.Builder"
    schema: ClassVar[Schema] = Schema(
        3, (Moved(2, "width", "part.size"), Moved(3, "label", "name"), Changed(3, "depth", (("deep", 9),), absent=1))
    )
    name: str = "x"
    depth: int = 2
    part: Part = field(default_factory=Part)
    parts: list[Part] = field(default_factory=list)


TARGET = f"{__name__}.Whole"
SHORT: dict[str, Any] = {"_target_": TARGET, "depth": 3, "part": {"size": 8}}

values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just(Mode.slow)
parts = st.builds(
    Part,
    size=st.integers(),
    scale=st.floats(allow_nan=False) | st.integers(),
    mode=st.sampled_from(Mode),
    window=st.none() | st.tuples(st.integers(), st.integers()),
    anything=values | st.lists(values, max_size=2) | st.tuples(values) | st.just(partial(hook, 1, key=(2,))),
)
wholes = st.builds(
    Whole,
    name=st.text(),
    depth=st.integers(),
    part=parts,
    parts=st.lists(parts, max_size=2),
    pre_wrap_hooks=st.lists(st.just(hook), max_size=1),
)


def shuffle_keys(data: Any, seed: int) -> Any:
    """Return `data` with the keys of every mapping in another order."""
    if isinstance(data, dict):
        keys = list(data)
        random.Random(seed).shuffle(keys)
        return {key: shuffle_keys(data[key], seed) for key in keys}
    return [shuffle_keys(item, seed) for item in data] if isinstance(data, list) else data


@settings(deadline=None)
@given(wholes)
def test_as_dict_output_is_canonical(config: Whole) -> None:
    assert canonicalize(config.as_dict()) == config.as_dict()


@settings(deadline=None)
@given(wholes, st.integers(0, 9))
def test_round_trip_and_key_order_keep_the_fingerprint(config: Whole, seed: int) -> None:
    document = Document.of(config)
    first = fingerprint(document.data)
    assert fingerprint(ModelConfig.from_dict(document.data).as_dict()) == first
    assert fingerprint(json.loads(document.to_json())) == first
    assert fingerprint(shuffle_keys(document.data, seed)) == first


@settings(deadline=None)
@given(wholes, wholes)
def test_fingerprints_are_equal_if_and_only_if_nothing_differs(one: Whole, other: Whole) -> None:
    same = fingerprint(one.as_dict()) == fingerprint(other.as_dict())
    assert same == (Document.of(one).diff(Document.of(other)) == [])


def test_the_canonical_form_has_full_names_targets_and_order() -> None:
    long = {
        "part": {"mode": {"_target_": f"{__name__}.Mode", "_name_": "slow"}, "size": 8},
        "parts": [{"_target_": f"{__name__}.BigPart"}],
        "pre_wrap_hooks": [{"_target_": "test_canonical.hook_alias", "_call_": False}],
        "_target_": TARGET,
    }
    made = canonicalize(long)
    assert made["pre_wrap_hooks"] == [f"{__name__}.hook"]
    assert list(made) == ["_target_", "_builder_", "_version_", "pre_wrap_hooks", "part", "parts"]
    assert made["part"] == {"_target_": f"{__name__}.Part", "size": 8, "mode": "slow"}
    assert made["parts"] == [{"_target_": f"{__name__}.BigPart"}]
    assert canonicalize(made) == made
    assert made["_builder_"] == Whole.builder


def test_defaults_are_filled_in_on_demand() -> None:
    filled = canonicalize(SHORT, defaults=True)
    assert filled == Whole(depth=3, part=Part(size=8)).as_dict()


def test_an_explicit_default_equals_an_omitted_field() -> None:
    assert fingerprint(SHORT | {"name": "x", "parts": []}) == fingerprint(SHORT)
    assert fingerprint(SHORT | {"name": "y"}) != fingerprint(SHORT)


def test_a_migrated_document_keeps_its_fingerprint() -> None:
    old = {"_target_": TARGET, "_version_": 1, "width": 8, "depth": "deep", "label": "n"}
    assert fingerprint(old) == fingerprint({"_target_": TARGET, "part": {"size": 8}, "depth": 9, "name": "n"})


def test_the_fingerprint_hashes_canonical_json() -> None:
    # Written by hand according to RFC 8785: sorted keys, no spaces, 1.0 as 1.
    text = (
        '{"_builder_":"nowhere.Builder","_target_":"' + TARGET + '","depth":2,"extra_checkpoint_metadata":null,'
        '"generation_config":null,"hf_model_id":null,"name":"é","part":{"_target_":"' + f"{__name__}.Part" + '",'
        '"anything":null,"mode":"fast","scale":1,"size":4,"window":null},"parts":[],"post_wrap_hooks":[],'
        '"pre_wrap_hooks":[],"restore_modelopt_state":false}'
    )
    expected = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    assert fingerprint({"_target_": TARGET, "name": "é"}) == expected


def test_large_integers_are_distinguished() -> None:
    assert fingerprint(SHORT | {"depth": 2**53}) != fingerprint(SHORT | {"depth": 2**53 + 1})


def test_the_fingerprint_does_not_depend_on_the_process() -> None:
    code = "from bridge.config import Document; print(Document.load('tiny').fingerprint())"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_an_invalid_document_has_no_fingerprint() -> None:
    with pytest.raises(DocumentError, match=r"\$\.depth: expected an integer"):
        fingerprint(SHORT | {"depth": "x"})


def diff(one: dict[str, Any], other: dict[str, Any], *, defaults: bool = True) -> list[str]:
    return [str(difference) for difference in Document(one).diff(Document(other), defaults=defaults)]


def test_differences_are_reported_field_by_field() -> None:
    other = {"_target_": TARGET, "name": "other", "part": {"size": 8, "window": [1, 2]}, "parts": [{}]}
    assert diff(SHORT, other) == [
        "~ name: x (default) -> other",
        "~ depth: 3 -> 2 (default)",
        "~ part.window: null (default) -> [1, 2]",
        "- parts: [] (default)",
        f"+ parts[0]._target_: {__name__}.Part (default)",
        "+ parts[0].size: 4 (default)",
        "+ parts[0].scale: 1.0 (default)",
        "+ parts[0].mode: fast (default)",
        "+ parts[0].window: null (default)",
        "+ parts[0].anything: null (default)",
    ]
    assert diff(SHORT, SHORT | {"name": "x"}) == []


def test_differences_can_ignore_defaults() -> None:
    assert diff(SHORT, SHORT | {"name": "x"}, defaults=False) == ["+ name: x"]
    assert diff(SHORT | {"name": "x"}, SHORT, defaults=False) == ["- name: x"]


def test_moved_and_renamed_fields_are_reported_as_such() -> None:
    old = {"_target_": TARGET, "_version_": 1, "width": 8, "label": "one", "depth": 3}
    new = {"_target_": TARGET, "part": {"size": 8}, "name": "two", "depth": 3}
    assert diff(old, new) == ["~ name: one -> two (was label)", "> part.size: 8 (was width)"]
    assert diff(new, old) == ["~ name: two -> one (is label there)", "> part.size: 8 (is width there)"]


def test_another_class_is_a_difference() -> None:
    big = SHORT | {"part": {"_target_": f"{__name__}.BigPart", "size": 8}}
    assert diff(SHORT, big) == [
        f"~ part._target_: {__name__}.Part (default) -> {__name__}.BigPart",
        "+ part.extra: 0 (default)",
    ]


def test_yaml_and_json_files_compare(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"_target_: {TARGET}\npart: {{size: 8}}  # eight\ndepth: 3\n")
    (tmp_path / "b.json").write_text(json.dumps(SHORT))
    a, b = Document.load(tmp_path / "a.yaml"), Document.load(tmp_path / "b.json")
    assert a.diff(b) == []
    assert a.fingerprint() == b.fingerprint()


@dataclass
class Numbers(ModelConfig):
    builder: ClassVar[str] = "nowhere.Builder"
    x: float = 1.0
    anything: Any = None


numbers = st.integers() | st.floats(allow_nan=False) | st.integers(-(2**60), 2**60).map(float) | st.booleans()
values = st.one_of(
    numbers,
    st.lists(numbers | st.none(), max_size=2),
    st.dictionaries(st.sampled_from(["a", "_version_", "_omitted_"]), numbers, max_size=2),
)


def make_document(value: Any, x: Any) -> Document:
    return Document({"_target_": f"{__name__}.Numbers", "anything": value, "x": float(x) if x is True else x})


@given(values, values, numbers, numbers)
@example(10**16, 1e16, 10**16, 1e16)
@example([True], [1], 0, 0)
@example({"_version_": 1}, {"_version_": 2}, 1, 1)
@example(2**53 + 1, float(2**53 + 1), 1, 1)
@example(10**400, -(10**400), 1, 1)
def test_documents_without_a_difference_have_the_same_fingerprint(one: Any, other: Any, x: float, y: float) -> None:
    for before, after in ((one, other), (one, one)):
        first, second = make_document(before, x + 0), make_document(after, y + 0)
        assert (first.fingerprint() == second.fingerprint()) == (not first.diff(second))


def test_a_number_too_large_to_write_has_no_fingerprint() -> None:
    document = make_document(10**5000, 1)
    with pytest.raises(ConfigError, match="cannot compute the fingerprint of this document"):
        document.fingerprint()
    [difference] = document.diff(make_document(1, 1))
    assert str(difference) == "~ anything: a value too large to show -> 1"
