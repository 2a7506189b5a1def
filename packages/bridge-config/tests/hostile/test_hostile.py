"""Hostile documents are refused where they are hostile, and nothing else happens.

corpus.yaml lists them, reading.py reads and watches.
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
from bridge.config.schema.table import shipped, shipped_names

READING = Path(__file__).parent / "reading.py"
CORPUS: list[dict[str, Any]] = runpy.run_path(str(READING))["corpus"]()
MEGABYTE = 2**20

Read = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """What a reader does with the documents: read(reader, name, ...), each once."""

    @cache
    def outcomes(reader: str, *names: str) -> dict[str, Any]:
        if reader == "from_dict" and not importlib.util.find_spec("megatron"):
            pytest.skip("needs megatron-core")
        program = [sys.executable, str(READING), reader, str(tmp_path_factory.mktemp(reader)), *names]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    return outcomes


@pytest.mark.parametrize("reader", ["from_dict", "validate"])
def test_harmless_documents_are_accepted(reader: str, read: Read) -> None:
    harmless = {name: told for name, told in read(reader).items() if name.startswith("harmless")}
    assert len(harmless) == len(runpy.run_path(str(READING))["HARMLESS"])
    assert {name: told["problems"] for name, told in harmless.items() if told["verdict"] != "accepted"} == {}


@pytest.mark.parametrize("reader", ["from_dict", "validate"])
@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry["name"]) for entry in CORPUS])
def test_hostile_documents_are_refused_without_side_effects(entry: dict[str, Any], reader: str, read: Read) -> None:
    told = read(reader)[entry["name"]]
    assert told["verdict"] == ("refused" if "at" in entry else "accepted"), told
    at = entry.get("at") or []
    if at or "at" not in entry:
        assert {path for path, _ in told["problems"]} == set([at] if isinstance(at, str) else at)
    assert (told["events"], told["modules"], told["ran"]) == ([], [], False)
    assert told["said"] == "", "nothing is said but the problems"
    assert [message for _, message in told["problems"] if not message.isprintable() or len(message) > 2000] == []
    assert told["peak"] < 64 * MEGABYTE
    assert told["seconds"] < 5


def test_the_verdict_is_the_same_with_and_without_torch(read: Read) -> None:
    without, with_torch = read("validate"), read("from_dict")
    assert not {"torch", "megatron"} & set(without[""]["modules"])
    assert {"torch", "megatron"} <= set(with_torch[""]["modules"])
    names = [entry["name"] for entry in CORPUS]
    assert {name: without[name]["problems"] for name in names} == {name: with_torch[name]["problems"] for name in names}


def test_the_audit_hook_detects_what_a_naive_reader_does(read: Read) -> None:
    told = read("naive", "import-class", "os-system", "yaml-apply", "large-text")
    assert told["import-class"]["ran"]
    assert "bridge_trap" in told["import-class"]["modules"]
    assert told["os-system"]["events"] == ["os.system b'true'"]
    assert told["yaml-apply"]["ran"]
    assert told["large-text"]["verdict"] == "died"


def test_no_constructor_opens_a_file_named_in_a_document(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    file = tmp_path / "layers.json"
    file.write_text('{"block_configs": []}')
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    tried = 0
    for target in (one for name in shipped_names() if (one := shipped(name)) and one.kind == "config"):
        # A transformer of no size divides by zero before it does anything else.
        sizes = {"num_layers", "hidden_size", "num_attention_heads"}
        given = {field.name: 1 for field in target.fields.values() if field.required or field.name in sizes}
        for name in [field.name for field in target.fields.values() if str in field.ready]:
            config = {"_target_": target.name, **given, name: str(file)}
            with contextlib.suppress(DocumentError):  # most are no good texts for their field
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
