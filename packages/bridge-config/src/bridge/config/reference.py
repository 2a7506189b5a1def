"""The forms of the reference (`megatron.training.models`) and of Megatron Bridge: read, and written for them.

They write a model as a config that embeds a transformer, or as a provider that is a transformer with more fields, alone
or under `model` in a `run_config.yaml`. What these forms cannot say, or Bridge cannot know of them, is told by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeGuard

from bridge.config.errors import DocumentError, Problem
from bridge.config.generation import GENERATION_CONFIG
from bridge.config.migrate import Migrated, config_at, inner_type
from bridge.config.paths import Path, shown

if TYPE_CHECKING:
    from bridge.config.tables import Target
    from bridge.config.types import Type

_OWNERS = ("megatron.training.", "megatron.bridge.")

_GPT = "bridge.models.gpt.GPTModelConfig"
_GPT_BUILDER = "bridge.models.gpt.GPTModelBuilder"
_CORE = "megatron.core.transformer.transformer_config"
_TRANSFORMER = f"{_CORE}.TransformerConfig"
_MLA = f"{_CORE}.MLATransformerConfig"
_HETEROGENEOUS = "megatron.core.transformer.heterogeneous.heterogeneous_config.HeterogeneousTransformerConfig"

_GPT_MODULES = (
    "megatron.training.models.gpt",  # the first is the one that we write
    "megatron.bridge.compat.mcore_gpt",
    "megatron.bridge.models.gpt.gpt_builder",
    "megatron.bridge.models.gpt.mcore_gpt_compat",
)
_GPT_CONFIGS = (
    *(f"{module}.GPTModelConfig" for module in _GPT_MODULES),
    "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig",
)
# Modules whose providers add fields and defaults to a GPT, and no code.
_GPT_PROVIDERS = (
    "megatron.bridge.models.gpt_provider",
    "megatron.bridge.models.llama.llama_provider",
    "megatron.bridge.models.qwen.qwen_provider",
    "megatron.bridge.models.mistral.mistral_provider",
    "megatron.bridge.models.deepseek.deepseek_provider",
    "megatron.bridge.models.mla_provider",
)
_OTHER_MODELS = {
    "megatron.training.models.hybrid.": "a hybrid (Mamba) model",
    "megatron.bridge.models.hybrid.": "a hybrid (Mamba) model",
    "megatron.bridge.models.mamba.": "a hybrid (Mamba) model",
    "megatron.bridge.models.nemotronh.": "a hybrid (Mamba) model",
    "megatron.bridge.models.t5_provider.": "a T5 model",
}

_DEFAULT_LAYERS = "bridge.models.layer_specs.default_layer_spec"
_NAMES = {
    **{f"{module}.GPTModelBuilder": _GPT_BUILDER for module in _GPT_MODULES},
    **{f"{module}.default_layer_spec": _DEFAULT_LAYERS for module in (*_GPT_MODULES, _GPT_PROVIDERS[0])},
    "megatron.bridge.models.transformer_config.TransformerConfig": _TRANSFORMER,
    "megatron.bridge.models.transformer_config.MLATransformerConfig": _MLA,
    "megatron.bridge.models.transformer_config.HeterogeneousTransformerConfig": _HETEROGENEOUS,
    # Where Python says that torch's built-in functions live.
    "torch._C._nn.gelu": "torch.nn.functional.gelu",
    "torch._C._nn.softplus": "torch.nn.functional.softplus",
    "torch._VariableFunctionsClass.tanh": "torch.tanh",
    "torch._VariableFunctionsClass.sigmoid": "torch.sigmoid",
    "torch.nn.functional.tanh": "torch.tanh",
    "torch.nn.functional.sigmoid": "torch.sigmoid",
}
_ACTIVATIONS = {"relu2": "squared_relu", "gelu_pytorch_tanh": "fast_gelu"}
# Layer specs that the default choice comes to by itself, for a transformer that sets the field.
_CHOSEN_LAYERS = {
    "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec": "num_moe_experts",
    "megatron.core.models.gpt.experimental_attention_variant_module_specs."
    "get_transformer_block_with_experimental_attention_variant_spec": "experimental_attention_variant",
}
_ENUMS = "megatron.core.transformer.enums."  # the values of all of these count from 1

# Set by a training loop, for its own run.
_RUNTIME = frozenset(
    [
        "timers",
        "finalize_model_grads_func",
        "grad_scale_func",
        "moe_grad_scale_func",
        "mtp_grad_scale_func",
        "no_sync_func",
        "grad_sync_func",
        "param_sync_func",
        "pre_wrap_hooks",
        "post_wrap_hooks",
    ]
)
# Fields that change nothing about the model, or that other fields repeat.
_IDLE = frozenset(["max_position_embeddings", "mtp_enabled", "async_tensor_model_parallel_allreduce"])
# Llama 3.1 as older providers wrote it; these are the numbers that megatron-core's own scaling has built in.
_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
# Where a GPTModelProvider and a GPTModelConfig with its TransformerConfig differ by default.
_PROVIDER_DEFAULTS = {
    "share_embeddings_and_output_weights": True,
    "attention_softmax_in_fp32": False,
    "deallocate_pipeline_outputs": True,
    "cross_entropy_loss_fusion": True,
}


def adopted(data: object) -> Migrated:
    """The document `data` of the reference in Bridge's own form; any other document as it is, the very same object.

    A document is the reference's if its `_target_` is, or if it has none and that of its `model` section is.

    Raises:
        DocumentError: it describes a model that Bridge has no configuration for.
    """
    found = _model_section(data)
    return Migrated(data) if found is None else _Adoption(*found).finished()


def _model_section(data: object) -> tuple[dict[str, Any], Path, list[str]] | None:
    """The model in a document of the reference, where it stands, and the names of the other sections."""
    if not isinstance(data, dict):
        return None
    model = data.get("model")
    if _is_theirs(model) and ("_target_" not in data or _is_theirs(data)):
        return model, ("model",), [str(key) for key in data if key not in ("model", "_target_")]
    return (data, (), []) if _is_theirs(data) else None


def _is_theirs(data: object) -> TypeGuard[dict[str, Any]]:
    name = data.get("_target_") if isinstance(data, dict) else None
    return isinstance(name, str) and name.startswith(_OWNERS)


def _is_provider(name: str, path: Path) -> bool:
    """Whether the GPT called `name` is written as a provider.

    Raises:
        DocumentError: it is not known to be a GPT.
    """
    if name in _GPT_CONFIGS:
        return False
    module, _, cls = name.rpartition(".")
    if module in _GPT_PROVIDERS and "Provider" in cls:
        return True
    for prefix, what in _OTHER_MODELS.items():
        if name.startswith(prefix):
            raise DocumentError([Problem(shown(path), f"{cls} is {what}: Bridge has no configuration for it yet")])
    plain = f"{_GPT_PROVIDERS[0]}.GPTModelProvider" if "Provider" in cls else _GPT_CONFIGS[0]
    message = f"Bridge does not know what {cls} adds to a GPT: if it adds nothing but values, write {plain!r} here"
    raise DocumentError([Problem(shown(path), message)])


class _Adoption:
    """One model of the reference on its way to a document of ours."""

    def __init__(self, data: dict[str, Any], at: Path, sections: list[str]) -> None:
        self._at = at
        self._is_provider = _is_provider(data["_target_"], (*at, "_target_"))
        self._result = Migrated({}, moves=[((), at)] if at else [])
        self._top: dict[str, Any] = {"_target_": _GPT}
        self._transformer: dict[str, Any] = {}
        self._left_out: dict[str, list[str]] = {}
        if sections:
            self._note(f"left out, Bridge reads the model alone: {', '.join(sections)}")
        self._take(data)

    def finished(self) -> Migrated:
        """The document, and what is to be said about it."""
        for why, names in self._left_out.items():
            self._note(f"left out, {why}: {', '.join(names)}")
        self._result.data = self._top
        return self._result

    def _note(self, text: str) -> None:
        self._result.notes.append(text)

    def _problem(self, path: Path, message: str) -> None:
        self._result.problems.append((path, message))

    def _take(self, data: dict[str, Any]) -> None:
        from bridge.config.tables import shipped

        self._take_builder(data.get("_builder_"))
        inner = data.get("transformer")
        nested = inner if isinstance(inner, dict) else {}
        cls = _flat_class(data) if self._is_provider else _renamed(nested.get("_target_", _TRANSFORMER))
        transformer, gpt = shipped(cls) if isinstance(cls, str) else None, shipped(_GPT)
        if gpt is None or (inner is not None and not nested and not self._is_provider):
            self._top |= {"transformer": inner}  # whoever reads the document says what is wrong with it
        else:
            self._transformer["_target_"] = cls
            self._top["transformer"] = self._transformer
        self._sort_inner(nested, transformer)
        self._sort_top(data, gpt, transformer)
        if self._is_provider:
            self._take_provider(data)
        self._tell_lost_functions()

    def _take_builder(self, name: object) -> None:
        if name is not None:
            self._top["_builder_"] = _renamed(name)

    def _sort_inner(self, data: dict[str, Any], target: Target | None) -> None:
        for key, value in data.items():
            path = (*self._at, "transformer", key)
            if target is not None and key in target.fields:
                self._put(self._transformer, key, value, target, path)
            elif key != "_target_":
                self._unknown(key, value, path)

    def _sort_top(self, data: dict[str, Any], gpt: Target | None, transformer: Target | None) -> None:
        own = gpt.fields if gpt else {}
        owned = transformer.fields if transformer else {}
        for key, value in data.items():
            path = (*self._at, key)
            if key in ("_target_", "_builder_") or (key == "transformer" and not self._is_provider):
                continue
            if key in owned and key in self._transformer:
                self._given_twice(key, value, declared=key in own, path=path)
            elif key in owned and transformer is not None:
                self._put(self._transformer, key, value, transformer, path)
                if key in self._transformer:
                    self._result.moves.append((("transformer", key), path))
            elif key in own and gpt is not None:
                self._put(self._top, key, value, gpt, path)
            elif not (self._is_provider and key in (*_ROPE, "scale_factor")):
                self._unknown(key, value, path)

    def _given_twice(self, key: str, value: Any, *, declared: bool, path: Path) -> None:
        """A field of the transformer that the model gives too; the reference then reads the transformer's."""
        if value == self._transformer[key]:
            return
        if declared:
            self._note(f"{shown(path)}: {value!r} left out, transformer.{key} is {self._transformer[key]!r}")
        else:
            self._problem(path, f"transformer.{key} has another value: give it there only")

    def _put(self, where: dict[str, Any], key: str, value: Any, target: Target, path: Path) -> None:
        """Take over the value of a field that we have too."""
        field = target.fields[key]
        if key in _RUNTIME:
            if value:
                self._leave_out("set by the training loop", path)
        elif key.startswith("_") or not field.init:
            self._leave_out("private or computed", path)
        elif value is None and _is_only(field.type, "bool"):
            where[key] = False
        elif key == "activation_func" and isinstance(value, str):
            where[key] = _ACTIVATIONS.get(value, _renamed(value))
        else:
            where[key] = _form(value, field.type)

    def _unknown(self, key: str, value: Any, path: Path) -> None:
        if str(key).startswith("_"):
            self._leave_out("private or computed", path)
        elif value is None or value is False or value in ("", [], {}):
            self._leave_out("off, and unknown to Bridge", path)
        elif key in _IDLE:
            self._leave_out("without a part in the model", path)
        else:
            self._problem(path, "unknown to Bridge: remove it if the model is the same without it")

    def _leave_out(self, why: str, path: Path) -> None:
        self._left_out.setdefault(why, []).append(".".join(str(step) for step in path[len(self._at) :]))

    def _take_provider(self, data: dict[str, Any]) -> None:
        """What only providers have."""
        self._result.moves.append((("transformer",), self._at))
        self._take_rope(data)
        self._take_layers()
        for key, value in _PROVIDER_DEFAULTS.items():
            if key not in data:
                owner = self._top if key == "share_embeddings_and_output_weights" else self._transformer
                owner[key] = value
                self._note(f"{shown((*self._at, key))}: {value!r} written out, the default of a GPTModelProvider")

    def _take_rope(self, data: dict[str, Any]) -> None:
        if (factor := data.get("scale_factor")) is None:
            return
        if other := [key for key, value in _ROPE.items() if data.get(key, value) != value]:
            known = ", ".join(f"{key} {value}" for key, value in _ROPE.items())
            self._problem((*self._at, other[0]), f"Bridge can scale rotary frequencies only with {known}")
        self._top |= {"rope_scaling": True, "rope_scaling_factor": factor}
        self._result.moves.append((("rope_scaling_factor",), (*self._at, "scale_factor")))
        self._note(f"{shown((*self._at, 'scale_factor'))}: now $.rope_scaling_factor, with $.rope_scaling true")

    def _take_layers(self) -> None:
        spec = self._top.get("transformer_layer_spec")
        name = str(spec.get("_target_")) if isinstance(spec, dict) else ""
        if name in _CHOSEN_LAYERS and self._transformer.get(_CHOSEN_LAYERS[name]) is not None:
            self._top["transformer_layer_spec"] = None
            self._note(
                f"{shown((*self._at, 'transformer_layer_spec'))}: left to the default, which chooses these for a "
                f"transformer with {_CHOSEN_LAYERS[name]}"
            )

    def _tell_lost_functions(self) -> None:
        if self._transformer and "activation_func" not in self._transformer:
            gated = ", and this transformer is gated" if self._transformer.get("gated_linear_unit") else ""
            self._note(
                f"the document has no activation function, which the reference does not write{gated}: GELU is assumed; "
                "set transformer.activation_func if it was another (silu for SwiGLU)"
            )
        if "transformer_layer_spec" not in self._top:
            self._note(
                "the document has no transformer_layer_spec, and the reference does not write one that is not null: "
                "the default layers are assumed"
            )


