"""The forms of the reference (`megatron.training.models`) and of Megatron Bridge: read, and written for them.

They write a model as a config that embeds a transformer, or as a provider that is a transformer with more fields, alone
or under `model` in a `run_config.yaml`. What these forms cannot say, or Bridge cannot know of them, is told by name.
The arguments that Megatron-LM keeps in its checkpoints are read in `bridge.config.foreign.megatron_args`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

from bridge.config.errors import DocumentError, Problem
from bridge.config.foreign import (
    ENUMS,
    EXTENDED,
    GPT,
    HETEROGENEOUS,
    LAYERS,
    MAMBA,
    MLA,
    T5,
    TRANSFORMER,
    Adoption,
    layers_in,
    megatron_args,
    transformer_of,
    with_predictions,
)
from bridge.config.paths import Path, shown
from bridge.config.problems import shortened
from bridge.config.rewrite import Migrated
from bridge.config.schema.annotations import inner_type
from bridge.config.schema.inspection import config_at

if TYPE_CHECKING:
    from bridge.config.schema.annotations import Type
    from bridge.config.schema.target import Target

_OWNERS = ("megatron.training.", "megatron.bridge.")
_BRIDGE = "megatron.bridge.models"


@dataclass(frozen=True)
class _Family:
    """A family of models: their names for it, and ours."""

    ours: str
    builder: str
    provider: str
    """The provider that has its fields and defaults, and no others."""

    provider_modules: tuple[str, ...]
    """Modules whose providers add fields and defaults to that one, and no code."""

    defaults: Mapping[str, Any]
    """Where that provider's defaults are not those of our config and its transformer."""

    configs: tuple[str, ...] = ()
    """Configs that embed a transformer; the first is the one that we write."""

    their_builder: str = ""
    """The builder that we write."""

    names: Mapping[str, str] = field(default_factory=dict)
    """Things of theirs that are ours under another name."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Fields that have another name here."""

    idle: frozenset[str] = frozenset()
    """Fields that change nothing about the model, or that other fields repeat."""

    zeros: frozenset[str] = frozenset()
    """Fields that are off at 0, and have no counterpart."""

    ours_alone: dict[str, Any] = field(default_factory=dict)
    """Fields that its config has not, and the values that its model has."""

    @property
    def layers(self) -> str:
        """The field that holds the layers."""
        return "hybrid_stack_spec" if self.ours == MAMBA else "transformer_layer_spec"


_GPT_MODULES = (
    "megatron.training.models.gpt",
    "megatron.bridge.compat.mcore_gpt",
    f"{_BRIDGE}.gpt.gpt_builder",
    f"{_BRIDGE}.gpt.mcore_gpt_compat",
)
_GPT = _Family(
    ours=GPT,
    builder="bridge.models.gpt.GPTModelBuilder",
    provider=f"{_BRIDGE}.gpt_provider.GPTModelProvider",
    provider_modules=(
        f"{_BRIDGE}.gpt_provider",
        f"{_BRIDGE}.llama.llama_provider",
        f"{_BRIDGE}.qwen.qwen_provider",
        f"{_BRIDGE}.mistral.mistral_provider",
        f"{_BRIDGE}.deepseek.deepseek_provider",
        f"{_BRIDGE}.mla_provider",
    ),
    defaults={
        "share_embeddings_and_output_weights": True,
        "attention_softmax_in_fp32": False,
        "deallocate_pipeline_outputs": True,
        "cross_entropy_loss_fusion": True,
    },
    configs=(
        *(f"{module}.GPTModelConfig" for module in _GPT_MODULES),
        f"{_BRIDGE}.gpt.model_config.BridgeGPTModelConfig",
    ),
    their_builder=f"{_GPT_MODULES[0]}.GPTModelBuilder",
    names={
        **{f"{module}.GPTModelBuilder": "bridge.models.gpt.GPTModelBuilder" for module in _GPT_MODULES},
        **{f"{module}.default_layer_spec": LAYERS[GPT] for module in (*_GPT_MODULES, f"{_BRIDGE}.gpt_provider")},
    },
    idle=frozenset(["max_position_embeddings", "mtp_enabled", "async_tensor_model_parallel_allreduce"]),
)

