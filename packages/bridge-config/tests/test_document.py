from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bridge.config import ConfigError, Document, DocumentError, ModelConfig, WriteThrough, load_config
from bridge.config.files import MAX_BYTES


@dataclass
class Block:
    size: int
    ratio: float = 0.5


@dataclass(kw_only=True)
class Model(WriteThrough, ModelConfig):
    _embeds: ClassVar[str] = "block"
    builder: ClassVar[str] = "nowhere.Builder"
    block: Block
    blocks: list[Block] = field(default_factory=list)
    vocab_size: int | None = None


YAML = f"""\
# a model
_target_: {__name__}.Model
vocab_size: 1
block:
  size: 2
blocks:
  - {{size: 1}}
  - size: 3
    ratio: 1e-1
"""
MODEL = Model(vocab_size=1, block=Block(2), blocks=[Block(1), Block(3, 0.1)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(YAML)
    return path


def problems(source: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(DocumentError) as error:
        load_config(source, overrides)
    return [str(problem).removeprefix(f"{source}:") for problem in error.value.problems]


def test_a_yaml_and_a_json_file_describe_the_same(file: Path) -> None:
    document = Document.load(file)
    assert document.source == str(file)
    assert document.config() == MODEL
    as_json = file.with_suffix(".json")
    as_json.write_text(document.to_json())
    assert load_config(as_json) == load_config(str(file)) == MODEL


def test_a_config_becomes_a_document_and_comes_back(tmp_path: Path) -> None:
    document = Document.of(MODEL)
    assert document.config() == MODEL
    path = tmp_path / "written.yml"
    path.write_text(document.to_yaml())
    assert load_config(path) == MODEL


def test_get_and_set_by_path(file: Path) -> None:
    document = Document.load(file)
    assert document.get("blocks[1].ratio") == 0.1
    assert document.get("$.block") == {"size": 2}
    document.set("blocks[0].ratio", 1)
    document.set("extra_checkpoint_metadata.a.b", "c")
    assert document.get("blocks[0]") == {"size": 1, "ratio": 1}
    assert document.config().extra_checkpoint_metadata == {"a": {"b": "c"}}
    document.remove("blocks[0]")
    assert len(document.get("blocks")) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("vocab_siz", r"\$.vocab_siz is not in the document; did you mean 'vocab_size'"),
        ("blocks[7].size", r"\$.blocks\[7\] is not in the document"),
        ("block.size.deeper", r"\$.block.size.deeper is not in the document"),
        ("a..b", "is not a path"),
        ("a[", "is not a path"),
        (".a", "is not a path"),
    ],
)
def test_get_of_what_is_not_there(file: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Document.load(file).get(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("vocab_size.x", r"\$.vocab_size is 1: there is no 'x' in it"),
        ("blocks[7]", r"\$.blocks is a list: there is no 7 in it"),
        ("blocks.x", r"\$.blocks is a list: there is no 'x' in it"),
        ("", "names the whole document"),
    ],
)
def test_set_where_nothing_can_be(file: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Document.load(file).set(path, 1)


def test_overrides_are_yaml_and_apply_in_order(file: Path) -> None:
    overrides = [
        "block.ratio=1e-5",
        "+hf_model_id='007'",
        "++vocab_size=2",
        "vocab_size=3",
        "~blocks[0]",
        "block.size=[1]",
    ]
    document = Document.load(file, overrides)
    assert document.data == {
        "_target_": f"{__name__}.Model",
        "vocab_size": 3,
        "block": {"size": [1], "ratio": 1e-5},
        "blocks": [{"size": 3, "ratio": 0.1}],
        "hf_model_id": "007",
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vocab_size", "malformed: write path=value, or ~path to remove"),
        ("=3", "malformed"),
        ("~vocab_size=3", "malformed"),
        ("~nothing", "$.nothing is not in the document"),
        ("block.size=[1", "not YAML"),
        ("vocab_size=012", "octal"),
        ("vocab_size.x=1", "there is no 'x' in it"),
    ],
)
def test_an_override_that_does_not_work_is_named(file: Path, override: str, message: str) -> None:
    (found,) = problems(file, override)
    assert found.startswith(f"override {override!r}:")
    assert message in found


def test_failed_overrides_change_nothing_and_are_told_together(file: Path) -> None:
    document = Document.load(file)
    with pytest.raises(DocumentError) as error:
        document.override(["vocab_size=9", "~a", "~b"])
    assert len(error.value.problems) == 2
    assert document.get("vocab_size") == 1


def test_problems_carry_line_and_column_or_the_override(file: Path) -> None:
    file.write_text(YAML.replace("vocab_size: 1", "vocab_sze: 1").replace("size: 3", "size: x"))
    found = problems(file, "block.ratio=half", "hf_model_id=5", "size=2")
    assert sorted(found[:3]) + found[3:] == [
        "override 'block.ratio=half': $.block.ratio: expected a number, got 'half'",
        "override 'hf_model_id=5': $.hf_model_id: expected text, got 5",
        "override 'size=2': $.size: belongs to block: give it as block.size",
        "3:1: $.vocab_sze: unknown key of Model; did you mean 'vocab_size'?",
        "8:5: $.blocks[1].size: expected an integer, got 'x'",
    ]


def test_a_missing_field_is_told_where_its_mapping_stands(file: Path) -> None:
    file.write_text(YAML.replace("  size: 2", "  ratio: 1"))
    assert problems(file) == ["4:1: $.block.size: required, but missing"]


def test_json_problems_have_positions(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(f'{{"_target_": "{__name__}.Model",\n  "block": {{"size": "2"}}}}')
    assert problems(path) == ["2:13: $.block.size: expected an integer, got '2'"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "- 1", "expected a mapping at the top, got a list"),
        ("a.yaml", "", "expected a mapping at the top, got null"),
        ("a.yaml", "a: [", "not YAML"),
        ("a.json", "a: 1", "not JSON"),
        ("a.toml", "a = 1", "a document is a .yaml, .yml or .json file"),
        ("noname", "a: 1", "give this one such a name"),
        ("a.yaml", b"\xff\xfe", "is not UTF-8 text"),
        ("a.yaml", "x" * (MAX_BYTES + 1), "larger than"),
        ("a.yaml", None, "cannot be read: No such file"),
        ("a", None, "no such file, nor a preset of this name"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    (found,) = problems(path)
    assert message in found


def test_a_directory_is_not_a_document(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").mkdir()
    (found,) = problems(tmp_path / "d.yaml")
    assert "cannot be read: Is a directory" in found
