"""Convert the arguments in Megatron-LM's checkpoints to a document.

They are the `args` of a `model_optim_rng.pt` or `common.pt`, exported as JSON: `json.dump(vars(args), file,
default=str)`. Arguments about the model and its layout are converted as `core_transformer_config_from_args` and
`gpt_config_from_args` of megatron-core 0.19.2 do it. Arguments that concern only the training run are left out and
listed in a note.
"""

from __future__ import annotations

from typing import Any

from bridge.config.errors import DocumentError, Problem
from bridge.config.foreign.argument_names import (
    ACTIVATIONS,
    COMBINED,
    DEFAULT_SPECS,
    MARKERS,
    MODEL_FIELDS,
    NEGATED_FLAGS,
    PATTERN_FIELDS,
    REFUSED,
    RENAMED_FIELDS,
    RUN_ARGUMENTS,
    YARN_FIELDS,
    load_arguments,
)
from bridge.config.foreign.conversion import Conversion, choose_transformer, is_off
from bridge.config.foreign.layer_patterns import add_mtp_pattern, count_layers, parse_layer_pattern
from bridge.config.foreign.names import GPT, MAMBA, T5, YARN
from bridge.config.migration import Migration
from bridge.config.paths import Path, format_path
from bridge.config.schema.annotations import Instance, Plain, Type, get_inner_type
from bridge.config.schema.table import get_shipped

_NEEDED = ("hidden_size", "num_attention_heads", "max_position_embeddings")
_CLASS_CHOICES = (
    "multi_latent_attention",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
)
_XAVIER = "torch.nn.init.xavier_uniform_"
_SCALING = 8.0
"""The factor that Megatron-LM uses instead of rope_scaling_factor, which it ignores (megatron-core 0.19.2)."""


def convert_arguments(data: object) -> Migration | None:
    """Convert Megatron-LM's arguments, or a checkpoint with a section `args`; return None for any other document.

    Raises:
        DocumentError: required arguments are missing.
    """
    if not isinstance(data, dict) or "_target_" in data or "transformer" in data:
        return None
    section = data.get("args")
    args, at = (section, ("args",)) if isinstance(section, dict) else (data, ())
    found = sorted(MARKERS & args.keys())
    # One marker is not enough: another program may use the same name.
    if len(found) < 2 or "_target_" in args:
        return None
    missing = [name for name in _NEEDED if args.get(name) is None]
    if args.get("num_layers") is None and not count_layers(_get_pattern(args)):
        missing.insert(0, "num_layers")
    if missing:
        what = f"these are arguments of Megatron-LM ({', '.join(found[:3])}), but some are missing: "
        how = "export all of them, as in json.dump(vars(checkpoint['args']), file, default=str)"
        raise DocumentError([Problem(format_path(at), f"{what}{', '.join(missing)}; {how}")])
    return _ArgumentsConversion(args, at).finish()


def _get_pattern(args: dict[str, Any]) -> Any:
    return args.get("hybrid_layer_pattern") or args.get("hybrid_override_pattern")


def _choose_model(args: dict[str, Any]) -> str:
    """Return the name of the configuration class for these arguments."""
    if _get_pattern(args) or (isinstance(args.get("spec"), list) and args["spec"] in DEFAULT_SPECS):
        return MAMBA
    has_decoder = any(args.get(name) is not None for name in ("decoder_num_layers", "decoder_seq_length"))
    # The export writes the enum ModelType with `str`: "ModelType.encoder_and_decoder".
    return T5 if has_decoder or str(args.get("model_type")).endswith("encoder_and_decoder") else GPT


