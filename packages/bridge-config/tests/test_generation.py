"""Generation settings are lossless, checked, and import transformers only when their object is read."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from bridge.config import ConfigError, Document, DocumentError, ModelConfig
from bridge.config.schema.generation import GenerationSettings, find_wrong_settings
from bridge.config.schema.names import GENERATION_CONFIG

SETTINGS = {
    "max_new_tokens": 7,
    "eos_token_id": [2, 3],
    "sequence_bias": {
        "_target_": "builtins.dict",
        "_args_": [[[{"_target_": "builtins.tuple", "_args_": [[1]]}, 2.0]]],
    },
    "stop_strings": ["\n"],
}

PROGRAM = """
import json, sys
from dataclasses import dataclass
from typing import ClassVar
if sys.argv[1] == "without":
    class Nothing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "transformers":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Nothing())
from bridge.config import Document, ModelConfig

@dataclass
class Model(ModelConfig):
    builder: ClassVar[str] = "nowhere.Builder"
    vocab_size: int = 64

document = Document(json.loads(sys.argv[2]))
config = ModelConfig.from_dict(document.data)
other = Document(config.as_dict())
other.set("generation_config.max_new_tokens", 8)
told = {
    "written": config.as_dict()["generation_config"],
    "fingerprint": Document(config.as_dict()).fingerprint() == document.fingerprint(),
    "differ": [str(one) for one in document.diff(other)],
    "imported": "transformers" in sys.modules,
    "kind": type(settings := config.generation_config).__name__,
    "imported_after": "transformers" in sys.modules,
    "eos": settings["eos_token_id"] if sys.argv[1] == "without" else settings.eos_token_id,
    "torch": "torch" in sys.modules and sys.argv[1] == "without",
}
again = config.as_dict()["generation_config"]
told["again"] = {name: again[name] for name in ("_target_", "eos_token_id", "stop_strings")}
print(json.dumps(told))
"""


@dataclass
class Speaker(ModelConfig):
    builder: ClassVar[str] = "nowhere.Builder"
    vocab_size: int | None = 64
    seq_length: int = 32


def document(settings: Any, cls: type[ModelConfig] = Speaker, **fields: Any) -> dict[str, Any]:
    return {"_target_": f"{cls.__module__}.{cls.__qualname__}", "generation_config": settings, **fields}


def written_settings(**settings: Any) -> dict[str, Any]:
    return {"_target_": GENERATION_CONFIG, **settings}


@pytest.mark.parametrize("transformers", ["with", "without"])
def test_settings_are_kept_as_data_until_first_read(transformers: str) -> None:
    if transformers == "with":
        pytest.importorskip("transformers")
        pytest.importorskip("bridge.models")  # its module declares the class
    given = {"_target_": "__main__.Model", "generation_config": written_settings(**SETTINGS)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, transformers, json.dumps(given)], capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout)
    kept = written_settings(eos_token_id=[2, 3], stop_strings=["\n"])
    is_there = transformers == "with"
    assert result == {
        "written": written_settings(**SETTINGS),
        "fingerprint": True,
        "differ": ["~ generation_config.max_new_tokens: 7 -> 8"],
        "imported": False,
        "kind": "GenerationConfig" if is_there else "GenerationSettings",
        "imported_after": is_there,
        "eos": [2, 3],
        "torch": False,
        "again": kept,
    }


def test_settings_are_converted_only_once() -> None:
    transformers = pytest.importorskip("transformers")
    config: Any = ModelConfig.from_dict(document(written_settings(**SETTINGS)))
    before = copy.deepcopy(config), pickle.loads(pickle.dumps(config))
    made = config.generation_config
    assert type(made) is transformers.GenerationConfig
    assert config.generation_config is made
    assert made.to_dict() == transformers.GenerationConfig(**SETTINGS | {"sequence_bias": {(1,): 2.0}}).to_dict()
    for one in before:
        assert one.generation_config.to_dict() == made.to_dict()
    assert replace(config, vocab_size=80).generation_config is made
    made.max_new_tokens = 8
    assert config.as_dict()["generation_config"]["max_new_tokens"] == 8


@pytest.mark.parametrize("text", ["json", "yaml"])
def test_a_real_object_survives_both_text_formats(text: str) -> None:
    from bridge.config.text.parse import parse_yaml

    transformers = pytest.importorskip("transformers")
    settings = transformers.GenerationConfig(
        max_new_tokens=7, temperature=0.5, do_sample=True, eos_token_id=[2, 3], sequence_bias={(1, 2): -1.0}
    )
    one = Document.of(Speaker(generation_config=settings))
    data = json.loads(one.to_json()) if text == "json" else parse_yaml(one.to_yaml()).data
    assert data == one.data
    back: Any = ModelConfig.from_dict(data)
    assert back.as_dict() == data
    assert Document(data).fingerprint() == one.fingerprint()
    assert back.generation_config.to_dict() == settings.to_dict()
    assert back.as_dict() == data


def test_none_and_plain_mappings_are_kept() -> None:
    assert Speaker.generation_config is None
    assert Speaker().generation_config is None
    config: Any = ModelConfig.from_dict(document({"max_new_tokens": 7}))
    assert config.generation_config == {"max_new_tokens": 7}
    assert type(config.generation_config) is dict
    settings = GenerationSettings({"top_k": 3})
    assert (settings, len(settings), repr(settings)) == ({"top_k": 3}, 1, "GenerationSettings({'top_k': 3})")


@dataclass
class Holder(Speaker):
    anything: Any = None


def test_the_class_itself_is_not_taken_for_settings() -> None:
    transformers = pytest.importorskip("transformers")
    config: Any = ModelConfig.from_dict(document({"_target_": GENERATION_CONFIG, "_call_": False}))
    assert config.generation_config is transformers.GenerationConfig


def test_other_fields_are_converted_at_once() -> None:
    transformers = pytest.importorskip("transformers")
    config: Any = ModelConfig.from_dict(document(None, Holder, anything=[written_settings(top_k=3)]))
    assert type(config.anything[0]) is transformers.GenerationConfig


@dataclass
class OwnField(Speaker):
    generation_config: Any = None


def test_a_class_that_redeclares_the_field_gets_the_object() -> None:
    transformers = pytest.importorskip("transformers")
    config: Any = ModelConfig.from_dict(document(written_settings(top_k=3), OwnField))
    assert type(vars(config)["generation_config"]) is transformers.GenerationConfig


def test_an_error_of_transformers_is_raised_when_the_object_is_made() -> None:
    pytest.importorskip("transformers")
    config: Any = ModelConfig.from_dict(document(written_settings(max_new_tokens=-1)))
    with pytest.raises(ConfigError, match=r"\$\.generation_config: GenerationConfig refuses these values"):
        _ = config.generation_config


@pytest.mark.parametrize("given", [written_settings, dict, GenerationSettings], ids=["written", "mapping", "settings"])
@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"eos_token_id": 64}, (64, 64)),
        ({"eos_token_id": [2, 70, 64]}, (70, 64)),
        ({"pad_token_id": 64}, (64, 64)),
        ({"bos_token_id": 99}, (99, 64)),
        ({"decoder_start_token_id": 64}, (64, 64)),
        ({"forced_eos_token_id": [1, 64]}, (64, 64)),
        ({"suppress_tokens": [1, 64]}, (64, 64)),
        ({"bad_words_ids": [[1], [2, 65]]}, (65, 64)),
        ({"max_length": 33}, (33, 32)),
        ({"max_new_tokens": 40}, (40, 32)),
    ],
)
def test_stop_tokens_and_lengths_fit_the_model(settings: dict[str, Any], numbers: tuple[int, int], given: Any) -> None:
    [name] = settings
    value = given(settings) if given is GenerationSettings else given(**settings)
    for check in (Document(document(value)).check, Document(document(value)).config):
        with pytest.raises(DocumentError) as caught:
            check()
        [problem] = caught.value.problems
        assert problem.path == f"$.generation_config.{name}"
        assert all(str(number) in problem.message for number in numbers)


def test_the_largest_token_and_length_are_accepted() -> None:
    settings = {"eos_token_id": [63], "max_length": 32, "pad_token_id": -1, "bos_token_id": None, "min_length": True}
    assert Document(document(written_settings(**settings))).check()
    assert Document(
        document(written_settings(eos_token_id=10**6), vocab_size=None)
    ).check()  # the size is not known yet
    with pytest.raises(DocumentError, match="seq_length = 16"):
        Document(document(written_settings(max_length=32), seq_length=16)).check()
    real = pytest.importorskip("transformers").GenerationConfig(eos_token_id=64)
    assert [name for name, _ in find_wrong_settings(real, vocab_size=64, seq_length=None)] == ["eos_token_id"]


def test_problems_are_reported_at_their_line(tmp_path: Any) -> None:
    file = tmp_path / "model.yaml"
    lines = [f"_target_: {__name__}.Speaker", "vocab_size: 8", "generation_config:", f"  _target_: {GENERATION_CONFIG}"]
    file.write_text("\n".join([*lines, "  eos_token_id: 8", ""]))
    with pytest.raises(DocumentError) as caught:
        Document.load(file).check()
    [problem] = caught.value.problems
    assert (problem.line, problem.path) == (5, "$.generation_config.eos_token_id")
