"""Saving documents: kept text, file modes, and the schema written beside a new file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_model import MODEL, YAML

from bridge.config import ConfigError, Document, DocumentError, load_config
from bridge.config.schema.jsonschema import list_schema_targets, make_json_schema


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(YAML)
    return path


def test_saving_keeps_unchanged_text(file: Path) -> None:
    document = Document.load(file, ["block.size=4", "~blocks[1].ratio"])
    document.set("hf_model_id", "007")
    document.save()
    assert (
        file.read_text() == YAML.replace("size: 2", "size: 4").replace("    ratio: 1e-1\n", "") + "hf_model_id: '007'\n"
    )
    assert load_config(file) == document.config()


def test_a_saved_document_belongs_to_the_new_file(file: Path) -> None:
    document = Document.load(file, ["vocab_size=x"])
    document.save(other := file.with_name("other.yml"))
    with pytest.raises(DocumentError) as error:
        document.config()
    assert str(error.value) == f"{other}:3:1: $.vocab_size: expected an integer, got 'x'"
    document.set("vocab_size", 5)
    document.save()
    assert other.read_text() == YAML.replace("vocab_size: 1", "vocab_size: 5")
    assert file.read_text() == YAML


@pytest.mark.parametrize(
    "content", [YAML.replace("\n", "\r\n").encode(), b"\xef\xbb\xbf" + YAML.encode(), YAML[:-1].encode()]
)
def test_saving_keeps_line_ends_and_byte_order_mark(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    document = Document.load(file)
    document.save()
    assert file.read_bytes() == content
    document.set("block.size", 9)
    document.save()
    assert file.read_bytes() == content.replace(b"size: 2", b"size: 9")


def test_json_is_saved_indented(file: Path) -> None:
    document = Document.load(file)
    document.save(path := file.with_suffix(".json"))
    assert path.read_text() == json.dumps(document.data, indent=2) + "\n"
    document.set("block.size", 7)
    document.save()
    assert load_config(path).as_dict()["block"]["size"] == 7


def test_saving_keeps_the_mode_and_the_link(file: Path, tmp_path: Path) -> None:
    file.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    document = Document.load(link)
    document.set("vocab_size", 2)
    document.save()
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    assert "vocab_size: 2" in file.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"model.yaml", "link.yaml"}


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    Document({"a": 1}).save(path := tmp_path / "new.yaml")
    (beside := tmp_path / "beside").touch()
    assert path.stat().st_mode == beside.stat().st_mode


def test_a_failed_save_keeps_the_file(file: Path) -> None:
    document = Document.load(file)
    document.set("vocab_size", "\ud800")
    with pytest.raises(ConfigError, match=r"\$.vocab_size cannot be written: contains the unpaired surrogate U\+D800"):
        document.save()
    assert file.read_text() == YAML
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda folder: Document({"a": 1}).save(), "was not loaded from a file: give a path to save it to"),
        (lambda folder: Document({"a": 1}).save(folder / "a.toml"), "expected a .yaml, .yml or .json file"),
        (lambda folder: Document({"a": 1}).save(folder / "no" / "a.yaml"), "cannot be written: No such file"),
        (lambda folder: Document({"a": 1}, "tiny").save(), "'tiny' is a preset, which cannot be changed"),
        (
            lambda folder: Document([1]).save(folder / "a.yaml"),
            "expected a mapping at the top of the document, got a list",
        ),  # type: ignore[arg-type]
        (
            lambda folder: Document({"a": {1: 2}}).save(folder / "a.json"),
            r"\$.a cannot be written: keys must be strings",
        ),
        (
            lambda folder: Document(make_cyclic_data()).save(folder / "a.json"),
            r"\$ cannot be written: nested more than",
        ),
        (
            lambda folder: Document(make_cyclic_data()).save(folder / "a.yaml"),
            r"\$ cannot be written: nested more than",
        ),
        (lambda folder: Document(make_cyclic_data()).override(["a=1"]), "nested too deeply"),
        (lambda folder: Document({"a": ["x" * 1000] * 20_000}).save(folder / "a.yaml"), "larger than 10 MiB"),
    ],
)
def test_saving_to_an_impossible_path_is_an_error(tmp_path: Path, save: Callable[[Path], None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        save(tmp_path)
    assert os.listdir(tmp_path) == []


def make_cyclic_data() -> dict[str, Any]:
    data: dict[str, Any] = {}
    data["again"] = data
    return data


def test_a_new_yaml_file_refers_to_a_schema_beside_it(tmp_path: Path) -> None:
    name = next(iter(list_schema_targets()))
    document = Document({"_target_": name})
    document.save(path := tmp_path / "new.yaml")
    schema = path.with_name(f"{name.rpartition('.')[2]}.schema.json")
    assert path.read_text() == f"# yaml-language-server: $schema={schema.name}\n_target_: {name}\n"
    assert json.loads(schema.read_text()) == make_json_schema(name)
    schema.write_text("{}")
    Document({"_target_": name}).save(path)
    assert schema.read_text() == "{}", "what is there stays"
    Document.load(path).save()
    assert path.read_text().count("$schema") == 1


@pytest.mark.parametrize("kind", ["# mine\n{}", "\ufeff# mine\n{}", "# mine\r\n{}"])
def test_a_copy_refers_to_a_schema_beside_it(tmp_path: Path, kind: str) -> None:
    name = next(iter(list_schema_targets()))
    schema = f"{name.rpartition('.')[2]}.schema.json"
    (file := tmp_path / "a.yaml").write_bytes(kind.format(f"_target_: {name}").encode())
    document = Document.load(file)
    document.save()
    assert os.listdir(tmp_path) == ["a.yaml"], "a file that names no schema gets none"
    (one := tmp_path / "one").mkdir()
    document.save(one / "a.yaml")
    line = f"# yaml-language-server: $schema={schema}"
    text = (one / "a.yaml").read_bytes().decode()
    assert line in text.removeprefix("\ufeff").splitlines()[0]
    assert text.replace(line, "", 1).replace("\r\n" if "\r" in kind else "\n", "", 1).encode() == file.read_bytes()
    (two := tmp_path / "two").mkdir()
    Document.load(one / "a.yaml").save(two / "a.yaml")
    assert (two / "a.yaml").read_bytes().decode() == text
    for folder in (one, two):
        assert json.loads((folder / schema).read_text()) == make_json_schema(name)


def test_a_schema_is_never_written_to_another_folder(tmp_path: Path) -> None:
    name = next(iter(list_schema_targets()))
    (folder := tmp_path / "folder").mkdir()
    text = f"# yaml-language-server: $schema=../{name.rpartition('.')[2]}.schema.json\n_target_: {name}\n"
    (folder / "a.yaml").write_text(text)
    Document.load(folder / "a.yaml").save(folder / "b.yaml")
    assert (folder / "b.yaml").read_text() == text
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "a.yaml", "b.yaml"}


def test_a_class_without_a_schema_is_saved_without_one(tmp_path: Path) -> None:
    Document.of(MODEL).save(path := tmp_path / "new.yaml")
    assert load_config(path) == MODEL
    assert os.listdir(tmp_path) == ["new.yaml"]


def test_files_of_megatron_training_are_not_overwritten(tmp_path: Path) -> None:
    text = """\
model:
  _target_: megatron.training.models.gpt.GPTModelConfig
  vocab_size: 8
  transformer: {num_layers: 2, hidden_size: 8, num_attention_heads: 2}
train: {micro_batch_size: 1}
"""
    file = tmp_path / "run_config.yaml"
    file.write_text(text)
    document = Document.load(file)
    document.migrate()
    with pytest.raises(ConfigError, match="save to a new file"):
        document.save()
    assert file.read_text() == text
    document.save(tmp_path / "mine.yaml")
    document.set("vocab_size", 16)
    document.save()
    assert Document.load(tmp_path / "mine.yaml").get("vocab_size") == 16