_HYBRID_CONFIGS = (
    "megatron.training.models.hybrid.HybridModelConfig",
    f"{_BRIDGE}.hybrid.hybrid_builder.HybridModelConfig",
    f"{_BRIDGE}.mamba.mamba_builder.MambaModelConfig",
    f"{_BRIDGE}.nemotronh.model_config.NemotronHModelConfig",
)
_HYBRID_BUILDERS = (
    "megatron.training.models.hybrid.HybridModelBuilder",
    f"{_BRIDGE}.hybrid.HybridModelBuilder",
    f"{_BRIDGE}.hybrid.hybrid_builder.HybridModelBuilder",
    f"{_BRIDGE}.mamba.MambaModelBuilder",
    f"{_BRIDGE}.mamba.mamba_builder.MambaModelBuilder",
)
_HYBRID_LAYERS = (
    *(
        f"{_BRIDGE}.hybrid.{module}.{name}"
        for module in ("hybrid_provider", "hybrid_builder")
        for name in ("get_default_hybrid_stack_spec", "transformer_engine_hybrid_stack_spec")
    ),
    *(
        f"{_BRIDGE}.mamba.{module}.{name}"
        for module in ("mamba_provider", "mamba_builder")
        for name in ("get_default_mamba_stack_spec", "transformer_engine_mamba_stack_spec")
    ),
)
_HYBRID = _Family(
    ours=MAMBA,
    builder="bridge.models.mamba.MambaModelBuilder",
    provider=f"{_BRIDGE}.hybrid.hybrid_provider.HybridModelProvider",
    provider_modules=(
        f"{_BRIDGE}.hybrid.hybrid_provider",
        f"{_BRIDGE}.mamba.mamba_provider",
        f"{_BRIDGE}.mamba.nemotron_h_provider",
        f"{_BRIDGE}.nemotronh.nemotron_h_provider",
    ),
    defaults={
        "params_dtype": "torch.bfloat16",
        "bf16": True,
        "num_attention_heads": 1,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "apply_rope_fusion": True,
        "attention_backend": "flash",
        "deallocate_pipeline_outputs": True,
        "bias_dropout_fusion": True,
        "cross_entropy_loss_fusion": True,
    },
    configs=_HYBRID_CONFIGS,
    their_builder=_HYBRID_BUILDERS[0],
    names={
        **dict.fromkeys(_HYBRID_BUILDERS, "bridge.models.mamba.MambaModelBuilder"),
        **dict.fromkeys(_HYBRID_LAYERS, LAYERS[MAMBA]),
    },
    renamed={"hybrid_override_pattern": "hybrid_layer_pattern", "mamba_stack_spec": "hybrid_stack_spec"},
    idle=frozenset(["max_position_embeddings"]),
    zeros=frozenset(["hybrid_attention_ratio", "hybrid_mlp_ratio"]),
    ours_alone={"scatter_embedding_sequence_parallel": True},
)
_T5 = _Family(
    ours=T5,
    builder="bridge.models.t5.T5ModelBuilder",
    provider=f"{_BRIDGE}.t5_provider.T5ModelProvider",
    provider_modules=(f"{_BRIDGE}.t5_provider",),
    defaults={
        "seq_length": 512,
        "apply_rope_fusion": True,
        "attention_softmax_in_fp32": False,
        "bias_activation_fusion": True,
        "masked_softmax_fusion": True,
        "persist_layer_norm": True,
        "bias_dropout_fusion": True,
        "deallocate_pipeline_outputs": True,
    },
    renamed={"max_position_embeddings": "seq_length"},
    idle=frozenset(["seq_length", "seq_length_dec"]),
    zeros=frozenset(["encoder_pipeline_model_parallel_size"]),
)
_FAMILIES = (_GPT, _HYBRID, _T5)

