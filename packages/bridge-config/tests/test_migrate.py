"""Migration of older documents: declared changes, conflicts, and original positions of values."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.config import DocumentError, ModelConfig
from bridge.config.errors import ConfigError
from bridge.config.read.migrate import describe_change, migrate
from bridge.config.schema.annotations import ANYTHING, Instance, Items, Mapping, Plain
from bridge.config.schema.target import Field, Target
from bridge.config.schema.versions import Changed, Moved, Removed, Schema


@dataclass
class Inner:
    schema: ClassVar[Schema] = Schema(2, (Moved(2, "old", "new"),))
    new: int = 0


@dataclass
class Outer(ModelConfig):
    builder: ClassVar[str] = "nowhere.Builder"
    inner: Inner = field(default_factory=Inner)


INT = (Plain("int"),)
INNER = (Instance("my.Inner"),)


def config(name: str, fields: dict[str, Any], schema: Schema | None = None) -> Target:
    return Target(name, "config", fields={key: Field(key, type_) for key, type_ in fields.items()}, schema=schema)


def lookup(*targets: Target) -> Any:
    return {target.name: target for target in targets}.get


def outer(*changes: Any, version: int = 2, **fields: Any) -> Target:
    return config("my.Outer", fields or {"size": INT, "inner": INNER}, Schema(version, changes))


def old(**fields: Any) -> dict[str, Any]:
    return {"_target_": "my.Outer", "_version_": 1, **fields}


def new(version: int = 2, **fields: Any) -> dict[str, Any]:
    return {"_target_": "my.Outer", "_version_": version, **fields}


def test_a_renamed_field_keeps_its_value_and_position() -> None:
    data = old(width=3)
    before = copy.deepcopy(data)
    result = migrate(data, lookup(outer(Moved(2, "width", "size"))))
    assert result.data == new(size=3)
    assert data == before
    assert result.moves == [(("size",), ("width",))]
    assert result.notes == ["$.width: now $.size, as version 2 of Outer has it"]
    assert not result.problems


def test_a_field_moves_into_a_nested_config_that_may_be_missing() -> None:
    targets = lookup(outer(Moved(2, "width", "inner.width")), config("my.Inner", {"width": INT}))
    assert migrate(old(width=3), targets).data == new(inner={"width": 3})
    assert migrate(old(width=3, inner={"x": 1}), targets).data == new(inner={"x": 1, "width": 3})


def test_a_field_moves_out_of_a_nested_config() -> None:
    targets = lookup(outer(Moved(2, "inner.width", "size")), config("my.Inner", {"width": INT}))
    result = migrate(old(inner={"width": 3, "x": 1}), targets)
    assert result.data == new(size=3, inner={"x": 1})
    assert result.moves == [(("size",), ("inner", "width"))]


def test_steps_run_in_order_and_keep_the_first_position() -> None:
    steps = (Moved(3, "b", "inner.c"), Moved(2, "a", "b"))  # the order of declaration does not matter
    targets = lookup(outer(*steps, version=3), config("my.Inner", {}))
    first = migrate(old(a={"deep": 1}), targets)
    assert first.data == new(3, inner={"c": {"deep": 1}})
    assert first.moves == [(("inner", "c"), ("a",))]
    assert migrate(old(b=1) | {"_version_": 2}, targets).data == new(3, inner={"c": 1})


def test_two_fields_swap_names() -> None:
    result = migrate(old(a=1, b=2), lookup(outer(Moved(2, "a", "b"), Moved(2, "b", "a"))))
    assert result.data == new(a=2, b=1)
    assert sorted(result.moves) == [(("a",), ("b",)), (("b",), ("a",))]


def test_a_name_is_freed_and_reused_in_one_version() -> None:
    targets = lookup(outer(Moved(2, "a", "b"), Removed(2, "b", (None,), "nobody used it")))
    assert migrate(old(a=1, b=None), targets).data == new(b=1)


def test_nested_moves_keep_the_first_position() -> None:
    steps = (Moved(2, "a", "x.b"), Moved(3, "x", "y"))
    result = migrate(old(a=1, x={"c": 2}), lookup(outer(*steps, version=3)))
    assert result.data == new(3, y={"b": 1, "c": 2})
    assert dict(result.moves) == {("y",): ("x",), ("y", "b"): ("a",)}


def test_giving_both_names_is_a_problem_at_the_old_path() -> None:
    result = migrate(old(width=3, size=4), lookup(outer(Moved(2, "width", "size"))))
    [(path, message)] = result.problems
    assert path == ("width",)
    assert "'size'" in message
    assert "gives both" in message
    assert not result.moves


def test_a_move_into_a_value_that_is_not_a_mapping_is_a_problem() -> None:
    result = migrate(old(width=3, inner=[1]), lookup(outer(Moved(2, "width", "inner.width"))))
    [(path, message)] = result.problems
    assert path == ("width",)
    assert "$.inner is not a mapping" in message


def test_a_removed_field_is_dropped_only_if_that_loses_nothing() -> None:
    targets = lookup(outer(Removed(2, "fast", (False, 0), "all is fast now; set slow to go back")))
    harmless = migrate(old(fast=False), targets)
    assert harmless.data == new()
    assert not harmless.problems
    assert harmless.notes == [
        "$.fast: False left out, version 2 of Outer removed it: all is fast now; set slow to go back"
    ]
    [(path, message)] = migrate(old(fast=True), targets).problems
    assert path == ("fast",)
    assert "True cannot be ignored: all is fast now; set slow to go back" in message


def test_true_and_one_are_different_values() -> None:
    assert migrate(old(fast=True), lookup(outer(Removed(2, "fast", (1,), "gone")))).problems
    assert not migrate(old(fast=1.0), lookup(outer(Removed(2, "fast", (1,), "gone")))).problems


def test_old_values_are_translated_and_others_are_kept() -> None:
    targets = lookup(outer(Changed(2, "size", values=(("small", 1), (True, [2])))))
    assert migrate(old(size="small"), targets).data == new(size=1)
    assert migrate(old(size=True), targets).data == new(size=[2])
    untouched = migrate(old(size=1), targets)
    assert untouched.data == new(size=1)
    assert not untouched.notes
    assert migrate(old(), targets).data == new()


def test_changed_defaults_are_written_out() -> None:
    targets = lookup(outer(Changed(2, "size", absent=7), Changed(2, "inner.x", absent=None)))
    assert migrate(old(), targets).data == new(size=7)
    assert migrate(old(size=1, inner={}), targets).data == new(size=1, inner={"x": None})


def test_changes_up_to_the_written_version_are_not_repeated() -> None:
    targets = lookup(outer(Moved(2, "a", "b"), Changed(3, "size", absent=7), version=3))
    assert migrate(old(a=1) | {"_version_": 2}, targets).data == new(3, a=1, size=7)


def test_nested_configs_have_their_own_versions() -> None:
    inner = config("my.Inner", {"x": INT}, Schema(2, (Moved(2, "y", "x"),)))
    fields = {
        "one": INNER,
        "many": (Items("list", INNER), Plain("null")),
        "named": (Mapping((Plain("str"),), INNER),),
        "any": ANYTHING,
    }
    written = {"_version_": 1, "y": 5}
    data = {
        "_target_": "my.Outer",
        "one": written,
        "many": [written, {"y": 1}],
        "named": {"a": written},
        "any": [{"deep": written | {"_target_": "my.Inner"}}, written],
    }
    result = migrate(data, lookup(config("my.Outer", fields), inner))
    now = {"_version_": 2, "x": 5}
    assert result.data == {
        "_target_": "my.Outer",
        "one": now,
        "many": [now, {"y": 1}],  # a document without a version is current: 'y' is unknown
        "named": {"a": now},
        "any": [{"deep": now | {"_target_": "my.Inner"}}, written],  # the latest version of this class is unknown
    }
    assert (("many", 0, "x"), ("many", 0, "y")) in result.moves


def test_a_moved_config_is_migrated_at_its_new_path() -> None:
    inner = config("my.Inner", {"x": INT}, Schema(2, (Moved(2, "y", "x"),)))
    targets = lookup(outer(Moved(2, "part", "inner")), inner)
    result = migrate(old(part={"_version_": 1, "y": 5}), targets)
    assert result.data == new(inner={"_version_": 2, "x": 5})
    assert dict(result.moves) == {("inner",): ("part",), ("inner", "x"): ("part", "y")}


def test_paths_of_omissions_are_migrated() -> None:
    entries = [
        {"path": "$.width", "reason": "a lambda"},
        {"path": "$.size.hook", "reason": "a lambda"},
        "no entry",
    ]
    targets = lookup(
        outer(Moved(2, "width", "inner.width"), Moved(2, "size", "big"), Changed(2, "inner.width", absent=1))
    )
    result = migrate(old(size={}, inner={}, _omitted_=entries), targets)
    assert result.data["inner"] == {}  # the omitted value was set, so the old default does not apply
    assert [entry["path"] for entry in result.data["_omitted_"][:2]] == ["$.inner.width", "$.big.hook"]
    assert entries[0] == {"path": "$.width", "reason": "a lambda"}


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None, [1]])
def test_a_version_must_be_a_positive_integer(version: Any) -> None:
    [(path, message)] = migrate(old() | {"_version_": version}, lookup(outer())).problems
    assert path == ("_version_",)
    assert "expected an integer >= 1" in message


def test_a_class_found_through_an_annotation_is_migrated() -> None:
    document: dict[str, Any] = {"_target_": f"{__name__}.Outer"}
    headings: list[dict[str, Any]] = [{}, {"_target_": f"{__name__}.Inner"}]
    for heading in headings:
        read = ModelConfig.from_dict(document | {"inner": heading | {"_version_": 1, "old": 5}})
        assert read == Outer(inner=Inner(5))
        with pytest.raises(DocumentError, match=r"^\$\.inner\._version_: written by version 3 of Inner"):
            ModelConfig.from_dict(document | {"inner": heading | {"_version_": 3, "new": 5}})


def test_a_newer_version_is_refused_by_name() -> None:
    inner = config("my.Inner", {})
    result = migrate({"_target_": "my.Outer", "inner": {"_version_": 9}}, lookup(outer(), inner))
    assert result.problems == [
        (("inner", "_version_"), "written by version 9 of Inner; this installation knows up to 1: update it")
    ]


@pytest.mark.parametrize(
    "data",
    [
        new(size=1, inner={"_version_": 1, "x": 1}),
        {"_target_": "my.Outer", "width": 1},
        {"_target_": "my.Unknown", "_version_": 99},
        {"_target_": ["no name"], "_version_": None},
        {"_version_": 1},
        [1],
        None,
    ],
)
def test_a_current_document_is_returned_unchanged(data: Any) -> None:
    result = migrate(data, lookup(outer(Moved(2, "width", "size")), config("my.Inner", {"x": INT})))
    assert result.data is data
    assert not result.notes
    assert not result.problems
    assert not result.moves


def test_problems_suggest_current_names() -> None:
    target = outer(
        Moved(2, "a", "b"),
        Moved(3, "b", "inner.c"),
        Removed(3, "gone", (), "use 'size'"),
        Moved(2, "was", "gone"),
        version=3,
    )
    assert describe_change(target, "b").startswith(
        "was moved to 'inner.c' in version 3: write that, or add '_version_: 2'"
    )
    assert describe_change(target, "a").startswith("was moved to 'inner.c' in version 3")
    assert describe_change(target, "gone") == "was removed in version 3: use 'size'"
    assert describe_change(target, "was") == "was removed in version 3: use 'size'"
    assert describe_change(target, "size") == ""
    assert describe_change(config("my.Inner", {}), "a") == ""
    renamed = outer(Moved(2, "width", "size"))
    hint = describe_change(renamed, "width")
    assert hint == "was renamed to 'size' in version 2: write that, or add '_version_: 1' to have the document migrated"
    assert not migrate(old(width=1), lookup(renamed)).problems  # following the suggestion works


@pytest.mark.parametrize(
    ("version", "change"),
    [
        (0, None),
        (True, None),
        (2, Moved(1, "a", "b")),
        (2, Moved(3, "a", "b")),
        (2, Moved(2, "a", "a")),
        (2, Moved(2, "", "a")),
        (2, Moved(2, "a[0]", "b")),
        (2, Changed(2, "a")),
    ],
)
def test_invalid_schemas_are_refused(version: Any, change: Any) -> None:
    with pytest.raises(ConfigError):
        Schema(version, (change,) if change else ())


names = st.sampled_from(["a", "b", "c.d", "e.f"])
plain = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
versions = st.integers(2, 5)
changes = (
    st.builds(Moved, versions, names, names).filter(lambda change: change.old != change.new)
    | st.builds(Removed, versions, names, st.lists(plain).map(tuple), st.text())
    | st.builds(Changed, versions, names, st.lists(st.tuples(plain, plain), min_size=1).map(tuple))
    | st.builds(lambda since, name, absent: Changed(since, name, absent=absent), versions, names, plain)
)
schemas = st.builds(Schema, st.just(5), st.lists(changes, max_size=6).map(tuple))


@given(schemas)
def test_a_schema_survives_json(schema: Schema) -> None:
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema


@given(schemas, st.dictionaries(st.sampled_from("abcdef"), plain | st.dictionaries(st.sampled_from("df"), plain)))
def test_migrating_is_idempotent_leaves_the_input_alone_and_loses_nothing_silently(
    schema: Schema, fields: dict[str, Any]
) -> None:
    target_of = lookup(config("my.Outer", {}, schema))
    data = old(**fields)
    before = copy.deepcopy(data)
    result = migrate(data, target_of)
    assert data == before
    assert result.data["_version_"] == 5
    assert migrate(result.data, target_of).data is result.data
    if not result.problems and not result.notes:
        assert result.data == before | {"_version_": 5}


keys = st.sampled_from(["_target_", "_version_", "_omitted_", "path", "a", "b", "c", "d"])
anything = st.recursive(
    plain | st.sampled_from(["my.Outer", "my.Inner", "$.a", "$.c.d"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.integers(), inner, max_size=4),
    max_leaves=12,
)


@given(schemas, anything)
def test_any_data_is_migrated_or_refused(schema: Schema, data: Any) -> None:
    fields = {"a": INNER, "b": ANYTHING, "c": (Mapping((Plain("str"),), INNER),)}
    targets = lookup(config("my.Outer", fields, schema), config("my.Inner", {"b": INT}, schema))
    for document in (data, {**data, "_target_": "my.Outer"} if isinstance(data, dict) else data):
        before = copy.deepcopy(document)
        result = migrate(document, targets)
        assert document == before
        if not result.problems:
            assert migrate(result.data, targets).data is result.data


def test_schemas_are_declared_by_entry_point(tmp_path: Path) -> None:
    """A separate process reads the entry points of a real distribution."""
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    points = ["their.Config = mine:SCHEMA", "their.Wrong = mine:WRONG", "their.Gone = mine:GONE"]
    (info / "entry_points.txt").write_text("[bridge.schemas]\n" + "\n".join(points))
    code = (
        "from bridge.config.schema.versions import Moved, Schema\n"
        "SCHEMA = Schema(2, (Moved(2, 'a', 'b'),))\nWRONG = 1\n"
    )
    (tmp_path / "mine.py").write_text(code)
    ask = """
