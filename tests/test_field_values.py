"""Documents refuse exactly the values that megatron-core cannot train one step with, and values without meaning.

A step on a real rank with all checks of values switched off decides. BRIDGE_FIELD_DRAWS sets the number of documents
that are drawn, 150 by default.
"""

import copy
import math
import os
import warnings
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from ranks import run_ranks

from bridge.config import Document, DocumentError, ModelConfig
from bridge.config.read.reader import Reader
from bridge.config.schema import arithmetic
from bridge.dist import Layout, create_process_groups
from bridge.dist.job import make_builder
from bridge.models.common import config as language

DRAWS = int(os.environ.get("BRIDGE_FIELD_DRAWS", "150"))
TOGETHER = 10
"""Documents that the rank trains at a time, because making its process groups takes longer."""
SAMPLE = 16

SMALL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
EXPERTS = {"num_moe_experts": 4, "add_bias_linear": False, "moe_token_dispatcher_type": "alltoall"}
LATENT = {
    "_target_": "megatron.core.transformer.transformer_config.MLATransformerConfig",
    "multi_latent_attention": True,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "rope_type": "rope",
    "add_bias_linear": False,
}
MAMBA = {"mamba_head_dim": 8, "mamba_num_groups": 2, "mamba_state_dim": 8, "is_hybrid_model": True}


def document(family: str, transformer: dict[str, Any] = {}, **fields: Any) -> dict[str, Any]:  # noqa: B006
    names = {"gpt": "gpt.GPT", "mamba": "mamba.Mamba", "t5": "t5.T5"}
    model = {"_target_": f"bridge.models.{names[family]}ModelConfig", "vocab_size": 64, "seq_length": 32}
    return model | fields | {"transformer": SMALL | transformer}


MODELS = {
    "dense": document("gpt"),
    "rope": document("gpt", position_embedding_type="rope"),
    "windows": document("gpt", {"window_size": [4, 0]}, position_embedding_type="rope"),
    "experts": document("gpt", EXPERTS, position_embedding_type="rope"),
    "groups": document("gpt", EXPERTS | {"moe_router_num_groups": 2, "moe_router_group_topk": 1}),
    "latent": document("gpt", LATENT, position_embedding_type="rope"),
    "hybrid": document("mamba", MAMBA, hybrid_layer_pattern="M*M-"),
    "mamba": document("mamba", MAMBA),  # sizes of attention are checked although the model has none
    "t5": document("t5", {"num_layers": 2}),
}

COUNTS = [-1, 0, 1, 2, 3, 4, 5, 6, 8]
FLAGS = [0, 1, -1, 3, [], [1], [0, 1], [0, 0, 0, 0], [1, 0, 1, 1], [1, 2, 0, 1], [1, 1, 1, 1, 1]]
SHARES = [-0.5, 0.0, 0.25, 0.5, 1.0, 1.5]
EDGES: dict[str, list[Any]] = {
    "transformer.num_layers": [-2, 0, 1, 2, 3, 4],
    "transformer.hidden_size": [-8, 0, 1, 8, 30, 32, 33],
    "transformer.num_attention_heads": COUNTS,
    "transformer.num_query_groups": COUNTS,
    "transformer.ffn_hidden_size": [-8, 0, 1, 7, 64],
    "transformer.kv_channels": [-4, 0, 1, 2, 5, 8, 15],
    "transformer.hidden_dropout": SHARES,
    "transformer.attention_dropout": SHARES,
    "transformer.init_method_std": [-0.1, 0.0, 0.02],
    "transformer.mtp_num_layers": [0, 1],
    "transformer.no_rope_freq": FLAGS,
    "transformer.window_attn_skip_freq": FLAGS,
    "transformer.moe_layer_freq": FLAGS,
    "transformer.num_moe_experts": [-1, 0, 1, 2, 4, 6],
    "transformer.moe_ffn_hidden_size": [-8, 0, 1, 16],
    "transformer.moe_shared_expert_intermediate_size": [-8, 0, 8],
    "transformer.moe_router_topk": COUNTS,
    "transformer.moe_router_num_groups": COUNTS,
    "transformer.moe_router_group_topk": COUNTS,
    "transformer.moe_router_pre_softmax": [False, True],
    "transformer.moe_router_score_function": ["softmax", "sigmoid"],
    "transformer.mamba_head_dim": [-8, 0, 3, 8, 16],
    "transformer.mamba_num_groups": [-1, 0, 1, 2, 3, 8],
    "transformer.mamba_num_heads": [-2, 0, 1, 2, 3, 8],
    "transformer.mamba_state_dim": [-8, 0, 1, 5, 8],
    "transformer.q_lora_rank": [-4, 0, 1, 8],
    "transformer.kv_lora_rank": [-4, 0, 1, 8],
    "transformer.qk_head_dim": [-4, 0, 1, 3, 8],
    "transformer.qk_pos_emb_head_dim": [-4, 0, 1, 2, 3, 8],
    "transformer.v_head_dim": [-4, 0, 1, 3, 8],
    "transformer.rotary_base": [-10.0, 0.0, 0.5, 10000.0],
    "rotary_base": [-10, 0, 1, 10000],
    "rotary_percent": SHARES,
    "seq_len_interpolation_factor": [-1.0, 0.0, 0.5, 2.0],
    "rope_scaling_factor": [-1.0, 0.0, 8.0],
    "rope_scaling": [False, True],
    "vocab_size": [-8, 0, 1, 63, 64],
    "make_vocab_size_divisible_by": [-8, 0, 1, 64],
    "should_pad_vocab": [False, True],
    "seq_length": [-1, 0, 1, 16, 32],
    "position_embedding_type": ["learned_absolute", "rope", "none", "relative"],
    "hybrid_layer_pattern": ["", "M", "MMMM", "M*M-", "M*ME", "MxM-", "M*M-/M", "****"],
    "encoder_num_layers": [-1, 0, 1],
    "encoder_num_attention_heads": [-1, 0, 2, 3, 4],
    "encoder_kv_channels": [-1, 0, 3, 4, 8],
    "encoder_ffn_hidden_size": [-8, 0, 16],
    "relative_attention_num_buckets": [-1, 0, 2, 4, 32],
    "relative_attention_max_distance": [-1, 0, 3, 16, 128],
}