_NAMES = {f"{_BRIDGE}.transformer_config.{name.rpartition('.')[2]}": name for name in (TRANSFORMER, MLA, HETEROGENEOUS)}
# Layer specs that the default choice comes to by itself, for a transformer that sets the field.
_CHOSEN_LAYERS = {
    "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec": "num_moe_experts",
    "megatron.core.models.gpt.experimental_attention_variant_module_specs."
    "get_transformer_block_with_experimental_attention_variant_spec": "experimental_attention_variant",
}
# Fields without a counterpart that are looked at together with others.
_TAKEN_ELSEWHERE = {
    MAMBA: ("mtp_hybrid_override_pattern", "mtp_mamba_stack_spec"),
    T5: ("transformer_layer_spec",),
}
_T5_LAYERS = f"{_BRIDGE}.t5_provider.%s_layer_spec"
# Where the configs of Megatron Bridge that lose their activation function keep its name.
_ACTIVATION_KEY = "megatron_bridge.activation_func"
# Llama 3.1 as older providers wrote it; these are the numbers that megatron-core's own scaling has built in.
_DECISIVE = (
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "vocab_size",
    "seq_length",
    "hybrid_layer_pattern",
    "num_moe_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "normalization",
    "layernorm_epsilon",
    "activation_func",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "share_embeddings_and_output_weights",
    "mamba_num_heads",
    "mamba_state_dim",
)
"""The fields that models differ by most: these are named where hundreds have defaults."""

_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}


def adopted(data: object) -> Migrated:
    """The document `data` of another system in Bridge's own form; any other document as it is, the very same object.

    A document is the reference's if its `_target_` is, or if it has none and that of its `model` section is; and
    Megatron-LM's if it has no `_target_` and the names of its arguments.

    Raises:
        DocumentError: it describes a model that Bridge has no configuration for.
    """
    if (found := _model_section(data)) is not None:
        return _ReferenceAdoption(*found).finished()
    return megatron_args.adopted(data) or Migrated(data)


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


def _family(name: str, path: Path) -> tuple[_Family, bool]:
    """The family of the model called `name`, and whether it is written as a provider.

    Raises:
        DocumentError: it is not known to be of one.
    """
    module, _, cls = name.rpartition(".")
    for family in _FAMILIES:
        if name in family.configs:
            return family, False
        if module in family.provider_modules and "Provider" in cls:
            return family, True
    message = (
        f"Bridge does not know what {cls} adds: if it adds nothing but values to one of these, write its name here"
    )
    known = [family.provider for family in _FAMILIES]
    if "Provider" not in cls:
        known = [family.configs[0] for family in _FAMILIES if family.configs]
    raise DocumentError([Problem(shown(path), f"{message}: {', '.join(map(repr, known))}")])