import sys
sys.path.insert(0, sys.argv[1])
from bridge.config.errors import TargetError
from bridge.config.schema.versions import load_declared_schema
print(load_declared_schema("their.Config").to_json(), load_declared_schema("their.Other"))
for name in ("their.Wrong", "their.Gone"):
    try:
        load_declared_schema(name)
    except TargetError as error:
        print(error)
"""
    said = subprocess.run([sys.executable, "-c", ask, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    found, wrong, gone = said.splitlines()
    assert found == str(Schema(2, (Moved(2, "a", "b"),)).to_json()) + " None"
    assert wrong == "the schema of 'their.Wrong', declared as 'mine:WRONG', is not a bridge.config.Schema"
    assert gone.startswith("the schema of 'their.Gone', declared as 'mine:GONE', fails: ")


def test_importing_it_loads_only_the_standard_library() -> None:
    """Migration is used by commands that must start fast."""
    code = "import sys, bridge.config.read.migrate as m; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "megatron", "yaml", "click", "rfc8785"}


@pytest.mark.parametrize("entry", [{"path": None, "reason": "x"}, {"path": 3}, None, "x", []])
def test_a_malformed_omission_is_left_to_the_reader(entry: object) -> None:
    data = {"_target_": "any.Thing", "_omitted_": [entry], "inner": {"_version_": 4}}
    assert migrate(data, lambda name: None).problems == []
