"""JSON Schemas are valid, accept what the checker accepts, and refuse what an editor should underline."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from bridge.config.errors import DocumentError, TargetError
from bridge.config.paths import format_path
from bridge.config.read.decode import check
from bridge.config.schema.annotations import (
    Choice,
    Dtype,
    Fixed,
    Function,
    Instance,
    Items,
    Mapping,
    Member,
    Plain,
    Type,
)
from bridge.config.schema.jsonschema import list_schema_targets, make_json_schema
from bridge.config.schema.ranges import Range, get_ranges
from bridge.config.schema.table import get_shipped, get_shipped_dtypes
from bridge.config.schema.target import Target

GPT = "bridge.models.gpt.GPTModelConfig"
TRANSFORMER = "megatron.core.transformer.transformer_config.TransformerConfig"
MLA = "megatron.core.transformer.transformer_config.MLATransformerConfig"
HETEROGENEOUS = "megatron.core.transformer.heterogeneous.heterogeneous_config.HeterogeneousTransformerConfig"
BACKEND = "megatron.core.transformer.enums.AttnBackend"
PRESETS = sorted((Path(__file__).parents[2] / "bridge-models/src/bridge/models/presets").glob("*.yaml"))
BLOCKS = json.dumps({"block_configs": [{"attention": {"n_heads_in_group": 1}, "ffn": {"ffn_mult": 2.0}}] * 2})
SMALL = {"_target_": GPT, "transformer": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}}

VALIDATOR = Draft202012Validator(make_json_schema(GPT))


def problems(document: dict[str, Any]) -> list[str]:
    """Return the paths of the schema's errors."""
    return [format_path(tuple(error.absolute_path)) for error in VALIDATOR.iter_errors(document)]


def is_accepted(document: dict[str, Any]) -> bool:
    """Return whether the checker accepts the document."""
    try:
        check(document)
    except DocumentError:
        return False
    return True


def small_model(**fields: Any) -> dict[str, Any]:
    return {**SMALL, "transformer": {**SMALL["transformer"], **fields}}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", list_schema_targets())
def test_each_schema_is_valid_and_documents_every_field(name: str) -> None:
    schema = make_json_schema(name)
    Draft202012Validator.check_schema(schema)
    assert schema["description"]
    silent = [key for key, about in schema["properties"].items() if not about.get("description")]
    assert not silent


def test_an_unknown_target_is_refused_with_a_suggestion() -> None:
    with pytest.raises(TargetError, match=r"did you mean 'bridge\.models\.gpt\.GPTModelConfig'"):
        make_json_schema("bridge.models.gpt.GPTModelConfg")
    with pytest.raises(TargetError, match="not a config"):
        make_json_schema("torch.nn.functional.gelu")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_match_their_schema(preset: Path) -> None:
    document = yaml.safe_load(preset.read_text())
    assert list(Draft202012Validator(make_json_schema(document["_target_"])).iter_errors(document)) == []


def test_documents_of_real_configs_match_their_schema() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("megatron.core")
    from megatron.core.quantization.quant_config import RecipeConfig
    from megatron.core.transformer.enums import AttnBackend, CudaGraphModule
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from bridge.models.gpt import GPTModelConfig

    size = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = [
            TransformerConfig(**size),
            TransformerConfig(
                **size,
                activation_func=torch.nn.functional.silu,
                init_method=partial(torch.nn.init.normal_, std=0.1),
                output_layer_init_method=torch.nn.init.zeros_,
                params_dtype=torch.bfloat16,
                window_size=(8, 0),
                softmax_scale=float("inf"),
                attention_backend=AttnBackend.flash,
                cuda_graph_modules=[CudaGraphModule.attn],
                pipeline_model_parallel_layout="Et|tL",
                pipeline_model_parallel_size=2,
                pipeline_dtype=torch.float32,
                quant_recipe=RecipeConfig([], {"a": {"b": [1]}}),
                grad_scale_func=lambda loss: loss,
            ),
            MLATransformerConfig(**size),
            HeterogeneousTransformerConfig(**size, heterogeneous_layers_config_encoded_json=BLOCKS),
        ]
        documents = [GPTModelConfig(transformer=transformer).as_dict() for transformer in transformers]
        spec = ModuleSpec(module=torch.nn.Linear, submodules={"a": ModuleSpec(module=torch.nn.ReLU)})
        documents.append(GPTModelConfig(transformer=transformers[0], transformer_layer_spec=spec).as_dict())
    assert [problems(document) for document in documents] == [[]] * len(documents)
    assert "_omitted_" in documents[1]