class _ReferenceAdoption(Adoption):
    """One model of the reference on its way to a document of ours."""

    def __init__(self, data: dict[str, Any], at: Path, sections: list[str]) -> None:
        family, is_provider = _family(data["_target_"], (*at, "_target_"))
        super().__init__(family.ours, at, {**_NAMES, **family.names})
        self._family, self._is_provider = family, is_provider
        if sections:
            self.note(f"left out, Bridge reads the model alone: {', '.join(sections)}")
        self._take(data)

    def _take(self, data: dict[str, Any]) -> None:
        from bridge.config.schema.table import shipped

        if (builder := data.get("_builder_")) is not None:
            self.top["_builder_"] = self.renamed(builder)
        inner = data.get("transformer")
        nested = inner if isinstance(inner, dict) else {}
        if self._is_provider:
            cls = transformer_of(data)
        else:
            cls = transformer_of(data | nested, self.renamed(nested.get("_target_", TRANSFORMER)))
        transformer, model = shipped(cls) if isinstance(cls, str) else None, shipped(self._family.ours)
        if model is None or (inner is not None and not nested and not self._is_provider):
            self.top |= {"transformer": inner}  # whoever reads the document says what is wrong with it
        else:
            self.transformer["_target_"] = cls
            self.top["transformer"] = self.transformer
        self._inner = transformer
        self._sort_inner(nested, transformer)
        self._sort_top(data, model, transformer)
        if self._family is _HYBRID:
            self._take_pattern(data)
        if self._is_provider:
            self._take_provider(data, model, transformer)
        self._take_layers(data)
        self._tell_lost_functions()

    def _sort_inner(self, data: dict[str, Any], target: Target | None) -> None:
        for key, value in data.items():
            path = (*self.at, "transformer", key)
            if target is not None and key in target.fields:
                self.put(self.transformer, target.fields[key], value, path)
            elif key != "_target_":
                self._unknown(key, value, path)

    def _sort_top(self, data: dict[str, Any], model: Target | None, transformer: Target | None) -> None:
        own = model.fields if model else {}
        owned = transformer.fields if transformer else {}
        for given, value in data.items():
            path = (*self.at, given)
            if given in ("_target_", "_builder_") or (given == "transformer" and not self._is_provider):
                continue
            if given in _TAKEN_ELSEWHERE.get(self._family.ours, ()):
                continue
            key = self._family.renamed.get(given, given)
            is_old_name = key != given and key not in self._family.idle
            if key == given and key in self._family.idle:
                self._unknown(key, value, path)
            elif is_old_name and (value is None or data.get(key) == value):
                self.leave_out("an old name that says nothing new", path)
            elif is_old_name and data.get(key) is not None:
                self.problem(path, f"this is the old name of {key}, which has another value: give only that")
            elif key in owned and key in self.transformer:
                self._given_twice(key, value, declared=key in own, path=path)
            elif key in owned and transformer is not None:
                self.put(self.transformer, transformer.fields[key], value, path)
                if key in self.transformer:
                    self.moved(("transformer", key), path)
            elif key in own and model is not None:
                if key not in self.top:
                    self.put(self.top, model.fields[key], value, path)
                if key != given:
                    self.moved((key,), path)
            elif not (self._is_provider and key in (*_ROPE, "scale_factor")):
                self._unknown(given, value, path)

    def _given_twice(self, key: str, value: Any, *, declared: bool, path: Path) -> None:
        """A field of the transformer that the model gives too; the reference then reads the transformer's."""
        if value == self.transformer[key]:
            return
        if declared:
            self.note(
                f"{shown(path)}: {shortened(value)} left out, transformer.{key} is {shortened(self.transformer[key])}"
            )
        else:
            self.problem(path, f"transformer.{key} has another value: give it there only")

    def _unknown(self, key: str, value: Any, path: Path) -> None:
        if key in self._family.idle or (key in self._family.zeros and value == 0):
            if value:
                self.leave_out("without a part in the model", path)
            else:
                self.leave_out("off, and unknown to Bridge", path)
        else:
            self.unknown(key, value, path)

    def _take_pattern(self, data: dict[str, Any]) -> None:
        """The pattern of a hybrid model, with that of multi-token prediction if it is given apart; and what follows."""
        if self.transformer.get("mtp_num_layers") == 0:
            self.transformer["mtp_num_layers"] = None
        depths = self.transformer.get("mtp_num_layers")
        if depths is None and self.transformer.get("mtp_use_repeated_layer"):
            depths = 1
        pattern, predictions = self.top.get("hybrid_layer_pattern"), data.get("mtp_hybrid_override_pattern")
        whole = with_predictions(pattern, predictions, depths)
        if whole != pattern:
            self.top["hybrid_layer_pattern"] = whole
            self.note(f"hybrid_layer_pattern is now {whole!r}, with mtp_hybrid_override_pattern in it")
        elif predictions:
            self.leave_out("without a part in the model", (*self.at, "mtp_hybrid_override_pattern"))
        spec = data.get("mtp_mamba_stack_spec")
        if isinstance(spec, dict) and self.renamed(spec.get("_target_")) == LAYERS[MAMBA]:
            self.leave_out("the default, which Bridge chooses by itself", (*self.at, "mtp_mamba_stack_spec"))
        elif spec is not None:
            self.unknown("mtp_mamba_stack_spec", spec, (*self.at, "mtp_mamba_stack_spec"))
        if not (layers := layers_in(whole)):
            # HybridModel of megatron-core 0.19.2 has no layers then; those of earlier versions had these.
            self.note("the document has no hybrid_layer_pattern: Mamba layers alone are assumed")
        elif self.transformer.get("num_layers") is None:
            self.transformer["num_layers"] = layers
            self.note(f"transformer.num_layers: {layers} written out, as hybrid_layer_pattern has them")

    def _take_provider(self, data: dict[str, Any], model: Target | None, transformer: Target | None) -> None:
        """What only providers have."""
        self.moved(("transformer",), self.at)
        self._take_rope(data)
        plain = self._family.provider.rpartition(".")[2]
        for key, value in self._family.defaults.items():
            own = model is not None and key in model.fields
            if key not in (self.top if own else self.transformer):
                (self.top if own else self.transformer)[key] = value
                self.note(f"{shown((*self.at, key))}: {value!r} written out, the default of a {plain}")
        known = (*(model.init_names if model else ()), *(transformer.init_names if transformer else ()))
        missing = sorted({*known} - {*self.top, *self.transformer, *data})
        if missing and data["_target_"] != self._family.provider:
            cls = data["_target_"].rpartition(".")[2]
            named = [name for name in _DECISIVE if name in missing]
            more = f" and {len(missing) - len(named)} more" if len(missing) > len(named) else ""
            self.note(
                f"Bridge's defaults are taken, which may not be those of {cls}: {', '.join(named)}{more}; "
                "give those that differ"
            )

    def _take_rope(self, data: dict[str, Any]) -> None:
        if (factor := data.get("scale_factor")) is None:
            return
        if other := [key for key, value in _ROPE.items() if data.get(key, value) != value]:
            known = ", ".join(f"{key} {value}" for key, value in _ROPE.items())
            self.problem((*self.at, other[0]), f"Bridge can scale rotary frequencies only with {known}")
        self.top |= {"rope_scaling": True, "rope_scaling_factor": factor}
        self.moved(("rope_scaling_factor",), (*self.at, "scale_factor"))
        self.note(f"{shown((*self.at, 'scale_factor'))}: now $.rope_scaling_factor, with $.rope_scaling true")

    def _take_layers(self, data: dict[str, Any]) -> None:
        """Layers that the default choice comes to by itself."""
        spec = data.get("transformer_layer_spec") if self._family is _T5 else self.top.get(self._family.layers)
        name = str(spec.get("_target_")) if isinstance(spec, dict) else ""
        path = (*self.at, self._family.layers)
        if self._is_provider and name in _CHOSEN_LAYERS and self.transformer.get(_CHOSEN_LAYERS[name]) is not None:
            self.top["transformer_layer_spec"] = None
            chooses = f"chooses these for a transformer with {_CHOSEN_LAYERS[name]}"
            self.note(f"{shown(path)}: left to the default, which {chooses}")
        elif self._family is _T5 and name in (_T5_LAYERS % "local", _T5_LAYERS % "transformer_engine"):
            self.transformer["transformer_impl"] = "local" if "local" in name else "transformer_engine"
            self.note(
                f"{shown(path)}: left to the default, with transformer_impl {self.transformer['transformer_impl']}"
            )
        elif self._family is _T5 and spec is not None:
            self.problem(
                path, "Bridge has layers of the encoder and of the decoder apart: remove it if they are usual ones"
            )

    def _tell_lost_functions(self) -> None:
        self._take_activation_from_metadata()
        if self.transformer and "activation_func" not in self.transformer:
            gated = ", and this transformer is gated" if self.transformer.get("gated_linear_unit") else ""
            self.note(
                f"the document has no activation function, which the reference does not write{gated}: GELU is assumed; "
                "set transformer.activation_func if it was another (silu for SwiGLU)"
            )
        if self._family is not _T5 and self._family.layers not in self.top:
            self.note(
                f"the document has no {self._family.layers}, and the reference does not write one that is not null: "
                "the default layers are assumed"
            )

    def _take_activation_from_metadata(self) -> None:
        metadata = self.top.get("extra_checkpoint_metadata")
        name = metadata.get(_ACTIVATION_KEY) if isinstance(metadata, dict) else None
        if self._inner is not None and isinstance(name, str) and "activation_func" not in self.transformer:
            path = (*self.at, "extra_checkpoint_metadata")
            self.put(self.transformer, self._inner.fields["activation_func"], name, path)
            self.note(f"transformer.activation_func: {name} taken from extra_checkpoint_metadata")


