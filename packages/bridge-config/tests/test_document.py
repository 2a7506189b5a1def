"""Documents: loading, getting and setting values, overrides, and positions of problems."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from sample_model import MODEL, TARGET, YAML, Block

from bridge.config import ConfigError, Document, DocumentError, ModelConfig, OmittedWarning, load_config
from bridge.config.documents import folders
from bridge.config.documents.overrides import is_override
from bridge.config.schema.versions import Moved, Schema
from bridge.config.text.limits import MAX_BYTES


@dataclass
class Listed(ModelConfig):
    builder: ClassVar[str] = "nowhere.Builder"
    blocks: list[Block] = field(default_factory=list)
    others: list[Block] = field(default_factory=list)


@dataclass
class Newer(ModelConfig):
    builder: ClassVar[str] = "nowhere.Builder"
    schema: ClassVar[Schema] = Schema(2, (Moved(2, "old", "new"),))
    new: int = 1
    other: int = 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(YAML)
    return path


def problems(source: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(DocumentError) as error:
        load_config(source, overrides)
    return [str(problem).removeprefix(f"{source}:") for problem in error.value.problems]


def test_yaml_and_json_files_give_equal_configs(file: Path) -> None:
    document = Document.load(file)
    assert document.source == str(file)
    assert document.config() == MODEL
    as_json = file.with_suffix(".json")
    as_json.write_text(document.to_json())
    assert load_config(as_json) == load_config(str(file)) == MODEL


def test_a_config_survives_conversion_to_a_document(tmp_path: Path) -> None:
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
def test_getting_a_missing_value_is_an_error(file: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Document.load(file).get(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("vocab_size.x", r"\$.vocab_size is 1: there is no 'x' in it"),
        ("blocks[7]", r"\$.blocks is a list of length 2: there is no 7 in it"),
        ("blocks[2]", r"\$.blocks is a list of length 2: there is no 2 in it"),
        ("blocks.x", r"\$.blocks is a list of length 2: there is no 'x' in it"),
        ("pre_wrap_hooks[0]", r"\$.pre_wrap_hooks is not a list, or not in the document: set the whole list"),
        ("a.b[0].c", r"\$.a is not a list, or not in the document"),
        ("", "is the whole document"),
        (".".join("a" * 101), "leads more than 100 levels deep"),
    ],
)
def test_setting_an_impossible_path_is_an_error(file: Path, path: str, message: str) -> None:
    document = Document.load(file)
    with pytest.raises(ConfigError, match=message):
        document.set(path, 1)
    assert document == Document.load(file)


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
        "_target_": TARGET,
        "vocab_size": 3,
        "block": {"size": [1], "ratio": 1e-5},
        "blocks": [{"size": 3, "ratio": 0.1}],
        "hf_model_id": "007",
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vocab_size", "malformed: write vocab_size=VALUE, or ~path to remove"),
        ("vocab_size = 3", "malformed: write vocab_size=3, or ~path to remove"),
        ("=3", "malformed"),
        (".block=3", "'.block' is not a path: write it as"),
        ("~vocab_size=3", "malformed"),
        ("~nothing", "$.nothing is not in the document"),
        ("block.size=[1", "not YAML"),
        ("vocab_size=012", "octal"),
        ("vocab_size.x=1", "there is no 'x' in it"),
    ],
)
def test_a_failed_override_is_named(file: Path, override: str, message: str) -> None:
    (found,) = problems(file, override)
    assert found.startswith(f"override {override!r}:")
    assert message in found


def test_failed_overrides_change_nothing_and_are_reported_together(file: Path) -> None:
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


def test_a_config_json_of_hugging_face_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    assert "which `bridge from-hf` converts" in problems(path)[0]


def test_a_missing_field_is_reported_at_its_mapping(file: Path) -> None:
    file.write_text(YAML.replace("  size: 2", "  ratio: 1"))
    assert problems(file) == ["4:1: $.block.size: required, but missing"]


def test_problems_after_a_removed_item_keep_their_lines(file: Path) -> None:
    file.write_text(YAML.replace("size: 3", "size: x"))
    assert problems(file, "~blocks[0]") == ["8:5: $.blocks[0].size: expected an integer, got 'x'"]
    json_file = file.with_suffix(".json")
    json_file.write_text(json.dumps(Document.load(file).data, indent=1))
    (found,) = problems(json_file, "~blocks[0]")
    assert found == "12:4: $.blocks[0].size: expected an integer, got 'x'"


def test_problems_behind_an_alias_are_reported_at_the_anchor(file: Path) -> None:
    file.write_text(f"_target_: {TARGET}\nblock: &block\n  size: x\nblocks: [*block, *block]\n")
    assert [problem.split(":")[0] for problem in problems(file)] == ["3", "3", "3"]


def test_json_problems_have_positions(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(f'{{"_target_": "{TARGET}",\n  "block": {{"size": "2"}}}}')
    assert problems(path) == ["2:13: $.block.size: expected an integer, got '2'"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "- 1", "expected a mapping at the top, got a list"),
        ("a.yaml", "", "expected a mapping at the top, got null"),
        ("a.yaml", "a: [", "not YAML"),
        ("a.json", "a: 1", "not JSON"),
        ("a.toml", "a = 1", "expected a .yaml, .yml or .json file"),
        ("noname", "a: 1", "expected a .yaml, .yml or .json file: rename it"),
        ("a.yaml", b"\xff\xfe", "not valid UTF-8"),
        pytest.param("a.yaml", "x" * (MAX_BYTES + 1), "larger than", id="too many characters"),
        pytest.param("a.yaml", "é" * (MAX_BYTES // 2 + 1), "larger than", id="too many bytes"),
        ("a.json", b'{"a": "\xff"}', "not valid UTF-8"),
        ("a.yaml", None, "no such file"),
        ("a", None, "no such file or preset"),
    ],
)
def test_unreadable_files_are_errors(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    (found,) = problems(path)
    assert message in found


def test_a_name_too_long_for_a_file_is_an_error(tmp_path: Path) -> None:
    (found,) = problems(f"{tmp_path}/{'x' * 5000}.yaml")
    assert "cannot be read: File name too long" in found


def test_irregular_files_are_neither_read_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "directory.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    for path in sorted(tmp_path.iterdir()):
        expected = "is a folder" if path.is_dir() else "cannot be read: not a regular file"
        assert problems(path)[0].startswith(f" {expected}")
        with pytest.raises(ConfigError, match="cannot be written: not a regular file"):
            Document({"a": 1}).save(path)
    assert (tmp_path / "pipe.yaml").is_fifo()


@pytest.mark.parametrize("name", ["a\0b.yaml", "a\0b", "\ud900.yaml"])
def test_invalid_file_names_are_refused(name: str) -> None:
    with pytest.raises(DocumentError, match="not a valid file name"):
        Document.load(name)
    with pytest.raises(ConfigError, match="not a valid file name"):
        Document({"a": 1}).save(name)


def test_overrides_are_distinguished_from_file_names() -> None:
    assert is_override(f"a={'x' * 5000}")
    assert is_override("a=\0")
    assert is_override('extra_checkpoint_metadata["a b"]=1')
    assert is_override('~extra_checkpoint_metadata["a=\\"b"].c')
    assert is_override("\u2603=1")
    assert not is_override('a["b=1')
    assert not is_override("./a=1.yaml")
    assert not is_override("/a=1.yaml")


def test_an_override_may_have_quoted_keys(file: Path) -> None:
    document = Document.load(file, ['extra_checkpoint_metadata["a = b"].c=1', '$["hf_model_id"]=x y'])
    assert document.get("extra_checkpoint_metadata") == {"a = b": {"c": 1}}
    document.override(['~extra_checkpoint_metadata["a = b"].c', "~hf_model_id"])
    assert document.get("extra_checkpoint_metadata") == {"a = b": {}}


def test_overrides_must_be_a_list(file: Path) -> None:
    with pytest.raises(ConfigError, match="expected a list of overrides, got a string"):
        Document.load(file, "vocab_size=3")


RUN_CONFIG = """\
train:
  train_iters: 5
