"""Layers in PyTorch have the checkpoint keys of layers of Transformer Engine.

A separate process computes the expected keys: it runs this file as a program, with a stand-in for Transformer Engine,
and collects the keys from megatron-core's own layer specs and ``sharded_state_dict``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Key = tuple[str, tuple[int, ...]]

_MOE = {
    "num_moe_experts": 4,
    "moe_grouped_gemm": True,
    "add_bias_linear": False,
    "moe_token_dispatcher_type": "alltoall",
}
_LATENT = {
    "multi_latent_attention": True,
    "add_bias_linear": False,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "rope_type": "rope",
}
_BLOCKS = [
    {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 48}},
    {
        "attention": {"no_op": True, "num_query_groups": None},
        "mlp": {"replace_with_linear": True, "ffn_hidden_size": None},
    },
    {
        "attention": {"replace_with_linear": True, "num_query_groups": None},
        "mlp": {"no_op": True, "ffn_hidden_size": None},
    },
    {"attention": {"num_query_groups": 4}, "mlp": {"ffn_hidden_size": 64}},
]

GPT: dict[str, dict[str, Any]] = {
    "dense": {},
    "layer norms": {"normalization": "LayerNorm"},
    "queries and keys normalised": {"qk_layernorm": True},
    "queries and keys of length 1": {"qk_l2_norm": True},
    "attention sinks": {"softmax_type": "learnable"},
    "two matrices in the first": {"gated_linear_unit": True},
    "experts": _MOE,
    "experts with biases": _MOE | {"add_bias_linear": True},
    "experts one by one": _MOE | {"moe_grouped_gemm": False, "gated_linear_unit": True},
    "experts in one layer of two": _MOE | {"moe_layer_freq": [0, 1], "gated_linear_unit": True},
    "shared experts": _MOE | {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_gate": True},
    "routing without a loss": _MOE | {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
    "latent": _LATENT,
    "latent and normalised": _LATENT | {"qk_layernorm": True},
    "latent without compressed queries": _LATENT | {"q_lora_rank": None},
    "latent, with experts": _LATENT | _MOE | {"qk_layernorm": True, "moe_layer_freq": [0, 1]},
    "more tokens predicted": {"mtp_num_layers": 1},
    "more tokens predicted, latent, with experts": _LATENT
    | _MOE
    | {"qk_layernorm": True, "moe_layer_freq": [0, 1], "mtp_num_layers": 1},
    "each layer another": {
        "num_layers": 4,
        "heterogeneous_layers_config_encoded_json": json.dumps({"block_configs": _BLOCKS}),
    },
}
MODELS = [*GPT, "hybrid", "hybrid, normalised", "T5", "T5 with relative positions"]


def build(name: str) -> Any:
    """Build a small model in a world of one."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from bridge.models.gpt import GPTModelBuilder, GPTModelConfig
    from bridge.models.mamba import MambaModelBuilder, MambaModelConfig
    from bridge.models.t5 import T5ModelBuilder, T5ModelConfig

    small: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "normalization": "RMSNorm"}
    around: dict[str, Any] = {"vocab_size": 96, "seq_length": 16}
    builder: Any
    if name in GPT:
        given = small | GPT[name]
        cls = MLATransformerConfig if "multi_latent_attention" in given else TransformerConfig
        cls = HeterogeneousTransformerConfig if "heterogeneous_layers_config_encoded_json" in given else cls
        builder = GPTModelBuilder(GPTModelConfig(transformer=cls(**given), position_embedding_type="rope", **around))
    elif name.startswith("hybrid"):
        given = small | _MOE | {"num_layers": 4, "mamba_head_dim": 8, "mamba_num_groups": 2}
        transformer = TransformerConfig(**given, qk_layernorm="normalised" in name, is_hybrid_model=True)
        builder = MambaModelBuilder(MambaModelConfig(transformer=transformer, hybrid_layer_pattern="M*-E", **around))
    else:
        positions: Any = "relative" if "relative" in name else "learned_absolute"
        transformer = TransformerConfig(**small | {"add_bias_linear": positions != "relative"})
        builder = T5ModelBuilder(T5ModelConfig(transformer=transformer, position_embedding_type=positions, **around))
    return builder.build_model(ProcessGroupCollection.use_mpu_process_groups())