def to_run_config(data: Mapping[str, Any]) -> Migrated:
    """A GPT's or hybrid model's document as the `model` section of a `run_config.yaml`, for the reference and Megatron
    Bridge to read.

    What they have no form for is left out, and told in the notes.

    Args:
        data: a document that was found to be right.

    Raises:
        DocumentError: the reference has no model like it.
    """
    from bridge.config.schema.table import shipped

    family = next((one for one in _FAMILIES if one.configs and data.get("_target_") == one.ours), None)
    model = shipped(family.ours) if family else None
    if family is None or model is None:
        known = " or ".join(one.ours for one in _FAMILIES if one.configs)
        raise DocumentError([Problem("$._target_", f"only a {known} can be written for the reference")])
    builder = data.get("_builder_", family.builder)
    notes = []
    if builder != family.builder:
        notes.append(f"left out, of Bridge alone: the builder {builder}")
    section: dict[str, Any] = {"_target_": family.configs[0], "_builder_": family.their_builder}
    ours_alone = _OURS_ALONE | family.ours_alone
    for key, value in data.items():
        if key in ours_alone:
            if value != ours_alone[key]:
                notes.append(f"left out, the reference has no form for it: {key}")
        elif (field := model.fields.get(key)) is not None and field.init:
            section[key] = _their_form(value, field.type)
    if family is _HYBRID:
        notes += _with_pattern(section)
    notes += _without_extensions(section)
    notes += [f"left out, as in the document: {entry['path']}" for entry in data.get("_omitted_", ())]
    notes += [f"a list to the reference, not a tuple: {name}" for name in _tuples(data, model)]
    return Migrated(section, notes=notes)


