"""Megatron-LM's arguments, as its checkpoints keep them: read as a document.

They are the `args` of a `model_optim_rng.pt` or `common.pt`, exported as JSON: `json.dump(vars(args), file,
default=str)`. What describes the model and how it is split is taken, as `core_transformer_config_from_args` and
`gpt_config_from_args` of megatron-core 0.19.2 take it; what the training run alone is about is left out, by name.
"""

from __future__ import annotations

from typing import Any

from bridge.config.errors import DocumentError, Problem
from bridge.config.foreign.argument_names import (
    ACTIVATIONS,
    MARKS,
    MODEL,
    NEGATED,
    PATTERNS,
    REFUSED,
    RENAMED,
    RUN,
    TOGETHER,
    USUAL_SPECS,
    YARN_FIELDS,
    known_arguments,
)
from bridge.config.foreign.conversion import Adoption, is_off, transformer_of
from bridge.config.foreign.layer_patterns import layers_in, layers_of_pattern, with_predictions
from bridge.config.foreign.names import GPT, MAMBA, T5, YARN
from bridge.config.paths import Path, format_path
from bridge.config.rewrite import Migration
from bridge.config.schema.annotations import Instance, Plain, Type, inner_type
from bridge.config.schema.table import shipped

_NEEDED = ("hidden_size", "num_attention_heads", "max_position_embeddings")
_CLASS_CHOICES = (
    "multi_latent_attention",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
)
_XAVIER = "torch.nn.init.xavier_uniform_"
_SCALING = 8.0
"""The factor by which Megatron-LM scales rotary frequencies, whatever rope_scaling_factor is (megatron-core 0.19.2)."""


def adopted(data: object) -> Migration | None:
    """The document of the model that Megatron-LM's arguments `data` describe; None if `data` is nothing of the kind.

    They may stand in a section `args`, as in a checkpoint.

    Raises:
        DocumentError: they are not complete.
    """
    if not isinstance(data, dict) or "_target_" in data or "transformer" in data:
        return None
    section = data.get("args")
    args, at = (section, ("args",)) if isinstance(section, dict) else (data, ())
    found = sorted(MARKS & args.keys())
    if len(found) < 2 or "_target_" in args:
        return None
    missing = [name for name in _NEEDED if args.get(name) is None]
    if args.get("num_layers") is None and not layers_in(_pattern(args)):
        missing.insert(0, "num_layers")
    if missing:
        what = f"these are arguments of Megatron-LM ({', '.join(found[:3])}), but some are missing: "
        how = "export all of them, as in json.dump(vars(checkpoint['args']), file, default=str)"
        raise DocumentError([Problem(format_path(at), f"{what}{', '.join(missing)}; {how}")])
    return _ArgumentsAdoption(args, at).finished()


def _pattern(args: dict[str, Any]) -> Any:
    return args.get("hybrid_layer_pattern") or args.get("hybrid_override_pattern")


def _model_of(args: dict[str, Any]) -> str:
    """Our config for the model of these arguments."""
    if _pattern(args) or (isinstance(args.get("spec"), list) and args["spec"] in USUAL_SPECS):
        return MAMBA
    has_decoder = any(args.get(name) is not None for name in ("decoder_num_layers", "decoder_seq_length"))
    return T5 if has_decoder or str(args.get("model_type")).endswith("encoder_and_decoder") else GPT


