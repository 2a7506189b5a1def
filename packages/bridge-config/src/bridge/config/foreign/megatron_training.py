"""Convert models as `megatron.training.models` and Megatron Bridge write them.

They write a model as a configuration that embeds a transformer, or as a provider, which is a transformer with more
fields. Values that Bridge cannot express are listed by name.
"""

from __future__ import annotations

from typing import Any

from bridge.config.errors import DocumentError, Problem, shorten
from bridge.config.foreign.conversion import Conversion, choose_transformer
from bridge.config.foreign.families import BRIDGE, FAMILIES, HYBRID_FAMILY, T5_FAMILY, Family
from bridge.config.foreign.layer_patterns import add_mtp_pattern, count_layers
from bridge.config.foreign.names import HETEROGENEOUS, LAYERS, MAMBA, MLA, T5, TRANSFORMER
from bridge.config.migration import Migration
from bridge.config.paths import Path, format_path
from bridge.config.problems import abbreviate
from bridge.config.schema.table import get_shipped
from bridge.config.schema.target import Target

_NAMES = {f"{BRIDGE}.transformer_config.{name.rpartition('.')[2]}": name for name in (TRANSFORMER, MLA, HETEROGENEOUS)}
# Layer specs that Bridge selects by default if the transformer sets the field.
_DEFAULT_SPECS = {
    "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec": "num_moe_experts",
    "megatron.core.models.gpt.experimental_attention_variant_module_specs."
    "get_transformer_block_with_experimental_attention_variant_spec": "experimental_attention_variant",
}
# Fields without an equivalent that are converted together with others.
_CONVERTED_ELSEWHERE = {
    MAMBA: ("mtp_hybrid_override_pattern", "mtp_mamba_stack_spec"),
    T5: ("transformer_layer_spec",),
}
_T5_LAYERS = f"{BRIDGE}.t5_provider.%s_layer_spec"
# The metadata key for the name of an activation function that Megatron Bridge's configurations lose.
_ACTIVATION_KEY = "megatron_bridge.activation_func"
_IMPORTANT_FIELDS = (
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
"""Fields that differ most between models. A note about hundreds of defaults names only these."""

# Llama 3.1 scaling as older providers wrote it. Megatron-core 0.19.2 hard-codes these values.
_ROPE_SCALING = {"low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}


def convert(data: dict[str, Any], at: Path, sections: list[str]) -> Migration:
    """Convert a model.

    Args:
        data: The model.
        at: Its path in the original document.
        sections: Names of the other sections of that document.

    Raises:
        DocumentError: Bridge has no configuration for the model.
    """
    return _ModelConversion(data, at, sections).finish()


def _find_family(name: str, path: Path) -> tuple[Family, bool]:
    """Return the family of the class `name`, and whether the class is a provider.

    Raises:
        DocumentError: no family has that class.
    """
    module, _, cls = name.rpartition(".")
    for family in FAMILIES:
        if name in family.megatron_configs:
            return family, False
        if module in family.provider_modules and "Provider" in cls:
            return family, True
    unknown = f"Bridge does not know what {shorten(cls)} adds"
    message = f"{unknown}: if it only changes defaults of one of these, write that name here"
    known = [family.provider for family in FAMILIES]
    if "Provider" not in cls:
        known = [family.megatron_configs[0] for family in FAMILIES if family.megatron_configs]
    raise DocumentError([Problem(format_path(path), f"{message}: {', '.join(map(repr, known))}")])


class _ModelConversion(Conversion):
    """Converts a model of megatron.training or Megatron Bridge."""

    def __init__(self, data: dict[str, Any], at: Path, sections: list[str]) -> None:
        family, is_provider = _find_family(data["_target_"], (*at, "_target_"))
        super().__init__(family.config, at, {**_NAMES, **family.aliases})
        self._family, self._is_provider = family, is_provider
        if sections:
            self.note(f"left out, Bridge reads only the model: {', '.join(sections)}")
        self._convert(data)

    def _convert(self, data: dict[str, Any]) -> None:
        """Convert the model. The order matters: each step uses the fields that those before it converted."""
        if (builder := data.get("_builder_")) is not None:
            self.top["_builder_"] = self.rename(builder)
        inner = data.get("transformer")
        nested = inner if isinstance(inner, dict) else {}
        if self._is_provider:
            cls = choose_transformer(data)
        else:
            cls = choose_transformer(data | nested, self.rename(nested.get("_target_", TRANSFORMER)))
        transformer, model = get_shipped(cls) if isinstance(cls, str) else None, get_shipped(self._family.config)
        if model is None or (inner is not None and not nested and not self._is_provider):
            self.top |= {"transformer": inner}  # not a mapping: reading the document reports the problem
        else:
            self.transformer["_target_"] = cls
            self.top["transformer"] = self.transformer
        self._inner = transformer
        self._convert_transformer_fields(nested, transformer)
        self._convert_model_fields(data, model, transformer)
        if self._family is HYBRID_FAMILY:
            self._convert_pattern(data)
        if self._is_provider:
            self._convert_provider(data, model, transformer)
        self._convert_layers(data)
        self._note_lost_functions()

    def _convert_transformer_fields(self, data: dict[str, Any], target: Target | None) -> None:
        """Convert the fields of an embedded transformer."""
        for key, value in data.items():
            path = (*self.at, "transformer", key)
            if target is not None and key in target.fields:
                self.convert_field(self.transformer, target.fields[key], value, path)
            elif key != "_target_":
                self._refuse_or_leave_out(key, value, path)

    def _convert_model_fields(self, data: dict[str, Any], model: Target | None, transformer: Target | None) -> None:
        """Convert the fields beside the transformer, or all fields of a provider."""
        own = model.fields if model else {}
        owned = transformer.fields if transformer else {}
        for given, value in data.items():
            path = (*self.at, given)
            if given in ("_target_", "_builder_") or (given == "transformer" and not self._is_provider):
                continue
            if given in _CONVERTED_ELSEWHERE.get(self._family.config, ()):
                continue
            key = self._family.renamed_fields.get(given, given)
            is_old_name = key != given and key not in self._family.no_effect
            if key == given and key in self._family.no_effect:
                self._refuse_or_leave_out(key, value, path)
            elif is_old_name and (value is None or data.get(key) == value):
                self.leave_out("an old name of a field that is also given", path)
            elif is_old_name and data.get(key) is not None:
                self.refuse(path, f"this is the old name of {key}, which has a different value: keep only {key}")
            # The transformer's fields come first: where both declare a field, the transformer owns it.
            elif key in owned and key in self.transformer:
                self._check_duplicate(key, value, declared=key in own, path=path)
            elif key in owned and transformer is not None:
                self.convert_field(self.transformer, transformer.fields[key], value, path)
                if key in self.transformer:
                    self.record_move(("transformer", key), path)
            elif key in own and model is not None:
                if key not in self.top:
                    self.convert_field(self.top, model.fields[key], value, path)
                if key != given:
                    self.record_move((key,), path)
            elif not (self._is_provider and key in (*_ROPE_SCALING, "scale_factor")):
                self._refuse_or_leave_out(given, value, path)

    def _check_duplicate(self, key: str, value: Any, *, declared: bool, path: Path) -> None:
        """Check a field that the transformer has too. megatron.training uses the transformer's value."""
        if value == self.transformer[key]:
            return
        if declared:  # a field of the model class too: its value has no effect there
            self.note(
                f"{format_path(path)}: {abbreviate(value)} left out, "
                f"transformer.{key} is {abbreviate(self.transformer[key])}"
            )
        else:
            self.refuse(path, f"transformer.{key} has a different value: keep only that one")

    def _refuse_or_leave_out(self, key: str, value: Any, path: Path) -> None:
        """Handle a field without an equivalent in Bridge."""
        if key in self._family.no_effect or (key in self._family.disabled_when_zero and value == 0):
            if value:
                self.leave_out("no effect on the model", path)
            else:
                self.leave_out("disabled and unknown to Bridge", path)
        else:
            self.handle_unknown(key, value, path)

    def _convert_pattern(self, data: dict[str, Any]) -> None:
        """Convert the pattern of a hybrid model, and fields that depend on it."""
        if self.transformer.get("mtp_num_layers") == 0:  # megatron-core 0.19.2 only checks for None
            self.transformer["mtp_num_layers"] = None
        depths = self.transformer.get("mtp_num_layers")
        if depths is None and self.transformer.get("mtp_use_repeated_layer"):
            depths = 1
        pattern, predictions = self.top.get("hybrid_layer_pattern"), data.get("mtp_hybrid_override_pattern")
        whole = add_mtp_pattern(pattern, predictions, depths)
        if whole != pattern:
            self.top["hybrid_layer_pattern"] = whole
            self.note(f"hybrid_layer_pattern: set to {whole!r}, which includes mtp_hybrid_override_pattern")
        elif predictions:
            self.leave_out("no effect on the model", (*self.at, "mtp_hybrid_override_pattern"))
        spec = data.get("mtp_mamba_stack_spec")
        if isinstance(spec, dict) and self.rename(spec.get("_target_")) == LAYERS[MAMBA]:
            self.leave_out("the same as the default", (*self.at, "mtp_mamba_stack_spec"))
        elif spec is not None:
            self.handle_unknown("mtp_mamba_stack_spec", spec, (*self.at, "mtp_mamba_stack_spec"))
        if not (layers := count_layers(whole)):
            # HybridModel of megatron-core 0.19.2 has no layers then. Earlier versions had Mamba layers.
            self.note("the document has no hybrid_layer_pattern: only Mamba layers are assumed")
        elif self.transformer.get("num_layers") is None:
            self.transformer["num_layers"] = layers
            self.note(f"transformer.num_layers: set to {layers}, the number of layers in hybrid_layer_pattern")

    def _convert_provider(self, data: dict[str, Any], model: Target | None, transformer: Target | None) -> None:
        """Convert what only providers have."""
        self.record_move(("transformer",), self.at)
        self._convert_rope(data)
        plain = self._family.provider.rpartition(".")[2]
        for key, value in self._family.defaults.items():
            own = model is not None and key in model.fields
            if key not in (self.top if own else self.transformer):
                (self.top if own else self.transformer)[key] = value
                self.note(f"{format_path((*self.at, key))}: set to {value!r}, the default of {plain}")
        known = (*(model.init_names if model else ()), *(transformer.init_names if transformer else ()))
        missing = sorted({*known} - {*self.top, *self.transformer, *data})
        if missing and data["_target_"] != self._family.provider:
            cls = data["_target_"].rpartition(".")[2]
            named = [name for name in _IMPORTANT_FIELDS if name in missing]
            more = f" and {len(missing) - len(named)} more" if len(missing) > len(named) else ""
            self.note(
                f"Bridge's defaults are used, which may differ from those of {cls}: {', '.join(named)}{more}; "
                "set those that differ"
            )

    def _convert_rope(self, data: dict[str, Any]) -> None:
        """Convert the scaling of rotary frequencies."""
        if (factor := data.get("scale_factor")) is None:
            return
        if other := [key for key, value in _ROPE_SCALING.items() if data.get(key, value) != value]:
            known = ", ".join(f"{key} {value}" for key, value in _ROPE_SCALING.items())
            self.refuse((*self.at, other[0]), f"Bridge can scale rotary frequencies only with {known}")
        self.top |= {"rope_scaling": True, "rope_scaling_factor": factor}
        self.record_move(("rope_scaling_factor",), (*self.at, "scale_factor"))
        self.note(
            f"{format_path((*self.at, 'scale_factor'))}: "
            "renamed to $.rope_scaling_factor, and $.rope_scaling set to true"
        )

    def _convert_layers(self, data: dict[str, Any]) -> None:
        """Convert layer specs that Bridge selects by default."""
        spec = data.get("transformer_layer_spec") if self._family is T5_FAMILY else self.top.get(self._family.layers)
        name = str(spec.get("_target_") if isinstance(spec, dict) else spec)
        path = (*self.at, self._family.layers)
        if self._is_provider and name in _DEFAULT_SPECS and self.transformer.get(_DEFAULT_SPECS[name]) is not None:
            self.top["transformer_layer_spec"] = None
            field = _DEFAULT_SPECS[name]
            self.note(
                f"{format_path(path)}: left to the default, "
                f"which selects the same layers for a transformer with {field}"
            )
        elif self._family is T5_FAMILY and name in (_T5_LAYERS % "local", _T5_LAYERS % "transformer_engine"):
            self.transformer["transformer_impl"] = "local" if "local" in name else "transformer_engine"
            self.note(
                f"{format_path(path)}: left to the default, with transformer_impl "
                f"{self.transformer['transformer_impl']}"
            )
        elif self._family is T5_FAMILY and spec is not None:
            self.refuse(
                path, "Bridge has separate specs for encoder and decoder layers: remove it if it is the default"
            )

    def _note_lost_functions(self) -> None:
        """Note the functions that megatron.training does not write, and what is assumed instead."""
        self._read_activation_from_metadata()
        if self.transformer and "activation_func" not in self.transformer:
            gated = ", and this transformer is gated" if self.transformer.get("gated_linear_unit") else ""
            self.note(
                f"the document has no activation_func, which megatron.training does not write{gated}: GELU is assumed; "
                "set transformer.activation_func if the model uses another function (silu for SwiGLU)"
            )
        if self._family is not T5_FAMILY and self._family.layers not in self.top:
            self.note(
                f"the document has no {self._family.layers}, which megatron.training writes only if it is null: "
                "the default layers are assumed"
            )

    def _read_activation_from_metadata(self) -> None:
        """Set the activation function from the checkpoint metadata if the document lacks it."""
        metadata = self.top.get("extra_checkpoint_metadata")
        name = metadata.get(_ACTIVATION_KEY) if isinstance(metadata, dict) else None
        if self._inner is not None and isinstance(name, str) and "activation_func" not in self.transformer:
            path = (*self.at, "extra_checkpoint_metadata")
            self.convert_field(self.transformer, self._inner.fields["activation_func"], name, path)
            self.note(f"transformer.activation_func: {name} taken from extra_checkpoint_metadata")
