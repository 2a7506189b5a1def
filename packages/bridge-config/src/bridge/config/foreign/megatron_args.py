"""Megatron-LM's arguments, as its checkpoints keep them: read as a document.

They are the `args` of a `model_optim_rng.pt` or `common.pt`, exported as JSON: `json.dump(vars(args), file,
default=str)`. What describes the model and how it is split is taken, as `core_transformer_config_from_args` and
`gpt_config_from_args` of megatron-core 0.19.2 take it; what the training run alone is about is left out, by name.
"""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

from bridge.config.errors import DocumentError, Problem
from bridge.config.foreign import (
    GPT,
    MAMBA,
    T5,
    YARN,
    Adoption,
    is_off,
    layers_in,
    transformer_of,
    with_predictions,
)
from bridge.config.paths import Path, shown
from bridge.config.rewrite import Migrated
from bridge.config.schema.annotations import inner_type

if TYPE_CHECKING:
    from bridge.config.schema.annotations import Type

# Names that no document has but one of Megatron-LM's arguments.
_MARKS = frozenset(
    [
        "untie_embeddings_and_output_weights",
        "padded_vocab_size",
        "swiglu",
        "bias_gelu_fusion",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_experts",
        "group_query_attention",
        "rotary_seq_len_interpolation_factor",
        "micro_batch_size",
        "tokenizer_type",
    ]
)
_NEEDED = ("hidden_size", "num_attention_heads", "max_position_embeddings")
# What a switch that says no is called where it says yes.
_NEGATED = {"no_persist_layer_norm": "persist_layer_norm", "disable_bias_linear": "add_bias_linear"}
# Fields of the transformer that are called otherwise there.
_RENAMED = {
    "num_experts": "num_moe_experts",
    "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "num_layers_in_last_pipeline_stage",
    "fp8_param_gather": "fp8_param",
    "fp4_param_gather": "fp4_param",
    "seed": "inference_sampling_seed",
    "model_parallel_size": "tensor_model_parallel_size",
    "norm_epsilon": "layernorm_epsilon",
}
# Fields of the model that are called otherwise there.
_MODEL = {
    "max_position_embeddings": "seq_length",
    "use_rope_scaling": "rope_scaling",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}
