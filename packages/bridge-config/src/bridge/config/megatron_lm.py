"""Write a document as arguments of Megatron-LM's `pretrain_gpt.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.config.canonical import canonicalize
from bridge.config.errors import DocumentError, Problem, quote_name
from bridge.config.foreign.megatron_args import convert_arguments
from bridge.config.foreign.names import GPT, LAYERS, MLA, TRANSFORMER, YARN
from bridge.config.foreign.to_arguments import choose_arguments, derive_arguments, format_arguments, has_no_effect
from bridge.config.problems import abbreviate

# What a document says beside the model.
_NOT_THE_MODEL = ("hf_model_id", "generation_config", "pre_wrap_hooks", "post_wrap_hooks", "extra_checkpoint_metadata")
_TANH_GELU = {"_target_": "torch.nn.functional.gelu", "_partial_": True, "approximate": "tanh"}
_MISSING = object()


@dataclass(frozen=True)
class Arguments:
    """Arguments for `pretrain_gpt.py`."""

    words: list[list[str]]
    """Each argument: an option, and its values."""

    notes: list[str]
    """What the arguments do not say, without an effect on the model; one line each."""


def to_megatron_lm(data: object) -> Arguments:
    """Return arguments with which `pretrain_gpt.py` of megatron-core 0.19.2 makes the model of a document.

    Args:
        data: A document of any version.

    Raises:
        DocumentError: The document has problems, or lists every field that no argument can express.
    """
    model = canonicalize(data, defaults=True)
    _refuse_other_models(model)
    notes = _resolve_derived(model)
    chosen = choose_arguments(model)
    words = format_arguments(chosen)
    there = convert_arguments(derive_arguments({name: chosen[name] for name in words}))
    assert there is not None
    understood = canonicalize(there.data, defaults=True)
    problems, no_effect = [], []
    for path, value, other in _find_differences(model, understood):
        if has_no_effect(path.rpartition(".")[2], model):
            no_effect.append(path)
        else:
            problems.append(_make_problem(path, value, other))
    if problems:
        raise DocumentError(problems)
    left_out = [name for name in _NOT_THE_MODEL if model.get(name)]
    left_out += [entry["path"] for entry in model.get("_omitted_", ())]
    if left_out:
        notes.append(f"left out, Megatron-LM has no arguments for it: {', '.join(left_out)}")
    written = canonicalize(data)
    if no_effect := [path for path in no_effect if _is_written(path, written)]:
        notes.append(f"differ in Megatron-LM, without an effect on the model: {', '.join(no_effect)}")
    return Arguments([*words.values()], notes)


def _refuse_other_models(model: Mapping[str, Any]) -> None:
    if model["_target_"] != GPT:
        raise DocumentError([Problem("$._target_", f"pretrain_gpt.py trains only {GPT}, got {model['_target_']}")])
    transformer = model["transformer"]["_target_"]
    if transformer not in (TRANSFORMER, MLA, YARN):
        message = f"{transformer} cannot be written as arguments: only {TRANSFORMER}, {MLA} and {YARN} can"
        raise DocumentError([Problem("$.transformer._target_", message)])


def _resolve_derived(model: dict[str, Any]) -> list[str]:
    """Replace values by others that compute the same and have an argument; return notes."""
    transformer = model["transformer"]
    if model["transformer_layer_spec"] == LAYERS[GPT]:  # the same as None; converted documents name it
        model["transformer_layer_spec"] = None
    if transformer["virtual_pipeline_model_parallel_size"] == 1:  # no virtual pipeline, as `bridge search` writes it
        transformer["virtual_pipeline_model_parallel_size"] = None
    if transformer["ffn_hidden_size"] is None:  # megatron-core: 4 times hidden_size; Megatron-LM: 8/3 if it is gated
        transformer["ffn_hidden_size"] = 4 * transformer["hidden_size"]
    if None in (transformer.get("yarn_mscale", 1.0), transformer.get("yarn_mscale_all_dim", 0.0)):
        transformer |= {"yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0}  # these have the same factor as None
    can_fuse = transformer["add_bias_linear"] and not transformer["gated_linear_unit"]
    if transformer["activation_func"] != _TANH_GELU or not can_fuse or transformer["num_moe_experts"]:
        return []
    # The fused kernel of megatron-core 0.19.2 (fused_bias_gelu) computes this approximation whatever the GELU.
    transformer |= {"activation_func": _TANH_GELU["_target_"], "bias_activation_fusion": True}
    return ["transformer.activation_func: left to --bias-gelu-fusion, a default, which computes GELU with tanh"]


def _find_differences(model: Mapping[str, Any], understood: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the path of each field that Megatron-LM understands differently, its value, and the value there."""
    for section, there, prefix in (
        (model, understood, ""),
        (model["transformer"], understood["transformer"], "transformer."),
    ):
        for name in dict.fromkeys((*section, *there)):
            value, other = section.get(name, _MISSING), there.get(name, _MISSING)
            if name not in (*_NOT_THE_MODEL, "transformer", "_version_", "_omitted_") and value != other:
                yield f"{prefix}{name}", value, other


def _is_written(path: str, written: Mapping[str, Any]) -> bool:
    section, _, name = path.rpartition(".")
    return name in (written[section] if section else written)


def _make_problem(path: str, value: Any, other: Any) -> Problem:
    wanted = "what it is" if value is _MISSING else quote_name(value) if isinstance(value, str) else abbreviate(value)
    instead = "" if other is _MISSING else f": the model would have {abbreviate(other)}"
    remedy = f"; for the default layers, remove it: ~{path}" if path == "transformer_layer_spec" else ""
    return Problem(f"$.{path}", f"no argument of Megatron-LM sets this to {wanted}{instead}{remedy}")