# Fields that no config of the reference has, or writes, and the values at which nothing is lost.
_OURS_ALONE: dict[str, Any] = {
    "hf_model_id": None,
    "generation_config": None,
    "pre_wrap_hooks": [],
    "post_wrap_hooks": [],
}


def _with_pattern(section: dict[str, Any]) -> list[str]:
    """Write out the pattern of a hybrid model, with borders where the reference needs them; what is said about it."""
    transformer = section["transformer"]
    given = section.get("hybrid_layer_pattern")
    main, slash, predictions = (given or "M" * transformer.get("num_layers", 0)).partition("/")
    ranks = transformer.get("pipeline_model_parallel_size", 1)
    virtual = transformer.get("virtual_pipeline_model_parallel_size") or 1
    if ranks == 1:
        main = main.replace("|", "")
    elif virtual > 1 and "|" not in main:
        size = max(1, len(main) // (ranks * virtual))
        main = "|".join(main[at : at + size] for at in range(0, len(main), size))
    section["hybrid_layer_pattern"] = main + slash + predictions
    return [] if section["hybrid_layer_pattern"] == given else [f"hybrid_layer_pattern written out: {main}"]


def _without_extensions(section: dict[str, Any]) -> list[str]:
    """Make the transformer in `section` one of megatron-core; what is said about what that has not."""
    from bridge.config.schema.table import shipped

    transformer = section["transformer"]
    theirs = shipped(EXTENDED.get(transformer["_target_"], ""))
    if theirs is None:
        return []
    lost = [key for key in transformer if key != "_target_" and key not in theirs.fields]
    section["transformer"] = {key: value for key, value in transformer.items() if key not in lost}
    section["transformer"]["_target_"] = theirs.name
    return [f"left out, the reference has no form for it: transformer.{key}" for key in lost]


def _their_form(value: Any, type_: Type) -> Any:
    """A value of a right document as the reference writes it."""
    if isinstance(value, str):
        return _their_name(value, type_)
    if isinstance(value, list):
        return [_their_form(item, inner_type(type_)) for item in value]
    if not isinstance(value, dict):
        return value
    from bridge.config.schema.table import shipped

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
    from bridge.config.schema.annotations import Anything, Choice, Class, Dtype, Function, Instance, Plain
    from bridge.config.schema.table import shipped, shipped_dtypes

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
    from bridge.config.schema.table import shipped_aliases

    return shipped_aliases().get(name, name)


def _their_enum(target: Target | None, member: str) -> Any:
    if target is None or not target.name.startswith(ENUMS):
        # Without the member's value, the member is named as an attribute, which they can resolve too.
        return {"_target_": f"{target.name if target else ''}.{member}", "_call_": False}
    number = target.members.index(member) + 1
    return {"_target_": target.name, "_call_": True, "_args_": [number], "_name_": member}


def _tuples(data: Mapping[str, Any], target: Target) -> list[str]:
    """The fields whose value is a tuple."""
    from bridge.config.schema.annotations import Fixed, Items
    from bridge.config.schema.table import shipped

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