# What becomes of several arguments together; these are looked at by name.
_TOGETHER = frozenset(
    [
        "num_layers",
        "encoder_num_layers",
        "decoder_num_layers",
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "swiglu",
        "squared_relu",
        "quick_geglu",
        "bias_gelu_fusion",
        "bias_swiglu_fusion",
        "init_method_xavier_uniform",
        "group_query_attention",
        "num_query_groups",
        "rope_type",
        "cp_comm_type",
        "ffn_hidden_size",
        "hybrid_layer_pattern",
        "hybrid_override_pattern",
        "mtp_hybrid_override_pattern",
        "padded_vocab_size",
        "vocab_size",
        "make_vocab_size_divisible_by",
        "untie_embeddings_and_output_weights",
        "position_embedding_type",
        "use_rotary_position_embeddings",
        "add_position_embedding",
        "rope_scaling_factor",
        "heterogeneous_layers_config_path",
        "seq_length",
        "spec",
        "model_type",
    ]
)
# Arguments that change the model in a way that no document of ours says.
_REFUSED = {
    "kitchen_config_file": "Bridge has no form for layers of Kitchen",
    "kitchen_recipe_number": "Bridge has no form for layers of Kitchen",
    "te_precision_config_file": "the file is not read: give what is in it as transformer.quant_recipe",
    "yaml_cfg": "the model is described in that file, in a form that Bridge does not read",
    "retro_add_retriever": "Bridge has no configuration for a RETRO model",
    "hybrid_attention_ratio": "the ratio went: write the layers out in hybrid_layer_pattern",
    "hybrid_mlp_ratio": "the ratio went: write the layers out in hybrid_layer_pattern",
    "pipeline_model_parallel_split_rank": "megatron-core has no pipeline with an encoder in it any more",
    "encoder_tensor_model_parallel_size": "megatron-core has no ranks of an encoder's own any more",
    "encoder_pipeline_model_parallel_size": "megatron-core has no ranks of an encoder's own any more",
    "vision_pretraining": "Bridge has no configuration for a vision model",
}
# How names about the run alone begin that the parser of megatron-core 0.19.2 has not: of its course, or former ones.
_RUN = re.compile(
    "DDP_impl|activations_checkpoint_|adam_|adlr_|async_|auto_detect_|batch_size|bert_|biencoder_|checkpoint_|ckpt_|consumed_|"
    "curr_iteration|data_|dataloader_|dataset_|ddp_|delay_grad_reduce|delay_param_gather|dino_|dist_ckpt_|"
    "distribute_checkpointed_activations|do_(test|train|valid)|embedder_|enable_one_logger|error_injection_|eval_|exit_|"
    "expert_parallel|fim_|fsdp_|ft_|ict_|inference_|iteration|log_|logging_|lr_|mmap_warmup|no_async_|num_floating_point_|"
    "num_workers|one_logger_|optimizer_|profile|rampup_|rank|rerun_|retriever_|retro_|rl_|save_|"
    "scatter_gather_tensors_in_pipeline|skipped_train_samples|straggler_|tensorboard_|tokenizer_|train_|"
    "transformer_pipeline_model_parallel_size|use_contiguous_buffers_in_local_ddp|use_dist_ckpt|"
    "use_layer_wise_distributed_optimizer|use_(legacy|mcore)_models|use_ring_exchange_p2p|valid_|wandb_|warmup|world_size"
)
# Specs that say in so many words what the default choice of layers comes to.
_USUAL_SPECS = (
    ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"],
    ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"],
)
# The defaults of YaRN, where an argument is not given.
_YARN = {
    "rotary_scaling_factor": ("yarn_rotary_scaling_factor", 1.0),
    "yarn_original_max_position_embeddings": ("yarn_original_max_position_embeddings", 4096),
    "yarn_beta_fast": ("yarn_beta_fast", 32.0),
    "yarn_beta_slow": ("yarn_beta_slow", 1.0),
    "mscale": ("yarn_mscale", 1.0),
    "mscale_all_dim": ("yarn_mscale_all_dim", 0.0),
    "yarn_correction_range_round_to_int": ("yarn_correction_range_round_to_int", True),
}
# Fields that the parser takes as text too: a number, or a list made of lists by + and *.
_PATTERNS = frozenset(["moe_layer_freq", "linear_attention_freq", "no_rope_freq", "window_attn_skip_freq"])
_CLASS_CHOICES = (
    "multi_latent_attention",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
)
_XAVIER = "torch.nn.init.xavier_uniform_"
_SCALING = 8.0
"""The factor by which Megatron-LM scales rotary frequencies, whatever rope_scaling_factor is (megatron-core 0.19.2)."""


def adopted(data: object) -> Migrated | None:
    """The document of the model that Megatron-LM's arguments `data` describe; None if `data` is nothing of the kind.

    They may stand in a section `args`, as in a checkpoint.

    Raises:
        DocumentError: they are not complete.
    """
    if not isinstance(data, dict) or "_target_" in data or "transformer" in data:
        return None
    section = data.get("args")
    args, at = (section, ("args",)) if isinstance(section, dict) else (data, ())
    found = sorted(_MARKS & args.keys())
    if len(found) < 2 or "_target_" in args:
        return None
    missing = [name for name in _NEEDED if args.get(name) is None]
    if args.get("num_layers") is None and not layers_in(_pattern(args)):
        missing.insert(0, "num_layers")
    if missing:
        what = f"these are arguments of Megatron-LM ({', '.join(found[:3])}), but some are missing: "
        how = "export all of them, as in json.dump(vars(checkpoint['args']), file, default=str)"
        raise DocumentError([Problem(shown(at), f"{what}{', '.join(missing)}; {how}")])
    return _ArgumentsAdoption(args, at).finished()