VALID: dict[str, dict[str, Any]] = {
    "explicit class": small_model(_target_=TRANSFORMER),
    "another class": small_model(_target_=MLA, rotary_base=5e5),
    "builder": {**SMALL, "_builder_": "bridge.models.gpt.GPTModelBuilder"},
    "whole number where a number is expected": small_model(hidden_dropout=0),
    "infinity": small_model(softmax_scale={"_target_": "builtins.float", "_args_": ["inf"]}),
    "short dtype": small_model(params_dtype="bf16" if "bf16" in get_shipped_dtypes() else "bfloat16"),
    "dtype itself": small_model(params_dtype={"_target_": "torch.bfloat16", "_call_": False}),
    "alias": small_model(activation_func="silu"),
    "function itself": small_model(activation_func={"_target_": "torch.nn.functional.silu", "_call_": False}),
    "partial": small_model(
        init_method={"_target_": "torch.nn.init.normal_", "_partial_": True, "_args_": [], "std": 0.1}
    ),
    "enumeration": small_model(attention_backend="flash"),
    "enumeration member": small_model(attention_backend={"_target_": BACKEND, "_name_": "flash"}),
    "tuple": small_model(window_size=[8, 0]),
    "tuple written out": small_model(window_size={"_target_": "builtins.tuple", "_args_": [[8, 0]]}),
    "field that is computed": {
        **SMALL,
        "transformer": {
            **SMALL["transformer"],  # type: ignore[dict-item]
            "_target_": HETEROGENEOUS,
            "heterogeneous_layers_config_encoded_json": BLOCKS,
            "per_block_parameters": [],
        },
    },
    "omitted": {**SMALL, "_omitted_": [{"path": "$.transformer.timers", "reason": "a live object"}]},
}

INVALID: dict[str, tuple[str, dict[str, Any]]] = {
    "no class": ("$", {"transformer": {}}),
    "another document's class": ("$._target_", {**SMALL, "_target_": TRANSFORMER}),
    "no transformer": ("$", {"_target_": GPT}),
    "unknown key": ("$", {**SMALL, "vocab_sise": 1}),
    "unknown key below": ("$.transformer", small_model(num_layer=2)),
    "key of the embedded config": ("$", {**SMALL, "num_layers": 2}),
    "key of this embedded config": ("$", {**small_model(_target_=MLA), "rotary_base": 1}),
    "key of another class": ("$.transformer", small_model(q_lora_rank=2)),
    "unknown class": ("$.transformer._target_", small_model(_target_="os.system")),
    "class that does not fit": ("$.transformer._target_", small_model(_target_=GPT)),
    "text for a number": ("$.transformer.num_layers", small_model(num_layers="2")),
    "fraction for an integer": ("$.transformer.num_layers", small_model(num_layers=2.5)),
    "boolean for a number": ("$.transformer.hidden_dropout", small_model(hidden_dropout=True)),
    "number for a boolean": ("$.transformer.fp16", small_model(fp16=1)),
    "null": ("$.transformer.num_layers", small_model(num_layers=None)),
    "unknown choice": ("$.transformer.normalization", small_model(normalization="LayerNrom")),
    "unknown member": ("$.transformer.attention_backend", small_model(attention_backend="flsh")),
    "unknown dtype": ("$.transformer.params_dtype", small_model(params_dtype="torch.bfloat17")),
    "number for a function": ("$.transformer.activation_func", small_model(activation_func=1)),
    "function that is called": (
        "$.transformer.activation_func",
        small_model(activation_func={"_target_": "silu", "_call_": True}),
    ),
    "partial with a private keyword": (
        "$.transformer.init_method",
        small_model(init_method={"_target_": "torch.nn.init.normal_", "_partial_": True, "_recursive_": 1}),
    ),
    "tuple too short": ("$.transformer.window_size", small_model(window_size=[8])),
    "tuple too long": ("$.transformer.window_size", small_model(window_size=[8, 0, 0])),
    "wrong item": ("$.transformer.window_size", small_model(window_size=[8, "0"])),
    "reason missing": ("$._omitted_[0]", {**SMALL, "_omitted_": [{"path": "$.transformer.timers"}]}),
}


