"""The tables of architectures agree with the config classes of transformers and megatron-core."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
from huggingface_meaning import Config, write_with_transformers_5
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bridge.config.schema.table import get_shipped
from bridge.models.common.yarn import YarnTransformerConfig
from bridge.models.huggingface import from_hf, to_hf
from bridge.models.huggingface.document_fields import AFFECTS_COMPUTATION
from bridge.models.huggingface.families import ARCHITECTURES


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_defaults_match_transformers(model_type: str) -> None:
    cls = CONFIG_MAPPING[model_type]
    transformers_defaults = {field.name: field.default for field in dataclasses.fields(cls)} | {
        "rope_theta": cls.default_theta
    }
    bridge_fields = ARCHITECTURES[model_type].names
    unset = {"bos_token_id", "eos_token_id", "pad_token_id", "time_step_limit"}  # left out of documents, too
    differing = {
        name: (known.default, transformers_defaults[name])
        for name, known in bridge_fields.items()
        if name in transformers_defaults and name not in unset and known.default != transformers_defaults[name]
    }
    assert not differing


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_field_of_transformers_is_known(model_type: str) -> None:
    document = from_hf(write_with_transformers_5({"model_type": model_type} | SMALLEST.get(model_type, {}))).data
    assert to_hf(document).data["model_type"] == model_type


SMALLEST: dict[str, Config] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "deepseek_v3": {"num_mtp_layers": 0},
}


def test_every_field_that_affects_computation_is_handled() -> None:
    """Each field of a transformer is mapped, refused, or listed here as not affecting the model."""
    runtime_only = re.compile(
        "|".join(
            (
                "(tensor|pipeline|virtual_pipeline|context|expert|expert_tensor|sequence)_.*(parallel|weight).*",
                "(cpu_offloading|tp_comm|cuda_graph|fp8|fp4|recompute|inference|overlap|cross_entropy|offload)_.*",
                "(moe_hybridep|moe_ncclep|moe_deepep|moe_paged_stash|moe_flex|gtp|expert_gtp|delta_offload)_.*",
                "(batch_p2p|kitchen|wgrad|persist|memory_efficient|masked_softmax|distribute|deallocate)_.*",
                "(use_kitchen|use_te|use_grouped_gemm|use_fused|use_ring|use_transformer_engine|symmetric|nccl).*",
                "(dsa|linear|mup|mamba|yarn|cuda)_.*|.*_cuda_graph(_.*)?|fp8|fp4|hybrid_context.*|hierarchical.*",
                ".*(_fusion|_func|_init_method(_std)?|_comm_type|_dtype|_backend|_rng_tracker|_logging|_layer_norm)",
                "init_method(_std)?|.*initializ.*|init_model_with_meta_device|(fp|bf)16|enable_autocast|.*in_bf16",
                "timers|.*_pipeline_(stage|split|layout)|pipeline_.*|variable_seq_lengths|num_microbatches.*",
                "defer.*|delay.*|ep_overlap.*|microbatch.*|mtp_(standalone|detach_heads|loss.*|hybrid_.*)",
                "barrier.*|deterministic_mode|flash.*|fp32_residual_connection|.*_dropout|.*_in_fp32",
                "qk_clip.*|log_max.*|test_mode|calculate_per_token_loss|apply_query_key_layer_scaling",
                "disable.*|first_last.*|high_priority.*|tp_only.*|activation_offload_fraction|min_offloaded.*",
                "fine_grained.*|config_logger_dir|batch_invariant_mode|clone_scatter.*|fused_(single|residual).*",
                "external_.*|mlp_chunks.*|hetereogenous_.*|quant_recipe|transformer_impl|is_hybrid_model",
                "max_seqlen.*|_cpu_offloading_context|.*glu_interleave_size|use_(cpu|mamba|inference).*|cp_comm.*",
                "moe_(aux_loss_coeff|z_loss_coeff|input_jitter_eps|token_d.*|enable_deepep|permute.*|pad_.*|per_.*)",
                "moe_(layer_recompute|router_(fusion|padding.*|bias_update.*|load.*|dtype|quantile.*)|single.*)",
                "moe_(enable_routing_replay|grouped_gemm|shared_expert_overlap|ffn_hidden_size|router_topk)",
                "mtp_num.*|num_(layers|attention_heads|query_groups)|(hidden|ffn_hidden)_size|kv_channels",
                "layernorm_epsilon|window_attn_skip_freq|window_size|recompute.*|cache_mla.*|mla_down.*",
                "(q|kv)_lora_rank|qk_.*head_dim|v_head_dim|rope_type|rotary_.*|original_max.*|beta.*|mscale.*",
                "attention_backend|activation_func_fp8_input_store|cpu_offloading|moe_paged_stash",
            )
        )
    )
    names = {field.name for cls in (TransformerConfig, MLATransformerConfig) for field in dataclasses.fields(cls)}
    shaping = {path.removeprefix("transformer.") for path in AFFECTS_COMPUTATION}
    assert not {name for name in names - shaping if not runtime_only.fullmatch(name)}
    tables = [get_shipped(one.target) for one in ARCHITECTURES.values()]
    top = {name for table in tables if table for name in table.fields}
    assert shaping <= names | top


def test_yarn_config_declares_the_fields_that_megatron_only_reads() -> None:
    read = set(re.findall(r'"(yarn_\w+)"', inspect.getsource(gpt_model)))
    bridge_fields = {field.name for field in dataclasses.fields(YarnTransformerConfig)}
    megatron_fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert read
    assert read == bridge_fields - megatron_fields, "megatron-core declares them now: remove YarnTransformerConfig"