def _flat_class(data: Mapping[str, Any]) -> str:
    """The transformer's class in a provider that is one itself."""
    if data.get("multi_latent_attention"):
        return _MLA
    heterogeneous = ("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json")
    return _HETEROGENEOUS if any(data.get(key) for key in heterogeneous) else _TRANSFORMER


def _renamed(name: Any) -> Any:
    """Our name for a thing of the reference; whatever else is given, as it is."""
    return _NAMES.get(name, name) if isinstance(name, str) else name


def _form(value: Any, type_: Type) -> Any:
    """A value of the reference, written or live, in our form."""
    if isinstance(value, Enum):
        return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", "_name_": value.name}
    if isinstance(value, float) and value.is_integer() and _is_only(type_, "int"):
        return int(value)
    if isinstance(value, list):
        return [_form(item, inner_type(type_)) for item in value]
    if not isinstance(value, dict):
        return {"_target_": str(value), "_call_": False} if _is_dtype(value) else value
    name = value.get("_target_")
    if not isinstance(name, str):
        return {key: _form(item, inner_type(type_)) for key, item in value.items()}
    if name == f"{GENERATION_CONFIG}.from_dict":
        settings = value.get("config_dict")
        kept = (
            {key: item for key, item in settings.items() if str(key)[:1] != "_"} if isinstance(settings, dict) else {}
        )
        return {"_target_": GENERATION_CONFIG, **kept}
    name = _renamed(name)
    if value.get("_callable_") is True:
        return {"_target_": name, "_call_": False}
    if (member := _enum_member(name, value)) is not None:
        return {"_target_": name, "_name_": member}
    return {"_target_": name} | {
        key: _form(item, ())
        for key, item in value.items()
        if key != "_target_" and not (key == "_call_" and item is True) and not (key == "_args_" and item == [])
    }