def _pattern(args: dict[str, Any]) -> Any:
    return args.get("hybrid_layer_pattern") or args.get("hybrid_override_pattern")


def _model_of(args: dict[str, Any]) -> str:
    """Our config for the model of these arguments."""
    if _pattern(args) or (isinstance(args.get("spec"), list) and args["spec"] in _USUAL_SPECS):
        return MAMBA
    has_decoder = any(args.get(name) is not None for name in ("decoder_num_layers", "decoder_seq_length"))
    return T5 if has_decoder or str(args.get("model_type")).endswith("encoder_and_decoder") else GPT


@cache
def known_arguments() -> dict[str, Any]:
    """The arguments of Megatron-LM that the shipped list has, and their defaults."""
    text = files("bridge.config").joinpath("arguments.json").read_text(encoding="utf-8")
    arguments: dict[str, Any] = json.loads(text)["arguments"]
    return arguments


class _ArgumentsAdoption(Adoption):
    """The arguments of one model on their way to a document of ours."""

    def __init__(self, args: dict[str, Any], at: Path) -> None:
        from bridge.config.schema.table import shipped

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
            self.note(f"left out, without a part in the model: {', '.join(run)}")

    def _is_yarn(self) -> bool:
        return self._args.get("position_embedding_type") == "yarn" and not self._args.get("multi_latent_attention")

    def _sort(self) -> list[str]:
        """Take over what stands for one field; names what is about the run alone."""
        run, usual = [], 0
        for name, value in self._args.items():
            path, known = (*self.at, name), name in known_arguments()
            if name in _REFUSED:
                if not (is_off(value) or value == 0):
                    self.problem(path, _REFUSED[name])
            elif name in _NEGATED:
                if name == "disable_bias_linear" and value and self._args.get("add_bias_linear"):
                    self.problem(path, "add_bias_linear says the contrary: remove one of them")
                elif value is not None:
                    self._set(_NEGATED[name], not value)
            elif name in _RENAMED:
                if value is not None:
                    self._put(_RENAMED[name], value, name)
            elif name in _MODEL:
                self._put_top(_MODEL[name], value, name)
            elif name in _TOGETHER or (name in _YARN and self._is_yarn()):
                continue
            elif name in self._inner.fields:
                if value is not None or name not in _NEGATED.values():
                    self._put(name, value, name)
            elif name in self._model.fields:
                self._put_top(name, value, name)
            elif known and value == known_arguments()[name]:
                usual += 1
            elif known or _RUN.match(str(name)):
                run.append(str(name))
            else:
                self.unknown(name, value, path)
        return [*run, f"{usual} more as by default"] if usual else run

    def _put(self, name: str, value: Any, given: str) -> None:
        """A field of the transformer."""
        path, field = (*self.at, given), self._inner.fields[name]
        if name in _PATTERNS and isinstance(value, str):
            if (pattern := _pattern_of_layers(value)) is None:
                self.problem(path, f"expected an integer or a pattern such as ([0]*1+[1]*3), got {value!r:.100}")
                return
            value = pattern
        if name == "perform_initialization" and value is False:
            self.note(
                f"{shown(path)}: false is taken over, so weights are not drawn: load a checkpoint, or set "
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
        chosen = [name for name in _ACTIVATIONS if args.get(name)]
        for name in chosen[1:]:
            self.problem((*self.at, name), f"{chosen[0]} is another activation function: only one can be on")
        function, is_gated = _ACTIVATIONS[chosen[0]] if chosen else ("torch.nn.functional.gelu", False)
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
            self.problem((*self.at, "rope_type"), "only multi-latent attention has other positions than rope here")
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
            self.problem((*self.at, "add_position_embedding"), f"set {given} to what the model has instead")
        self._put_top(given, kind, given)
        if self._is_yarn():
            for name, (field, default) in _YARN.items():
                value = args.get(name)
                self._put(field, default if value is None else value, name)
        if (factor := args.get("rope_scaling_factor")) not in (None, _SCALING) and args.get("use_rope_scaling"):
            self.note(
                f"{shown((*self.at, 'rope_scaling_factor'))}: {factor} left out, Megatron-LM scales by {_SCALING} "
                "whatever it is: set $.rope_scaling_factor if the model was made with another"
            )
        if (length := args.get("seq_length")) not in (None, args["max_position_embeddings"]):
            self.note(
                f"{shown((*self.at, 'seq_length'))}: {length} left out, it is that of the training run: the model's "
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
                at = shown((*self.at, "vocab_size"))
                self.note(f"{at}: {size} left out, the model's $.vocab_size is padded_vocab_size")
        elif size is not None:
            self._put_top("vocab_size", size, "vocab_size")
            self._set_top("should_pad_vocab", True)
        else:
            self.note("the arguments have no vocabulary: set vocab_size")
        if args.get("make_vocab_size_divisible_by") is not None:
            name = "make_vocab_size_divisible_by"
            self._put_top(name, args[name], name)

    def _take_spec(self) -> None:
        args = self._args
        spec, path = args.get("spec"), (*self.at, "spec")
        if spec in _USUAL_SPECS:
            self.note(f"{shown(path)}: left to the default, which chooses these layers")
        elif spec == ["local"]:
            self.transformer["transformer_impl"] = "local"
        elif not is_off(spec):
            self.problem(
                path, "layers of a module of their own: remove it, and give them as the layers of the document"
            )
        layers = ("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json")
        if not is_off(args.get(layers[0])) and is_off(args.get(layers[1])):
            self.problem((*self.at, layers[0]), f"reading a document opens no file: give what is in it as {layers[1]}")

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
                f"give virtual_pipeline_model_parallel_size, the number of stages of {layers} layers on each rank",
            )


_ACTIVATIONS: dict[str, tuple[str, bool]] = {
    "swiglu": ("torch.nn.functional.silu", True),
    "squared_relu": ("megatron.core.activations.squared_relu", False),
    "quick_geglu": ("megatron.core.fusions.fused_bias_geglu.quick_gelu", True),
}


def _kinds(type_: Type) -> set[str]:
    """The kinds of plain values of a type."""
    from bridge.config.schema.annotations import Plain

    return {member.kind for member in type_ if isinstance(member, Plain)}


def _pattern_of_layers(text: str) -> int | list[int] | None:
    """What the parser makes of a pattern of layers, `([0]*1+[1]*3)`; None if it is none. Nothing is evaluated."""
    if len(text) > _LONGEST_PATTERN:
        return None
    try:
        found = _summed(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return found


def _summed(node: ast.expr) -> int | list[int]:
    """The value of a node made of whole numbers, lists of them, `list + list`, `list * number`.

    Raises:
        ValueError: it is something else, or has more layers than any model.
    """
    match node:
        case ast.Constant(value=int() as value) if type(value) is int:
            return value
        case ast.List(elts=items):
            numbers = [_summed(item) for item in items]
            if all(isinstance(number, int) for number in numbers):
                return cast(list[int], numbers)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _summed(left), _summed(right)
            if isinstance(first, list) and isinstance(second, list):
                return first + second
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            part, times = _summed(left), _summed(right)
            if isinstance(part, int):
                part, times = times, part
            if isinstance(part, list) and isinstance(times, int) and len(part) * times <= _MOST_LAYERS:
                return part * times
    raise ValueError


_LONGEST_PATTERN = 10_000
_MOST_LAYERS = 10_000


def _read(value: Any, type_: Type) -> Any:
    """A value of the arguments, in which an enumeration's member stands as Python prints it: `AttnBackend.auto`."""
    if isinstance(value, list):
        return [_read(item, inner_type(type_)) for item in value]
    if isinstance(value, str) and "." in value:
        from bridge.config.schema.annotations import Instance
        from bridge.config.schema.table import shipped

        cls, _, member = value.rpartition(".")
        for one in type_:
            if isinstance(one, Instance) and one.name.endswith(f".{cls}") and (enum := shipped(one.name)):
                return member if member in enum.members else value
    return value