@pytest.mark.parametrize("document", VALID.values(), ids=VALID)
def test_documents_that_the_checker_accepts_match(document: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # omitted values give a warning
        assert is_accepted(document)
    assert problems(document) == []


@pytest.mark.parametrize(("path", "document"), INVALID.values(), ids=INVALID)
def test_invalid_documents_do_not_match_and_the_position_is_reported(path: str, document: dict[str, Any]) -> None:
    assert not is_accepted(document)
    assert path in problems(document)


def test_a_name_registered_by_a_program_matches() -> None:
    assert problems(small_model(activation_func="my_package.my_activation")) == []


def values(type_: Type) -> st.SearchStrategy[Any]:
    return st.one_of([_values(member) for member in type_])


def _values(member: Member) -> st.SearchStrategy[Any]:
    match member:
        case Plain(kind):
            return {
                "bool": st.booleans(),
                "int": st.integers(),
                "float": st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
                "str": st.text(),
                "null": st.none(),
            }[kind]
        case Choice(choices):
            return st.sampled_from(choices)
        case Items(_, item):
            items = values(item)
            return st.just([]) if items.is_empty else st.lists(items, max_size=2)
        case Fixed(items):
            return st.tuples(*map(values, items)).map(list)
        case Dtype():
            return st.sampled_from(sorted(get_shipped_dtypes()))
        case Function():
            return st.sampled_from(["gelu", "torch.nn.init.zeros_", {"_target_": "silu", "_partial_": True, "a": 1}])
        case Instance(name) if (target := get_shipped(name)) is not None:
            short = st.sampled_from(target.members)
            long = short.map(lambda member: {"_target_": name, "_name_": member})
            return mappings(target) if target.kind == "config" else short | long
        case Mapping(_, value):
            return st.dictionaries(st.text(st.characters(categories=["L"])), values(value), max_size=2)
        case _:
            return st.nothing()  # opaque values have no written form


def mappings(target: Target) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy of mappings for a config with some of its fields."""
    ranges = get_ranges(target.bases)
    fields = {
        field.name: in_range(values(field.type), ranges.get(field.name))
        for field in target.fields.values()
        if field.init and field.name not in DEPENDENT_FIELDS
    }
    required = {name: fields[name] for name in fields if target.fields[name].required}
    some = st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True)
    return some.flatmap(lambda names: st.fixed_dictionaries(required | {name: fields[name] for name in names}))


def in_range(values: st.SearchStrategy[Any], allowed: Range | None) -> st.SearchStrategy[Any]:
    """Replace numbers outside the field's range: too few random numbers are, for example, between 0 and 1."""
    if allowed is None:
        return values
    numbers = [number for number in (0, 1, 7, 0.5, 7.5) if number in allowed]

    def replace(value: Any) -> Any:
        outside = isinstance(value, int | float) and not isinstance(value, bool) and value not in allowed
        return next(number for number in numbers if type(number) is type(value)) if outside else value

    return values.map(replace)


# Fields whose valid values depend on other fields; a schema cannot express that.
DEPENDENT_FIELDS = frozenset(
    {
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "no_rope_freq",
        "num_moe_experts",
        "moe_router_topk",
        "moe_router_group_topk",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "window_size",
        "qk_pos_emb_head_dim",
        "multi_latent_attention",
        "fp16",
        "bf16",
        "kv_channels",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "v_head_dim",
    }
)

JUNK = st.sampled_from([None, True, 7, 0.5, "no such thing", [], ["x"], [[1]], {}, {"x": 1}, {"_target_": "os.system"}])


@settings(deadline=None)
@given(
    name=st.sampled_from([TRANSFORMER, MLA]),
    junk=st.dictionaries(st.sampled_from([*get_shipped(TRANSFORMER).fields, "num_layer"]), JUNK, max_size=1),
    data=st.data(),
)
def test_generated_documents_that_the_checker_accepts_match(
    name: str, junk: dict[str, Any], data: st.DataObject
) -> None:
    target = get_shipped(name)
    assert target is not None
    valid = data.draw(mappings(target))
    document = {"_target_": GPT, "transformer": {**SMALL["transformer"], "_target_": name, **valid, **junk}}
    if is_accepted(document):
        assert problems(document) == []
    else:
        assert junk  # the fields themselves are valid