def _enum_member(name: str, value: Mapping[str, Any]) -> str | None:
    """The name of the enumeration member that a call with its value makes; None if it makes none that is known."""
    from bridge.config.tables import shipped

    target = shipped(name)
    if target is None or target.kind != "enum":
        return None
    match value:
        case {"_name_": str(member)}:
            return member
        case {"_args_": [str(member)]} if member in target.members:
            return member
        case {"_args_": [int(number)]} if name.startswith(_ENUMS) and 0 < number <= len(target.members):
            return target.members[number - 1]
    return None


def _is_only(type_: Type, kind: str) -> bool:
    """Whether a type has numbers and truth values of this kind alone, and no null."""
    from bridge.config.types import Plain

    return {member.kind for member in type_ if isinstance(member, Plain)} - {"str"} == {kind}


def _is_dtype(value: object) -> bool:
    return type(value).__module__ == "torch" and type(value).__name__ == "dtype"


def to_run_config(data: Mapping[str, Any]) -> Migrated:
    """A GPT document as the `model` section of a `run_config.yaml`, for the reference and Megatron Bridge to read.

    What they have no form for is left out, and told in the notes.

    Args:
        data: a document that was found to be right.

    Raises:
        DocumentError: it is not a GPT's.
    """
    from bridge.config.tables import shipped

    gpt = shipped(_GPT)
    if data.get("_target_") != _GPT or gpt is None:
        raise DocumentError([Problem("$._target_", f"only a {_GPT} can be written for the reference")])
    builder = data.get("_builder_", _GPT_BUILDER)
    notes = []
    if builder != _GPT_BUILDER:
        notes.append(f"left out, of Bridge alone: the builder {builder}")
    section: dict[str, Any] = {
        "_target_": _GPT_CONFIGS[0],
        "_builder_": f"{_GPT_MODULES[0]}.GPTModelBuilder",
    }
    for key, value in data.items():
        if key in ("hf_model_id", "generation_config", "pre_wrap_hooks", "post_wrap_hooks"):
            if value:
                notes.append(f"left out, the reference has no form for it: {key}")
        elif (field := gpt.fields.get(key)) is not None and field.init:
            section[key] = _their_form(value, field.type)
    notes += [f"left out, as in the document: {entry['path']}" for entry in data.get("_omitted_", ())]
    notes += [f"a list to the reference, not a tuple: {name}" for name in _tuples(data, gpt)]
    return Migrated(section, notes=notes)