def list_fields(model: dict[str, Any]) -> list[str]:
    """Return the paths in EDGES that a document of this class has."""
    verdicts = {}
    for path, values in EDGES.items():
        changed = apply_changes(model, {path: values[-1]})
        try:
            Document(changed).check()
            verdicts[path] = ""
        except DocumentError as error:
            verdicts[path] = str(error)
    return [path for path, said in verdicts.items() if "unknown key" not in said and "belongs to" not in said]


def apply_changes(model: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(model)
    for path, value in values.items():
        *parents, name = path.split(".")
        holder = changed
        for parent in parents:
            holder = holder[parent]
        holder[name] = value
    return changed


FIELDS = {name: list_fields(model) for name, model in MODELS.items()}
FIELDS["mamba"] = [path for path in FIELDS["mamba"] if path != "transformer.num_query_groups"]


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(MODELS)))
    paths = draw(st.lists(st.sampled_from(FIELDS[name]), min_size=1, max_size=2, unique=True))
    return name, {path: draw(st.sampled_from(EDGES[path])) for path in paths}


def train_without_checks(documents: list[dict[str, Any]]) -> list[str | None]:
    """Train each document's model for one step; return the error, or None."""
    warnings.simplefilter("ignore")
    groups = create_process_groups(Layout())
    for module in (arithmetic, language):
        module.check_live = lambda *_: iter(())  # type: ignore[attr-defined]
    assert hasattr(Reader, "_check_fields")  # otherwise no check would be switched off
    Reader._check_fields = lambda *_: []  # type: ignore[assignment, method-assign]
    return [_find_failure(data, groups) for data in documents]


def _find_failure(data: dict[str, Any], groups: ProcessGroupCollection) -> str | None:
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    try:
        config = ModelConfig.from_dict(data)
        builder = make_builder(config)
        stage = builder.build_model(groups)
        length = max(1, min(SAMPLE, config.seq_length))  # type: ignore[attr-defined]
        tokens = torch.arange(length + 1)[None] % config.vocab_size  # type: ignore[attr-defined]
        loss = builder.forward_step(stage, tokens, groups).mean()
        loss.backward()
        norm = sum(float(p.grad.norm()) ** 2 for p in stage.parameters() if p.grad is not None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if math.isfinite(norm + float(loss)) else f"loss {float(loss)}, gradients {norm}"


def find_problems(data: dict[str, Any]) -> str | None:
    try:
        Document(data).check()
    except DocumentError as error:
        return "; ".join(f"{problem.path}: {problem.message}" for problem in error.problems)
    return None


# Messages about values that Megatron accepts although they have no meaning, or another one than they seem to have.
MEANINGLESS = (
    # Messages of a Range only: negative epsilons, sizes of absent modules, probabilities above one.
    "must be at least",
    "must be above",
    "must be between",
    "must divide hidden_size",  # channels would be lost
    "no channels are rotated",
    "expected one entry per layer",  # too many entries
    "expected 0 (",
    "transformer.num_layers =",  # only the pattern is used
    "transformer.mtp_num_layers =",
    "has no layers",  # Megatron makes all layers Mamba layers
)
NEEDS_OTHER_LAYERS = "UnsupportedError"


@settings(max_examples=DRAWS // TOGETHER, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(changes(), min_size=TOGETHER, max_size=TOGETHER))
def test_documents_refuse_values_that_megatron_cannot_train(drawn: list[tuple[str, dict[str, Any]]]) -> None:
    documents = [apply_changes(MODELS[name], values) for name, values in drawn]
    judged = [
        (change, data, said)
        for change, data in zip(drawn, documents, strict=True)
        if (said := find_problems(data)) is None or not any(reason in said for reason in MEANINGLESS)
    ]
    [failures] = run_ranks(train_without_checks, 1, [data for _, data, _ in judged])
    for ((name, values), _, said), failed in zip(judged, failures, strict=True):
        if failed is None or not failed.startswith(NEEDS_OTHER_LAYERS):
            assert (said is None) == (failed is None), f"{name} {values}: documents say {said}, Megatron says {failed}"
