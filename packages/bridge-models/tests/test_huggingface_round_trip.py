"""Round trips from config.json to a document and back, compared by the config classes of transformers."""

from __future__ import annotations

import json

import pytest
import transformers
from huggingface_cases import FAMILIES, FLAGS, MODELS, one_of
from huggingface_meaning import (
    PUBLISHED,
    Config,
    make_transformers_config,
    meaning,
    missing_tokens,
    without_experts,
    write_with_transformers_5,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.config import Document, DocumentError
from bridge.config.read.reader import Reader
from bridge.models.common.config import LanguageModelConfig
from bridge.models.huggingface import convert, from_hf, load_config_json, to_hf
from bridge.models.huggingface.document_fields import AFFECTS_COMPUTATION, read_fields
from bridge.models.huggingface.families import ARCHITECTURES
from bridge.models.huggingface.matching import write

REFUSED = {"deepseek-ai--DeepSeek-V2": "$.topk_method"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_survive_the_round_trip(name: str) -> None:
    published = load_config_json(str(PUBLISHED[name])).data
    if name in REFUSED:
        with pytest.raises(DocumentError) as error:
            from_hf(published)
        assert [problem.path for problem in error.value.problems] == [REFUSED[name]]
        return
    document = from_hf(published).data
    Document(document).check()
    written_back = to_hf(document).data
    (architecture,) = written_back["architectures"]
    assert hasattr(transformers, architecture)
    assert meaning(written_back) == meaning(published)
    again = from_hf(written_back).data
    assert to_hf(again).data == written_back
    other_spelling = from_hf(write_with_transformers_5(published)).data
    assert to_hf(other_spelling).data == {
        name: value for name, value in written_back.items() if name != "_name_or_path"
    } | missing_tokens(published)


def spell(config: Config, version: int, *, old_type: bool) -> Config:
    """Return the config as a version of transformers spells it."""
    config = json.loads(json.dumps(config))
    scaling = config.pop("rope_scaling", None)
    if version == 4:
        if "dtype" in config:
            config["torch_dtype"] = config.pop("dtype")
        if scaling is not None:
            if old_type:
                scaling["type"] = scaling.pop("rope_type")
            config["rope_scaling"] = scaling
        return config
    parameters = scaling or {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in config:
            parameters[name] = config.pop(name)
    if parameters:
        config["rope_parameters"] = {"rope_type": "default"} | parameters
    return config


def test_every_architecture_has_a_strategy() -> None:
    assert FAMILIES.keys() == ARCHITECTURES.keys()
    assert {config["model_type"] for config in MODELS.values()} == ARCHITECTURES.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_file_survives_the_round_trip(model_type: str, data: st.DataObject) -> None:
    config = data.draw(FAMILIES[model_type], label="config")
    version, old_type = data.draw(one_of(4, 5), label="version"), data.draw(FLAGS, label="old type")
    config = spell(config, version, old_type=old_type)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "_check_fields", lambda *_: [])  # most drawn configs could not run
        document, written_back = _convert_both_ways(config)
        assert len(_list_first_choices(document)) == 1
        assert to_hf(from_hf(written_back).data).data == written_back
        assert to_hf(from_hf(write_with_transformers_5(config)).data).data == written_back | missing_tokens(config)
    expected, actual = meaning(config), meaning(written_back)
    if model_type == "nemotron_h" and "E" not in document["hybrid_layer_pattern"]:
        expected, actual = without_experts(expected), without_experts(actual)
    assert actual == expected
    assert written_back["model_type"] == model_type


def _convert_both_ways(config: Config) -> tuple[Config, Config]:
    document = from_hf(config).data
    return document, to_hf(document).data


def _list_first_choices(document: Config) -> list[str]:
    """Return the architectures that can express a document and do not yield to another of them."""
    fields = read_fields(document)
    of_class = [one for one in ARCHITECTURES.values() if one.target == document["_target_"]]
    fitting = {one.model_type: one for one in of_class if not write(fields, one).problems}
    return [model_type for model_type, one in fitting.items() if not fitting.keys() & set(one.yields_to)]


def test_the_order_of_architectures_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [from_hf(load_config_json(str(PUBLISHED[name])).data).data for name in PUBLISHED if name not in REFUSED]
    plain = [{name: value for name, value in one.items() if name != "extra_checkpoint_metadata"} for one in documents]
    written = [to_hf(document).data for document in plain]
    monkeypatch.setattr(convert, "ARCHITECTURES", dict(reversed(ARCHITECTURES.items())))
    assert [to_hf(document).data for document in plain] == written


numbers = one_of(-1, 0, 1, 2, 3, 8, 64, 10**5, 10**18, 10**400, 0.0, 0.5, 1.5, -2.0, 1e308)
any_data = st.recursive(
    st.none() | st.booleans() | numbers | one_of("", "silu", "yarn", "llama3", "MM*E"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(one_of("type", "factor", "x"), inner, max_size=3),
    max_leaves=4,
)
rope_scalings = st.dictionaries(
    one_of("rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "mscale", "mscale_all_dim"),
    numbers | one_of("yarn", "linear", "llama3"),
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_data_is_refused_or_survives_the_round_trip(data: st.DataObject) -> None:
    model_type = data.draw(one_of(*ARCHITECTURES))
    names = one_of(*ARCHITECTURES[model_type].names, "rope_scaling", "unheard_of")
    config = data.draw(st.dictionaries(names, numbers | any_data, max_size=4))
    if data.draw(FLAGS):
        config["rope_scaling"] = data.draw(rope_scalings)
    try:
        document = from_hf({"model_type": model_type} | config).data
    except DocumentError:
        return
    assert to_hf(document).data["model_type"] == model_type


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_document_is_refused_or_written(data: st.DataObject) -> None:
    preset = data.draw(one_of("llama-3.1-8b", "deepseek-v3", "nemotron-h-8b", "t5-base", "gpt2-124m", "gpt-oss-20b"))
    document = Document.load(preset)
    paths = one_of(*sorted(AFFECTS_COMPUTATION.union(*(one.fields for one in ARCHITECTURES.values()))))
    for path, value in data.draw(st.dictionaries(paths, numbers | any_data, max_size=3)).items():
        document.set(path, value)
    try:
        written = to_hf(document.data)
    except DocumentError:
        return
    assert written.data["model_type"] in ARCHITECTURES


def test_a_finalized_configuration_is_written() -> None:
    """A finalized config has explicit channels, groups, scales and initialisers, which its document leaves out."""
    for name in ("gemma-2b", "Qwen1.5-MoE-A2.7B", "gpt-oss-20b", "Llama-3.2-1B", "t5-base"):
        (file,) = (file for stem, file in PUBLISHED.items() if stem.endswith(name))
        document = from_hf(load_config_json(str(file)).data).data
        config = Document(document).config()
        assert isinstance(config, LanguageModelConfig)
        config.finalize()
        assert meaning(to_hf(config.as_dict()).data) == meaning(to_hf(document).data)


@pytest.mark.parametrize(
    ("preset", "model_type"),
    [
        ("gpt2-124m", "gpt2"),
        ("llama-3.1-405b", "llama"),
        ("deepseek-v3", "deepseek_v3"),
        ("mamba2-2.7b", "mamba2"),
        ("nemotron-h-8b", "nemotron_h"),
        ("t5-11b", "t5"),
    ],
)
def test_presets_can_be_written_as_config_json(preset: str, model_type: str) -> None:
    written = to_hf(Document.load(preset).data).data
    assert written["model_type"] == model_type
    assert make_transformers_config(written)


def test_a_document_records_its_architecture() -> None:
    plain = {"sliding_window": None, "num_hidden_layers": 2}
    documents = {name: from_hf({"model_type": name} | plain).data for name in ("llama", "mistral", "phi3")}
    assert {name: to_hf(data).data["model_type"] for name, data in documents.items()} == {
        name: name for name in documents
    }
    assert "extra_checkpoint_metadata" not in documents["llama"]
    data = documents["mistral"] | {"extra_checkpoint_metadata": {"hf_model_type": "qwen2"}}
    with pytest.raises(DocumentError, match="add_qkv_bias"):
        to_hf(data)
    with pytest.raises(DocumentError, match="unknown architecture 'lama'"):
        to_hf(data | {"extra_checkpoint_metadata": {"hf_model_type": "lama"}})