def _their_form(value: Any, type_: Type) -> Any:
    """A value of a right document as the reference writes it."""
    if isinstance(value, str):
        return _their_name(value, type_)
    if isinstance(value, list):
        return [_their_form(item, inner_type(type_)) for item in value]
    if not isinstance(value, dict):
        return value
    from bridge.config.tables import shipped

    if (target := config_at(value, type_, shipped)) is not None:
        return {"_target_": target.name} | {
            key: _their_form(item, target.fields[key].type)
            for key, item in value.items()
            if key in target.fields and target.fields[key].init and not key.startswith("_")
        }
    match value:
        case {"_target_": str(name), "_name_": str(member)}:
            return _their_enum(shipped(name), member)
        case {"_target_": "builtins.float", "_args_": [item]}:
            return float(item)
        case {"_target_": "builtins.dict", "_args_": [pairs]}:
            return {_their_form(key, ()): _their_form(item, ()) for key, item in pairs}
        case {"_target_": str(name), "_args_": [items]} if name.startswith("builtins."):
            return _their_form(items, ())
        case {"_target_": str(name), "_partial_": True}:
            rest = {key: _their_form(item, ()) for key, item in value.items() if key != "_target_"}
            return {"_target_": _canonical(name), "_args_": [], **rest}
    return {key: _their_form(item, inner_type(type_)) for key, item in value.items()}