def checkpoint_keys(model: Any) -> list[Key]:
    """Return the key and the global shape of everything that a model writes into a sharded checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor | ShardedObject)]
    return sorted({(part.key, tuple(part.global_shape)) for part in parts})


def list_splits(model: Any) -> dict[str, Any]:
    """Return how experts are split: dimension and stride. Other layers of Transformer Engine mark theirs themselves."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from bridge.dist.engine.placement import named_parameters
    from bridge.dist.engine.tensor_parallel_attributes import mark_split_parameters
    from bridge.models.huggingface.transfer.names import canonicalize_name

    mark_split_parameters(model)
    named = named_parameters(model, ProcessGroupCollection.use_mpu_process_groups())
    return {
        canonicalize_name(place.full_name): [place.dim, place.stride]
        for place, parameter, _ in named
        if ".experts." in place.full_name and getattr(parameter, "tensor_model_parallel", False)
    }


@contextmanager
def world_of_one() -> Iterator[None]:
    """Create the process groups and random states of one rank on the CPU."""
    from bridge.dist.cpu import cpu_runtime

    with cpu_runtime():
        import torch
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from torch._C._distributed_c10d import HashStore

        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[list[Key], dict[str, Any]]]:
    """Return the keys and splits of every model, from megatron-core with layers of Transformer Engine."""
    tests = Path(__file__).parents[3] / "tests"
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"PYTHONPATH": str(tests)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: ([(key, tuple(shape)) for key, shape in keys], splits) for name, (keys, splits) in found.items()}


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with world_of_one():
        yield


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_keys_match_transformer_engine(name: str, expected: dict[str, tuple[list[Key], Any]]) -> None:
    assert checkpoint_keys(build(name)) == expected[name][0]


@pytest.mark.parametrize("name", [name for name in MODELS if "expert" in name])
def test_experts_are_split_as_those_of_transformer_engine(
    name: str, expected: dict[str, tuple[list[Key], dict[str, Any]]]
) -> None:
    """How many rows of what a rank reads from a folder, draws and writes depends on it."""
    assert list_splits(build(name)) == expected[name][1]


@pytest.mark.parametrize("name", ["experts", "latent and normalised", "hybrid"])
def test_a_checkpoint_is_loaded_again(name: str, tmp_path: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing

    written, read = build(name), build(name)
    with torch.no_grad():
        for parameter in read.parameters():
            parameter.zero_()
    dist_checkpointing.save(written.sharded_state_dict(), str(tmp_path))
    read.load_state_dict(dist_checkpointing.load(read.sharded_state_dict(), str(tmp_path)))
    torch.testing.assert_close(dict(read.named_parameters()), dict(written.named_parameters()), rtol=0, atol=0)


def main() -> None:
    """Print the keys of all models, with a stand-in for Transformer Engine."""
    import transformer_engine_stand_in

    from bridge.dist.process import gpu_libraries

    vars(gpu_libraries)["_NAMES"] = ()  # otherwise the CPU runtime hides the stand-in
    transformer_engine_stand_in.install()
    with world_of_one():
        models = {name: build(name) for name in MODELS}
        bridge_layers = {
            type(module).__name__
            for model in models.values()
            for module in model.modules()
            if type(module).__module__.startswith("bridge.models.backend.")
            and type(module).__module__ != "bridge.models.backend.mixer"  # Transformer Engine has no mixer
        }
        assert not bridge_layers, f"the expected keys would come from layers of Bridge: {bridge_layers}"
        found = {name: (checkpoint_keys(model), list_splits(model)) for name, model in models.items()}
        sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