model:
  _target_: megatron.bridge.models.gpt_provider.GPTModelProvider
  num_layers: 2
  hidden_size: 8
  num_attention_heads: 2
  vocab_size: 64  # padded
"""


@pytest.mark.parametrize("head", ["", "_target_: megatron.bridge.training.config.ConfigContainer\n"])
def test_overrides_of_a_run_config_apply_to_its_model(tmp_path: Path, head: str) -> None:
    file = tmp_path / "run_config.yaml"
    file.write_text(head + RUN_CONFIG)
    overrides = [
        "vocab_size=3",
        "transformer.num_layers=3",
        "model.hidden_size=16",
        "transformer.ffn_hidden_size=4",
        "train.train_iters=6",
    ]
    document = Document.load(file, [*overrides, "seq_length=7", "~seq_length"])
    expected = Document.load(file).get("model") | {
        "vocab_size": 3,
        "num_layers": 3,
        "hidden_size": 16,
        "ffn_hidden_size": 4,
    }
    assert document.get("model") == expected
    assert document.get("train") == {"train_iters": 6}
    checked = document.check().present.data
    assert checked["vocab_size"] == 3
    assert checked["transformer"]["num_layers"] == 3
    assert checked["transformer"]["ffn_hidden_size"] == 4
    with pytest.raises(DocumentError) as error:
        Document.load(file, ["transformer.num_layers=x"]).check()
    assert str(error.value) == "override 'transformer.num_layers=x': $.model.num_layers: expected an integer, got 'x'"


def find_lines(document: Document) -> dict[str, str | None]:
    with pytest.raises(DocumentError) as error:
        document.check()
    return {problem.path: problem.file and f"{problem.file}:{problem.line}" for problem in error.value.problems}


def test_positions_follow_list_items(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(f"_target_: {__name__}.Listed\nblocks:\n- size: 1\n- size: x\n- size: 3\n- size: y\n")
    document = Document.load(file, ["blocks[2].size=bad", "~blocks[0]"])
    assert find_lines(document) == {
        "$.blocks[0].size": f"{file}:4",
        "$.blocks[1].size": "override 'blocks[2].size=bad':None",
        "$.blocks[2].size": f"{file}:6",
    }
    document.override(["~blocks[1]", "blocks[1].size=worse"])
    assert find_lines(document) == {
        "$.blocks[0].size": f"{file}:4",
        "$.blocks[1].size": "override 'blocks[1].size=worse':None",
    }


def test_a_value_set_by_the_program_has_no_line(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(f"_target_: {__name__}.Listed\nblocks:\n- size: 1\n- size: x\n")
    document = Document.load(file)
    document.set("blocks[0].size", "bad")
    assert find_lines(document) == {"$.blocks[0].size": f"{file}:None", "$.blocks[1].size": f"{file}:4"}
    document.save()
    assert find_lines(document) == {"$.blocks[0].size": f"{file}:3", "$.blocks[1].size": f"{file}:4"}


def test_items_removed_from_an_alias_are_not_searched_in_its_anchor(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(f"_target_: {__name__}.Listed\nothers: &a\n- size: 1\n- size: x\nblocks: *a\n")
    assert find_lines(Document.load(file, ["~blocks[0]"])) == {
        "$.others[1].size": f"{file}:4",
        "$.blocks[0].size": f"{file}:None",
    }


def test_positions_survive_a_migration(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(f"_target_: {__name__}.Newer\nold: x\n_version_: 1\nother: y\n")
    document = Document.load(file, ["other=bad"])
    assert document.migrate()
    assert find_lines(document) == {"$.new": f"{file}:2", "$.other": "override 'other=bad':None"}
    document.override(["new=worse"])
    assert find_lines(document) == {"$.new": "override 'new=worse':None", "$.other": "override 'other=bad':None"}


def test_warnings_point_to_the_calling_line(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(f"_target_: {__name__}.Listed\n_omitted_:\n- path: $.blocks\n  reason: a lambda\n")
    document = Document.load(file)
    live = Listed(extra_checkpoint_metadata={"f": lambda: 0})
    for action in (
        document.config,
        document.check,
        document.fingerprint,
        lambda: document.diff(document),
        lambda: load_config(file),
        lambda: ModelConfig.from_dict(document.data),
        live.as_dict,
        lambda: Document.of(live),
    ):
        with pytest.warns(OmittedWarning) as said:
            action()
        assert {warning.filename for warning in said} == {__file__}


FOLDER_READER = """
from bridge.config import Document

def read(folder):
    return Document({"a": 1}, folder, ["a is always 1"])
"""


def test_an_installed_distribution_reads_folders_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder_reader.py").write_text(FOLDER_READER)
    installed = tmp_path / "folder_reader-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: folder-reader\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[bridge.folders]\nmodel.ini = folder_reader:read\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    assert "model.ini" in problems(folder)[0]  # what is expected
    (folder / "model.ini").touch()
    document = Document.load(folder, ["b=2"])
    assert (document.data, document.source) == ({"a": 1, "b": 2}, str(folder))
    assert document.notes == ["a is always 1"]


def test_entry_points_of_folders_are_read_for_folders_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: 1")
    asked: list[str] = []

    def find_none(*, group: str) -> list[object]:
        asked.append(group)
        return []

    monkeypatch.setattr(folders, "entry_points", find_none)
    assert Document.load(file).data == {"a": 1}
    assert asked == []
    assert "pip install bridge-models" in problems(tmp_path)[0]
    assert asked == [folders.GROUP]