def _their_name(value: str, type_: Type) -> Any:
    from bridge.config.tables import shipped, shipped_dtypes
    from bridge.config.types import Anything, Choice, Class, Dtype, Function, Instance, Plain

    for member in type_:
        match member:
            case Plain("str") | Anything():
                return value
            case Choice(values) if value in values:
                return value
            case Dtype() if (dtype := shipped_dtypes().get(value.removeprefix("torch."))) is not None:
                return {"_target_": dtype, "_call_": False}
            case Instance(name) if (enum := shipped(name)) is not None and value in enum.members:
                return _their_enum(enum, value)
            case Function() | Class():
                return {"_target_": _canonical(value), "_call_": False}
    return value


def _canonical(name: str) -> str:
    from bridge.config.tables import shipped_aliases

    return shipped_aliases().get(name, name)


def _their_enum(target: Target | None, member: str) -> Any:
    if target is None or not target.name.startswith(_ENUMS):
        # Without the member's value, the member is named as an attribute, which they can resolve too.
        return {"_target_": f"{target.name if target else ''}.{member}", "_call_": False}
    number = target.members.index(member) + 1
    return {"_target_": target.name, "_call_": True, "_args_": [number], "_name_": member}


def _tuples(data: Mapping[str, Any], target: Target) -> list[str]:
    """The fields whose value is a tuple."""
    from bridge.config.tables import shipped
    from bridge.config.types import Fixed, Items

    found = []
    for key, value in data.items():
        type_ = target.fields[key].type if key in target.fields else ()
        if isinstance(value, dict):
            if (inner := config_at(value, type_, shipped)) is not None:
                found += [f"{key}.{name}" for name in _tuples(value, inner)]
            elif value.get("_target_") == "builtins.tuple":
                found.append(key)
        elif isinstance(value, list):
            kinds = {"tuple" if isinstance(m, Fixed) else m.kind for m in type_ if isinstance(m, (Fixed, Items))}
            if kinds == {"tuple"}:
                found.append(key)
    return found