class _ArgumentsConversion(Conversion):
    """Converts Megatron-LM's arguments to a Bridge document."""

    def __init__(self, args: dict[str, Any], at: Path) -> None:
        target = _choose_model(args)
        super().__init__(target, at)
        self._args = args
        cls = YARN if self._is_yarn() else choose_transformer({name: args.get(name) for name in _CLASS_CHOICES})
        inner, model = get_shipped(cls), get_shipped(target)
        assert inner is not None
        assert model is not None
        self._inner, self._model = inner, model
        self.transformer["_target_"] = cls
        self.top["transformer"] = self.transformer
        self.record_move(("transformer",), at)
        run = self._convert_single()
        self._convert_combined()
        if run:
            self.note(f"left out, no effect on the model: {', '.join(run)}")

    def _is_yarn(self) -> bool:
        return self._args.get("position_embedding_type") == "yarn" and not self._args.get("multi_latent_attention")

    def _convert_single(self) -> list[str]:
        """Convert the arguments that set one field each; return the names of those about the training run."""
        run, usual = [], 0
        for name, value in self._args.items():
            path, known = (*self.at, name), name in load_arguments()
            if name in REFUSED:
                if not (is_off(value) or value == 0):
                    self.refuse(path, REFUSED[name])
            elif name in NEGATED_FLAGS:
                if name == "disable_bias_linear" and value and self._args.get("add_bias_linear"):
                    self.refuse(path, "conflicts with add_bias_linear: remove one of them")
                elif value is not None:
                    self._set_derived(NEGATED_FLAGS[name], not value)
            elif name in RENAMED_FIELDS:
                if value is not None:
                    self._convert_field(RENAMED_FIELDS[name], value, name)
            elif name in MODEL_FIELDS:
                self._convert_model_field(MODEL_FIELDS[name], value, name)
            elif name in COMBINED or (name in YARN_FIELDS and self._is_yarn()):
                continue
            elif name in self._inner.fields:
                # Unset, it may still be set by its negated flag: None must not overwrite that.
                if value is not None or name not in NEGATED_FLAGS.values():
                    self._convert_field(name, value, name)
            elif name in self._model.fields:
                self._convert_model_field(name, value, name)
            elif known and value == load_arguments()[name]:
                usual += 1  # hundreds of these: the note gives only their number
            elif known or RUN_ARGUMENTS.match(str(name)):
                run.append(str(name))
            else:
                self.handle_unknown(name, value, path)
        return [*run, f"{usual} more with default values"] if usual else run

    def _convert_field(self, name: str, value: Any, given: str) -> None:
        """Convert a field of the transformer."""
        path, field = (*self.at, given), self._inner.fields[name]
        if name in PATTERN_FIELDS and isinstance(value, str):
            if (pattern := parse_layer_pattern(value)) is None:
                self.refuse(path, f"expected an integer or a pattern such as ([0]*1+[1]*3), got {value!r:.100}")
                return
            value = pattern
        if name == "perform_initialization" and value is False:
            self.note(
                f"{format_path(path)}: kept as false, so weights are not initialized: load a checkpoint, or set "
                "$.transformer.perform_initialization to true"
            )
        if value is None and not {"null", "bool"} & _list_kinds(field.type):
            return  # not set: keep the default
        self.convert_field(self.transformer, field, _parse_enums(value, field.type), path)
        if name in self.transformer:
            self.record_move(("transformer", name), path)

    def _convert_model_field(self, name: str, value: Any, given: str) -> None:
        """Convert a field of the model."""
        path, field = (*self.at, given), self._model.fields.get(name)
        if field is None:
            self.handle_unknown(given, value, path)
        elif value is not None:
            self.convert_field(self.top, field, value, path)
            self.record_move((name,), path)

    def _convert_combined(self) -> None:
        """Convert the arguments that set fields together, and the fields that Megatron-LM derives."""
        for convert in (
            self._convert_layers,
            self._convert_activation,
            self._convert_attention,
            self._convert_precision,
            self._convert_positions,
            self._convert_vocabulary,
            self._convert_spec,
            self._convert_stages,
        ):
            convert()
        self._set_derived("deallocate_pipeline_outputs", True)
        self._set_derived("batch_p2p_comm", not self._args.get("overlap_p2p_comm"))

    def _set_derived(self, name: str, value: Any) -> None:
        """Set a field of the transformer that Megatron-LM derives, unless the arguments set it directly."""
        if self._args.get(name) is None:
            self.transformer[name] = value

    def _set_derived_model_field(self, name: str, value: Any) -> None:
        """Set a field of the model that Megatron-LM derives, unless the arguments set it directly."""
        if self._args.get(name) is None:
            self.top[name] = value

    def _convert_layers(self) -> None:
        """Convert the number of layers."""
        args = self._args
        if self._model.name == T5:
            encoder = args.get("encoder_num_layers") or args.get("num_layers")
            self._convert_model_field("encoder_num_layers", encoder, "encoder_num_layers")
            given = "decoder_num_layers" if args.get("decoder_num_layers") is not None else "num_layers"
            self._convert_field("num_layers", args.get(given), given)
        elif self._model.name == MAMBA:
            self._convert_pattern()
        else:
            self._convert_field("num_layers", args.get("num_layers"), "num_layers")

    def _convert_pattern(self) -> None:
        """Convert the layer pattern of a hybrid model, and fields that depend on it."""
        args = self._args
        given = "hybrid_layer_pattern" if args.get("hybrid_layer_pattern") else "hybrid_override_pattern"
        pattern = add_mtp_pattern(
            _get_pattern(args), args.get("mtp_hybrid_override_pattern"), args.get("mtp_num_layers")
        )
        self._convert_model_field("hybrid_layer_pattern", pattern, given)
        self._convert_field("num_layers", count_layers(pattern) or args.get("num_layers"), "num_layers")
        # The rest follows from the pattern, as in `core_transformer_config_from_args`.
        self.transformer["is_hybrid_model"] = True
        if isinstance(pattern, str):
            if not args.get("mtp_num_layers") and "/" in pattern:
                self.transformer["mtp_num_layers"] = pattern.count("/")
            if "D" in pattern:
                self.transformer["experimental_attention_variant"] = "dsa"

    def _convert_activation(self) -> None:
        """Convert the activation function, its fusion, the size of the MLP and the initialization."""
        args, fused = self._args, "bias_swiglu_fusion" if self._args.get("swiglu") else "bias_gelu_fusion"
        if fused in args:
            self._convert_field("bias_activation_fusion", args[fused], fused)
        chosen = [name for name in ACTIVATIONS if args.get(name)]
        for name in chosen[1:]:
            self.refuse((*self.at, name), f"conflicts with {chosen[0]}: set only one activation function")
        function, is_gated = ACTIVATIONS[chosen[0]] if chosen else ("torch.nn.functional.gelu", False)
        self._set_derived("activation_func", function)
        self._set_derived("gated_linear_unit", is_gated)
        if args.get("ffn_hidden_size") is not None:
            self._convert_field("ffn_hidden_size", args["ffn_hidden_size"], "ffn_hidden_size")
        elif args.get("swiglu") and isinstance(args["hidden_size"], int):  # as Megatron-LM: a multiple of 64
            self._set_derived("ffn_hidden_size", 4 * args["hidden_size"] * 2 // 3 // 64 * 64)
        if args.get("init_method_xavier_uniform"):
            self._set_derived("init_method", _XAVIER)

    def _convert_attention(self) -> None:
        """Convert query groups, the type of rotary embeddings and context-parallel communication."""
        args = self._args
        # Without the flag, Megatron-LM ignores num_query_groups, whose default is 1.
        if args.get("group_query_attention", args.get("num_query_groups") is not None):
            self._convert_field("num_query_groups", args.get("num_query_groups"), "num_query_groups")
        if (kind := args.get("rope_type")) is not None and "rope_type" in self._inner.fields:
            self._convert_field("rope_type", kind, "rope_type")
        elif kind not in (None, "rope"):
            self.refuse((*self.at, "rope_type"), "only multi-latent attention supports a type other than 'rope'")
        kinds = args.get("cp_comm_type")  # the parser makes a list of one type for all layers
        if kinds is not None:
            self._convert_field(
                "cp_comm_type", kinds[0] if isinstance(kinds, list) and len(kinds) == 1 else kinds, "cp_comm_type"
            )

    def _convert_precision(self) -> None:
        """Convert the types of parameters and of activations between stages."""
        args = self._args
        if args.get("params_dtype") is None:
            half = "torch.bfloat16" if args.get("bf16") else "torch.float16" if args.get("fp16") else "torch.float32"
            self._set_derived("params_dtype", half)
        # After params_dtype, from which Megatron-LM derives it.
        self._set_derived("pipeline_dtype", self.transformer["params_dtype"])

    def _convert_positions(self) -> None:
        """Convert position embeddings and their scaling."""
        args = self._args
        given = "position_embedding_type"
        kind = "rope" if args.get("use_rotary_position_embeddings") else args.get(given) or "learned_absolute"
        if args.get("add_position_embedding") is False and kind == "learned_absolute":
            self.refuse((*self.at, "add_position_embedding"), f"no position embedding is given: set {given}")
        self._convert_model_field(given, kind, given)
        if self._is_yarn():
            for name, (field, default) in YARN_FIELDS.items():
                value = args.get(name)
                self._convert_field(field, default if value is None else value, name)
        if (factor := args.get("rope_scaling_factor")) not in (None, _SCALING) and args.get("use_rope_scaling"):
            self.note(
                f"{format_path((*self.at, 'rope_scaling_factor'))}: {factor} left out, Megatron-LM ignores it and "
                f"scales by {_SCALING}: set $.rope_scaling_factor if the model was trained with another factor"
            )
        if (length := args.get("seq_length")) not in (None, args["max_position_embeddings"]):
            self.note(
                f"{format_path((*self.at, 'seq_length'))}: {length} left out, it is the length of training samples: "
                "$.seq_length is max_position_embeddings"
            )

    def _convert_vocabulary(self) -> None:
        """Convert the size and padding of the vocabulary, and whether embeddings are tied."""
        args = self._args
        self._set_derived_model_field(
            "share_embeddings_and_output_weights", not args.get("untie_embeddings_and_output_weights", False)
        )
        size, padded = args.get("vocab_size"), args.get("padded_vocab_size")
        if padded is not None:
            self._convert_model_field("vocab_size", padded, "padded_vocab_size")
            self._set_derived_model_field("should_pad_vocab", False)  # the size is padded already
            if size not in (None, padded):
                at = format_path((*self.at, "vocab_size"))
                self.note(f"{at}: {size} left out, $.vocab_size is padded_vocab_size")
        elif size is not None:
            self._convert_model_field("vocab_size", size, "vocab_size")
            self._set_derived_model_field("should_pad_vocab", True)
        else:
            self.note("the arguments have no vocabulary size: set vocab_size")
        if args.get("make_vocab_size_divisible_by") is not None:
            name = "make_vocab_size_divisible_by"
            self._convert_model_field(name, args[name], name)

    def _convert_spec(self) -> None:
        """Convert the layer spec, or refuse a custom one."""
        args = self._args
        spec, path = args.get("spec"), (*self.at, "spec")
        if spec in DEFAULT_SPECS:
            self.note(f"{format_path(path)}: left to the default, which selects the same layers")
        elif spec == ["local"]:
            self.transformer["transformer_impl"] = "local"
        elif not is_off(spec):
            self.refuse(path, "custom layer spec: remove it, and set the layer spec of the document instead")
        layers = ("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json")
        if not is_off(args.get(layers[0])) and is_off(args.get(layers[1])):
            self.refuse((*self.at, layers[0]), f"Bridge does not read this file: put its contents into {layers[1]}")

    def _convert_stages(self) -> None:
        """Convert the virtual pipeline if Megatron-LM has not computed its size from the other arguments."""
        args = self._args
        if args.get("virtual_pipeline_model_parallel_size") is not None:
            return
        if (stages := args.get("num_virtual_stages_per_pipeline_rank")) not in (None, 1):
            self._convert_field("virtual_pipeline_model_parallel_size", stages, "num_virtual_stages_per_pipeline_rank")
        if (layers := args.get("num_layers_per_virtual_pipeline_stage")) is not None:
            self.refuse(
                (*self.at, "num_layers_per_virtual_pipeline_stage"),
                f"set virtual_pipeline_model_parallel_size to the number of {layers}-layer stages per rank instead",
            )


def _list_kinds(type_: Type) -> set[str]:
    """Return the kinds of plain values that a type allows."""
    return {member.kind for member in type_ if isinstance(member, Plain)}


def _parse_enums(value: Any, type_: Type) -> Any:
    """Return a value with enum members by name; the export writes them as `str` does: `AttnBackend.auto`."""
    if isinstance(value, list):
        return [_parse_enums(item, get_inner_type(type_)) for item in value]
    if isinstance(value, str) and "." in value:
        cls, _, member = value.rpartition(".")
        for one in type_:
            if isinstance(one, Instance) and one.name.endswith(f".{cls}") and (enum := get_shipped(one.name)):
                return member if member in enum.members else value
    return value
