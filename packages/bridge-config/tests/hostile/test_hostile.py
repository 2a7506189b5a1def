"""Hostile documents are refused at the hostile value, without side effects.

corpus.yaml lists them; reading.py reads them and records audit events.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bridge.config import DocumentError, ModelConfig, register
from bridge.config.schema.table import get_shipped, list_shipped_names

READING = Path(__file__).parent / "reading.py"
CORPUS: list[dict[str, Any]] = runpy.run_path(str(READING))["load_corpus"]()
MEGABYTE = 2**20

Read = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Return a function that reads documents once with a reader: read(reader, name, ...) -> outcomes by name."""

    @cache
    def outcomes(reader: str, *names: str) -> dict[str, Any]:
        if reader == "from_dict" and not importlib.util.find_spec("megatron"):
            pytest.skip("needs megatron-core")
        program = [sys.executable, str(READING), reader, str(tmp_path_factory.mktemp(reader)), *names]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    return outcomes


@pytest.mark.parametrize("reader", ["from_dict", "validate"])
def test_harmless_documents_are_accepted(reader: str, read: Read) -> None:
    harmless = {name: result for name, result in read(reader).items() if name.startswith("harmless")}
    assert len(harmless) == len(runpy.run_path(str(READING))["HARMLESS"])
    assert {name: result["problems"] for name, result in harmless.items() if result["verdict"] != "accepted"} == {}


@pytest.mark.parametrize("reader", ["from_dict", "validate"])
@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry["name"]) for entry in CORPUS])
def test_hostile_documents_are_refused_without_side_effects(entry: dict[str, Any], reader: str, read: Read) -> None:
    result = read(reader)[entry["name"]]
    assert result["verdict"] == ("refused" if "at" in entry else "accepted"), result
    at = entry.get("at") or []
    if at or "at" not in entry:
        assert {path for path, _ in result["problems"]} == set([at] if isinstance(at, str) else at)
    assert (result["events"], result["modules"], result["ran"]) == ([], [], False)
    assert result["said"] == "", "nothing is printed except the problems"
    assert [message for _, message in result["problems"] if not message.isprintable() or len(message) > 2000] == []
    assert result["peak"] < 64 * MEGABYTE
    assert result["seconds"] < 5


def test_the_verdict_is_the_same_with_and_without_torch(read: Read) -> None:
    without, with_torch = read("validate"), read("from_dict")
    assert not {"torch", "megatron"} & set(without[""]["modules"])
    assert {"torch", "megatron"} <= set(with_torch[""]["modules"])
    names = [entry["name"] for entry in CORPUS]
    assert {name: without[name]["problems"] for name in names} == {name: with_torch[name]["problems"] for name in names}


def test_the_audit_hook_detects_what_a_naive_reader_does(read: Read) -> None:
    result = read("call_target", "import-class", "os-system", "yaml-apply", "large-text")
    assert result["import-class"]["ran"]
    assert "bridge_trap" in result["import-class"]["modules"]
    assert result["os-system"]["events"] == ["os.system b'true'"]
    assert result["yaml-apply"]["ran"]
    assert result["large-text"]["verdict"] == "died"


def test_no_constructor_opens_a_file_named_in_a_document(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    file = tmp_path / "layers.json"
    file.write_text('{"block_configs": []}')
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    tried = 0
    for target in (one for name in list_shipped_names() if (one := get_shipped(name)) and one.kind == "config"):
        # Without sizes the constructor divides by zero before it opens anything.
        sizes = {"num_layers", "hidden_size", "num_attention_heads"}
        given = {field.name: 1 for field in target.fields.values() if field.required or field.name in sizes}
        for name in [field.name for field in target.fields.values() if str in field.ready]:
            config = {"_target_": target.name, **given, name: str(file)}
            with contextlib.suppress(DocumentError):  # a file name is not a valid value of most fields
                ModelConfig.from_dict({"_target_": f"{__name__}.Hooked", "generation_config": config})
            tried += 1
    assert tried > 30
    assert str(file) not in opened


@dataclass
class Hooked(ModelConfig):
    builder: ClassVar[str] = "nowhere.Builder"


def test_hooks_are_accepted_only_when_registered() -> None:
    called = []

    def hook(stages: list[Any]) -> list[Any]:
        called.append(stages)
        return stages

    name = f"{__name__}.{hook.__qualname__}"
    document = {"_target_": f"{__name__}.Hooked", "pre_wrap_hooks": [name]}
    with pytest.raises(DocumentError) as error:
        ModelConfig.from_dict(document)
    assert [problem.path for problem in error.value.problems] == ["$.pre_wrap_hooks[0]"]
    register(hook)
    assert ModelConfig.from_dict(document).pre_wrap_hooks == [hook]
    assert called == []
