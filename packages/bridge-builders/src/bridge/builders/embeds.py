"""EmbedsTransformer, which declares the fields of an embedded TransformerConfig for type checkers."""

# Written by .github/scripts/make_embeds.py
# ruff: noqa: N815

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge.config import WriteThrough

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

    import torch
    from megatron.core.quantization.quant_config import RecipeConfig
    from megatron.core.transformer.enums import AttnBackend, CudaGraphModule, CudaGraphScope, InferenceCudaGraphScope
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout


class EmbedsTransformer(WriteThrough):
    """Mixin for a dataclass with a required field `transformer: TransformerConfig`, whose fields it exposes.

    At run time this is `WriteThrough`. For type checkers it also declares the fields of megatron-core's
    `TransformerConfig`, so that `config.num_layers` is an int and `config.num_layer` is an error. The constructor takes
    only the fields of the dataclass. Fields that a subclass of `TransformerConfig` adds are typed only on
    `config.transformer`.
    """

    if TYPE_CHECKING:
        tensor_model_parallel_size: int
        tensor_parallel_num_weight_shards: int | None
        gtp_weight_remat_size: int
        pipeline_model_parallel_comm_backend: Literal["nccl", "ucc"] | None
        pipeline_model_parallel_size: int
        virtual_pipeline_model_parallel_size: int | None
        sequence_parallel: bool
        context_parallel_size: int
        hierarchical_context_parallel_sizes: list[int] | None
        max_seqlen_per_dp_cp_rank: int | None
        hybrid_context_parallel: bool
        expert_model_parallel_size: int
        expert_tensor_parallel_size: int | None
        expert_tensor_parallel_num_weight_shards: int | None
        expert_gtp_weight_remat_size: int
        perform_initialization: bool
        use_cpu_initialization: bool
        fp16: bool
        bf16: bool
        params_dtype: torch.dtype
        timers: Callable[..., Any] | None
        finalize_model_grads_func: Callable[..., Any] | None
        grad_scale_func: Callable[..., Any] | None
        moe_grad_scale_func: Callable[..., Any] | None
        mtp_grad_scale_func: Callable[..., Any] | None
        no_sync_func: Callable[..., Any] | None
        grad_sync_func: Callable[..., Any] | None
        param_sync_func: Callable[..., Any] | None
        deterministic_mode: bool
        enable_autocast: bool
        autocast_dtype: torch.dtype | None
        num_microbatches_with_partial_activation_checkpoints: int | None
        gradient_accumulation_fusion: bool
        use_te_rng_tracker: bool
        tp_comm_overlap: bool
        tp_comm_bulk_wgrad: bool
        tp_comm_bulk_dgrad: bool
        tp_comm_overlap_ag: bool
        tp_comm_overlap_rs: bool
        tp_comm_overlap_rs_dgrad: bool
        tp_comm_split_ag: bool
        tp_comm_atomic_ag: bool
        tp_comm_split_rs: bool
        tp_comm_atomic_rs: bool
        cross_entropy_loss_fusion: bool
        cross_entropy_fusion_impl: Literal["native", "te"]
        tp_comm_overlap_disable_qkv: bool
        tp_comm_overlap_disable_fc1: bool
        tp_comm_bootstrap_backend: Literal["nccl", "mpi", "gloo"]
        overlap_moe_expert_parallel_comm: bool
        delay_wgrad_compute: bool
        overlap_dispatch_backward_with_experts_wgrad: bool
        ep_overlap_early_attn_memory_release: bool
        pipeline_dtype: torch.dtype
        variable_seq_lengths: bool
        overlap_p2p_comm: bool
        batch_p2p_comm: bool
        batch_p2p_sync: bool
        use_ring_exchange_p2p: bool
        deallocate_pipeline_outputs: bool
        defer_embedding_wgrad_compute: bool
        wgrad_deferral_limit: int
        overlap_p2p_comm_warmup_flush: bool
        microbatch_group_size_per_vp_stage: int | None
        mtp_standalone: bool
        cpu_offloading: bool
        cpu_offloading_num_layers: int
        cpu_offloading_activations: bool
        cpu_offloading_weights: bool
        cpu_offloading_double_buffering: bool
        cpu_offloading_retain_pinned_cpu_buffers: bool
        barrier_with_L1_time: bool
        num_layers: int
        mtp_num_layers: int | None
        mtp_loss_scaling_factor: float | None
        mtp_use_repeated_layer: bool
        mtp_detach_heads: bool
        mtp_hybrid_override_pattern: str | None
        num_layers_in_first_pipeline_stage: int | None
        num_layers_in_last_pipeline_stage: int | None
        pipeline_model_parallel_layout: str | list[Any] | PipelineParallelLayerLayout | None
        account_for_embedding_in_pipeline_split: bool
        account_for_loss_in_pipeline_split: bool
        hidden_size: int
        num_attention_heads: int
        attention_backend: AttnBackend
        flash_attention_version: Literal[2, 3, 4] | None
        softmax_scale: float | None
        softmax_type: Literal["vanilla", "off-by-one", "learnable"]
        num_query_groups: int | None
        ffn_hidden_size: int | None
        kv_channels: int | None
        hidden_dropout: float
        attention_dropout: float
        fp32_residual_connection: bool
        apply_residual_connection_post_layernorm: bool
        layernorm_epsilon: float
        layernorm_zero_centered_gamma: bool
        add_bias_linear: bool
        add_qkv_bias: bool
        gated_linear_unit: bool
        activation_func: Callable[[torch.Tensor], torch.Tensor]
        activation_func_fp8_input_store: bool
        glu_linear_offset: float
        activation_func_clamp_value: float | None
        num_moe_experts: int | None
        rotary_interleaved: bool
        window_size: tuple[int, int] | None
        window_attn_skip_freq: int | list[int] | None
        normalization: Literal["LayerNorm", "RMSNorm"]
        qk_layernorm: bool
        qk_l2_norm: bool
        qk_clip: bool
        qk_clip_alpha: float
        qk_clip_threshold: float
        log_max_attention_logit: bool
        attention_output_gate: bool
        test_mode: bool
        calculate_per_token_loss: bool
        multi_latent_attention: bool
        no_rope_freq: int | list[int] | None
        experimental_attention_variant: Literal["gated_delta_net", "dsa"] | None
        experimental_attention_variant_loss_scale_func: Callable[[torch.Tensor], None] | None
        dsa_indexer_n_heads: int | None
        dsa_indexer_head_dim: int | None
        dsa_indexer_topk: int | None
        dsa_indexer_topk_freq: int
        dsa_indexer_skip_topk_offset: int
        dsa_indexer_loss_coeff: float | None
        dsa_indexer_use_sparse_loss: bool
        dsa_kernel_backend: Literal["none", "tilelang", "cudnn"]
        dsa_indexer_rope_interleaved: bool
        dsa_indexer_rotate_activation: bool
        dsa_indexer_scoring_relu: bool
        dsa_indexer_k_norm_epsilon: float | None
        dsa_indexer_k_norm_fp32: bool
        linear_attention_freq: int | list[int] | None
        linear_conv_kernel_dim: int | None
        linear_key_head_dim: int | None
        linear_value_head_dim: int | None
        linear_num_key_heads: int | None
        linear_num_value_heads: int | None
        init_method: Callable[..., Any] | None
        output_layer_init_method: Callable[..., Any] | None
        init_method_std: float
        embedding_init_method: Callable[..., Any] | None
        embedding_init_method_std: float | None
        init_model_with_meta_device: bool
        use_mup: bool
        mup_width_mult: float
        mup_base_hidden_size: int | None
        mup_embedding_mult: float
        mup_output_mult: float
        mup_base_head_dim: float | None
        mup_attn_scale_power: float
        apply_query_key_layer_scaling: bool
        attention_softmax_in_fp32: bool
        disable_bf16_reduced_precision_matmul: bool
        bias_activation_fusion: bool
        masked_softmax_fusion: bool
        persist_layer_norm: bool
        memory_efficient_layer_norm: bool
        bias_dropout_fusion: bool
        apply_rope_fusion: bool
        use_fused_weighted_squared_relu: bool
        fused_single_qkv_rope: bool
        fused_residual_rmsnorm: bool
        use_transformer_engine_op_fuser: bool
        recompute_granularity: Literal["full", "selective"] | None
        recompute_method: Literal["uniform", "block"] | None
        recompute_num_layers: int | None
        distribute_saved_activations: bool | None
        recompute_modules: list[str] | None
        fp8: Literal["e4m3", "hybrid"] | None
        fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise", "custom"] | None
        fp8_param: bool
        fp8_quantizer_factory: str | None
        fp8_margin: int
        fp8_interval: int
        fp8_amax_history_len: int
        fp8_amax_compute_algo: Literal["most_recent", "max"]
        fp8_wgrad: bool
        fp8_output_proj: bool
        fp8_dot_product_attention: bool
        fp8_multi_head_attention: bool
        tp_only_amax_red: bool
        first_last_layers_bf16: bool
        num_layers_at_start_in_bf16: int
        num_layers_at_end_in_bf16: int
        use_kitchen: bool
        use_kitchen_attention: bool
        kitchen_attention_backend: Literal["sdpa", "fa"]
        fp4: Literal["e2m1"] | None
        fp4_recipe: Literal["nvfp4", "custom"] | None
        fp4_param: bool
        fp4_quantizer_factory: str | None
        high_priority_a2a_comm_stream: bool
        moe_shared_expert_intermediate_size: int | None
        moe_shared_expert_gate: bool
        moe_shared_expert_overlap: bool
        use_grouped_gemm_for_shared_expert: bool
        moe_shared_expert_glu_interleave_size: int | None
        moe_layer_freq: int | list[int]
        moe_ffn_hidden_size: int | None
        moe_router_load_balancing_type: str | list[str]
        moe_router_topk: int
        moe_enable_routing_replay: bool
        moe_router_topk_limited_devices: int | None
        moe_router_padding_for_quantization: bool | None
        moe_router_padding_for_fp8: bool | None
        moe_router_num_groups: int | None
        moe_router_group_topk: int | None
        moe_router_pre_softmax: bool
        moe_router_topk_scaling_factor: float | None
        moe_router_score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"]
        moe_router_dtype: Literal["fp32", "fp64"] | None
        moe_router_enable_expert_bias: bool
        moe_router_bias_update_rate: float
        moe_router_quantile_balancing_ema: float
        moe_router_force_load_balancing: bool
        moe_router_force_biased: float | None
        use_grouped_gemm_for_dense_mlp: bool
        moe_grouped_gemm: bool
        moe_single_grouped_weight: bool
        moe_single_grouped_bias: bool
        moe_aux_loss_coeff: float | list[float]
        moe_z_loss_coeff: float | None
        moe_input_jitter_eps: float | None
        moe_token_dropping: bool
        moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"]
        moe_enable_deepep: bool
        moe_flex_dispatcher_backend: Literal["deepep", "hybridep", "ncclep"]
        moe_permute_fusion_into_hybridep: bool
        moe_hybridep_pad_uneven_dispatch_inputs: bool
        moe_per_layer_logging: bool
        moe_expert_capacity_factor: float | None
        moe_pad_expert_input_to_capacity: bool
        moe_pad_experts_for_cuda_graph_inference: bool
        moe_token_drop_policy: Literal["probs", "position"]
        moe_layer_recompute: bool
        moe_permute_fusion: bool
        moe_router_fusion: bool
        moe_apply_probs_on_input: bool
        moe_latent_size: int | None
        moe_flex_dispatcher_num_sms: int | None
        moe_deepep_num_sms: int | None
        moe_hybridep_num_sms: int | None
        moe_hybridep_num_blocks_permute: int | None
        moe_hybridep_num_blocks_unpermute: int | None
        moe_hybridep_num_sms_preprocessing: int
        moe_ncclep_static_shape: bool
        moe_ncclep_zero_copy: bool
        moe_mlp_glu_interleave_size: int | None
        moe_expert_rank_capacity_factor: float | None
        cp_comm_type: str | list[str] | None
        enable_cuda_graph: bool
        cuda_graph_use_single_mempool: bool
        cuda_graph_retain_backward_graph: bool
        cuda_graph_warmup_steps: int
        external_cuda_graph: bool
        cuda_graph_impl: Literal["none", "local", "transformer_engine", "full_iteration"]
        cuda_graph_modules: str | CudaGraphModule | list[str] | list[CudaGraphModule]
        inference_cuda_graph_scope: InferenceCudaGraphScope | None
        cuda_graph_scope: str | CudaGraphModule | CudaGraphScope | list[str | CudaGraphModule | CudaGraphScope] | None
        clone_scatter_output_in_embedding: bool
        disable_parameter_transpose_cache: bool
        config_logger_dir: str
        flash_decode: bool
        batch_invariant_mode: bool
        use_te_activation_func: bool
        inference_rng_tracker: bool
        inference_sampling_seed: int
        symmetric_ar_type: Literal["two_shot", "one_shot", "multimem_all_reduce"] | None
        nccl_all_reduce_for_prefill: bool
        use_inference_optimized_layers: bool
        inference_fuse_tp_communication: bool
        inference_disable_triton_nvls_kernels: bool
        inference_grouped_gemm_backend: Literal["flashinfer", "torch", "vllm"]
        inference_moe_disable_fused_quant_kernels: bool
        inference_moe_token_dispatcher_type: Literal["nccl", "nvls"]
        mrope_section: list[int] | None
        is_hybrid_model: bool
        mamba_state_dim: int
        mamba_head_dim: int
        mamba_num_groups: int
        mamba_num_heads: int | None
        mamba_training_ssm_states_dtype: torch.dtype | None
        use_mamba_mem_eff_path: bool
        mlp_chunks_for_prefill: int
        mlp_chunks_for_training: int
        heterogeneous_block_specs: bool
        hetereogenous_dist_checkpoint: bool
        quant_recipe: RecipeConfig | None
        transformer_impl: Literal["local", "transformer_engine", "inference_optimized"]
        fine_grained_activation_offloading: bool
        offload_modules: list[str] | None
        min_offloaded_tensor_size: int
        delay_offload_until_cuda_graph: bool
        delta_offload_bytes_across_pp_ranks: int
        activation_offload_fraction: float
        moe_paged_stash: bool
        moe_paged_stash_page_size: int
        moe_paged_stash_buffer_size_factor_cuda: float
        moe_paged_stash_buffer_size_factor_cpu: float
        fine_grained_offloading_max_inflight_offloads: int | None