class _ArgumentsAdoption(Adoption):
    """The arguments of one model on their way to a document of ours."""

    def __init__(self, args: dict[str, Any], at: Path) -> None:
        target = _model_of(args)
        super().__init__(target, at)
        self._args = args
        cls = YARN if self._is_yarn() else transformer_of({name: args.get(name) for name in _CLASS_CHOICES})
        inner, model = shipped(cls), shipped(target)
        assert inner is not None
        assert model is not None
        self._inner, self._model = inner, model
        self.transformer["_target_"] = cls
        self.top["transformer"] = self.transformer
        self.moved(("transformer",), at)
        run = self._sort()
        self._take_together()
        if run:
            self.note(f"left out, no effect on the model: {', '.join(run)}")

    def _is_yarn(self) -> bool:
        return self._args.get("position_embedding_type") == "yarn" and not self._args.get("multi_latent_attention")

    def _sort(self) -> list[str]:
        """Take over what stands for one field; names what is about the run alone."""
        run, usual = [], 0
        for name, value in self._args.items():
            path, known = (*self.at, name), name in known_arguments()
            if name in REFUSED:
                if not (is_off(value) or value == 0):
                    self.problem(path, REFUSED[name])
            elif name in NEGATED:
                if name == "disable_bias_linear" and value and self._args.get("add_bias_linear"):
                    self.problem(path, "contradicts add_bias_linear: remove one of them")
                elif value is not None:
                    self._set(NEGATED[name], not value)
            elif name in RENAMED:
                if value is not None:
                    self._put(RENAMED[name], value, name)
            elif name in MODEL:
                self._put_top(MODEL[name], value, name)
            elif name in TOGETHER or (name in YARN_FIELDS and self._is_yarn()):
                continue
            elif name in self._inner.fields:
                if value is not None or name not in NEGATED.values():
                    self._put(name, value, name)
            elif name in self._model.fields:
                self._put_top(name, value, name)
            elif known and value == known_arguments()[name]:
                usual += 1
            elif known or RUN.match(str(name)):
                run.append(str(name))
            else:
                self.unknown(name, value, path)
        return [*run, f"{usual} more with default values"] if usual else run

    def _put(self, name: str, value: Any, given: str) -> None:
        """A field of the transformer."""
        path, field = (*self.at, given), self._inner.fields[name]
        if name in PATTERNS and isinstance(value, str):
            if (pattern := layers_of_pattern(value)) is None:
                self.problem(path, f"expected an integer or a pattern such as ([0]*1+[1]*3), got {value!r:.100}")
                return
            value = pattern
        if name == "perform_initialization" and value is False:
            self.note(
                f"{format_path(path)}: kept as false, so weights are not initialized: load a checkpoint, or set "
                "$.transformer.perform_initialization to true"
            )
        if value is None and not {"null", "bool"} & _kinds(field.type):
            return  # not given: the default is taken
        self.put(self.transformer, field, _read(value, field.type), path)
        if name in self.transformer:
            self.moved(("transformer", name), path)

    def _put_top(self, name: str, value: Any, given: str) -> None:
        """A field of the model."""
        path, field = (*self.at, given), self._model.fields.get(name)
        if field is None:
            self.unknown(given, value, path)
        elif value is not None:
            self.put(self.top, field, value, path)
            self.moved((name,), path)

    def _take_together(self) -> None:
        for take in (
            self._take_layers,
            self._take_activation,
            self._take_attention,
            self._take_precision,
            self._take_positions,
            self._take_vocabulary,
            self._take_spec,
            self._take_stages,
        ):
            take()
        self._set("deallocate_pipeline_outputs", True)
        self._set("batch_p2p_comm", not self._args.get("overlap_p2p_comm"))

    def _set(self, name: str, value: Any) -> None:
        """A field of the transformer that Megatron-LM derives; one that is given itself, by an override say, stays."""
        if self._args.get(name) is None:
            self.transformer[name] = value

    def _set_top(self, name: str, value: Any) -> None:
        """A field of the model that Megatron-LM derives, likewise."""
        if self._args.get(name) is None:
            self.top[name] = value

    def _take_layers(self) -> None:
        args = self._args
        if self._model.name == T5:
            encoder = args.get("encoder_num_layers") or args.get("num_layers")
            self._put_top("encoder_num_layers", encoder, "encoder_num_layers")
            given = "decoder_num_layers" if args.get("decoder_num_layers") is not None else "num_layers"
            self._put("num_layers", args.get(given), given)
        elif self._model.name == MAMBA:
            self._take_pattern()
        else:
            self._put("num_layers", args.get("num_layers"), "num_layers")

    def _take_pattern(self) -> None:
        args = self._args
        given = "hybrid_layer_pattern" if args.get("hybrid_layer_pattern") else "hybrid_override_pattern"
        pattern = with_predictions(_pattern(args), args.get("mtp_hybrid_override_pattern"), args.get("mtp_num_layers"))
        self._put_top("hybrid_layer_pattern", pattern, given)
        self._put("num_layers", layers_in(pattern) or args.get("num_layers"), "num_layers")
        self.transformer["is_hybrid_model"] = True
        if isinstance(pattern, str):
            if not args.get("mtp_num_layers") and "/" in pattern:
                self.transformer["mtp_num_layers"] = pattern.count("/")
            if "D" in pattern:
                self.transformer["experimental_attention_variant"] = "dsa"

    def _take_activation(self) -> None:
        args, fused = self._args, "bias_swiglu_fusion" if self._args.get("swiglu") else "bias_gelu_fusion"
        if fused in args:
            self._put("bias_activation_fusion", args[fused], fused)
        chosen = [name for name in ACTIVATIONS if args.get(name)]
        for name in chosen[1:]:
            self.problem((*self.at, name), f"conflicts with {chosen[0]}: set only one activation function")
        function, is_gated = ACTIVATIONS[chosen[0]] if chosen else ("torch.nn.functional.gelu", False)
        self._set("activation_func", function)
        self._set("gated_linear_unit", is_gated)
        if args.get("ffn_hidden_size") is not None:
            self._put("ffn_hidden_size", args["ffn_hidden_size"], "ffn_hidden_size")
        elif args.get("swiglu") and isinstance(args["hidden_size"], int):  # as many weights as without a gate, in 64s
            self._set("ffn_hidden_size", 4 * args["hidden_size"] * 2 // 3 // 64 * 64)
        if args.get("init_method_xavier_uniform"):
            self._set("init_method", _XAVIER)

    def _take_attention(self) -> None:
        args = self._args
        if args.get("group_query_attention", args.get("num_query_groups") is not None):
            self._put("num_query_groups", args.get("num_query_groups"), "num_query_groups")
        if (kind := args.get("rope_type")) is not None and "rope_type" in self._inner.fields:
            self._put("rope_type", kind, "rope_type")
        elif kind not in (None, "rope"):
            self.problem((*self.at, "rope_type"), "only multi-latent attention supports a type other than 'rope'")
        kinds = args.get("cp_comm_type")
        if kinds is not None:
            self._put(
                "cp_comm_type", kinds[0] if isinstance(kinds, list) and len(kinds) == 1 else kinds, "cp_comm_type"
            )

    def _take_precision(self) -> None:
        args = self._args
        if args.get("params_dtype") is None:
            half = "torch.bfloat16" if args.get("bf16") else "torch.float16" if args.get("fp16") else "torch.float32"
            self._set("params_dtype", half)
        self._set("pipeline_dtype", self.transformer["params_dtype"])

    def _take_positions(self) -> None:
        args = self._args
        given = "position_embedding_type"
        kind = "rope" if args.get("use_rotary_position_embeddings") else args.get(given) or "learned_absolute"
        if args.get("add_position_embedding") is False and kind == "learned_absolute":
            self.problem((*self.at, "add_position_embedding"), f"set {given} to the one that the model uses")
        self._put_top(given, kind, given)
        if self._is_yarn():
            for name, (field, default) in YARN_FIELDS.items():
                value = args.get(name)
                self._put(field, default if value is None else value, name)
        if (factor := args.get("rope_scaling_factor")) not in (None, _SCALING) and args.get("use_rope_scaling"):
            self.note(
                f"{format_path((*self.at, 'rope_scaling_factor'))}: {factor} left out, Megatron-LM ignores it and "
                f"scales by {_SCALING}: set $.rope_scaling_factor if the model was trained with another factor"
            )
        if (length := args.get("seq_length")) not in (None, args["max_position_embeddings"]):
            self.note(
                f"{format_path((*self.at, 'seq_length'))}: {length} left out, it is that of the training run: "
                "$.seq_length is max_position_embeddings"
            )

    def _take_vocabulary(self) -> None:
        args = self._args
        self._set_top("share_embeddings_and_output_weights", not args.get("untie_embeddings_and_output_weights", False))
        size, padded = args.get("vocab_size"), args.get("padded_vocab_size")
        if padded is not None:
            self._put_top("vocab_size", padded, "padded_vocab_size")
            self._set_top("should_pad_vocab", False)
            if size not in (None, padded):
                at = format_path((*self.at, "vocab_size"))
                self.note(f"{at}: {size} left out, $.vocab_size is padded_vocab_size")
        elif size is not None:
            self._put_top("vocab_size", size, "vocab_size")
            self._set_top("should_pad_vocab", True)
        else:
            self.note("the arguments have no vocabulary size: set vocab_size")
        if args.get("make_vocab_size_divisible_by") is not None:
            name = "make_vocab_size_divisible_by"
            self._put_top(name, args[name], name)

    def _take_spec(self) -> None:
        args = self._args
        spec, path = args.get("spec"), (*self.at, "spec")
        if spec in USUAL_SPECS:
            self.note(f"{format_path(path)}: left to the default, which selects the same layers")
        elif spec == ["local"]:
            self.transformer["transformer_impl"] = "local"
        elif not is_off(spec):
            self.problem(path, "custom layer spec: remove it, and set the layer spec of the document instead")
        layers = ("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json")
        if not is_off(args.get(layers[0])) and is_off(args.get(layers[1])):
            self.problem((*self.at, layers[0]), f"Bridge does not read this file: put its contents into {layers[1]}")

    def _take_stages(self) -> None:
        """The virtual pipeline, for arguments that Megatron-LM has not worked out yet."""
        args = self._args
        if args.get("virtual_pipeline_model_parallel_size") is not None:
            return
        if (stages := args.get("num_virtual_stages_per_pipeline_rank")) not in (None, 1):
            self._put("virtual_pipeline_model_parallel_size", stages, "num_virtual_stages_per_pipeline_rank")
        if (layers := args.get("num_layers_per_virtual_pipeline_stage")) is not None:
            self.problem(
                (*self.at, "num_layers_per_virtual_pipeline_stage"),
                f"set virtual_pipeline_model_parallel_size instead: the stages of {layers} layers on each rank",
            )


def _kinds(type_: Type) -> set[str]:
    """The kinds of plain values of a type."""
    return {member.kind for member in type_ if isinstance(member, Plain)}


def _read(value: Any, type_: Type) -> Any:
    """A value of the arguments, in which an enumeration's member stands as Python prints it: `AttnBackend.auto`."""
    if isinstance(value, list):
        return [_read(item, inner_type(type_)) for item in value]
    if isinstance(value, str) and "." in value:
        cls, _, member = value.rpartition(".")
        for one in type_:
            if isinstance(one, Instance) and one.name.endswith(f".{cls}") and (enum := shipped(one.name)):
                return member if member in enum.members else value
    return value
