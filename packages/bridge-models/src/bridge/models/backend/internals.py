"""Private names of torch and megatron-core that bridge-models relies on."""

PRIVATE_NAMES = {
    "torch.distributed.checkpoint.filesystem._StorageInfo": "huggingface.checkpoint.writer: where a tensor is stored",
}
"""Purpose of each private name of torch 2.6 to 2.15. A test reports names that no longer exist."""

MEGATRON_NAMES = {
    "megatron.core.extensions.transformer_engine.HAVE_TE": "choice: whether Transformer Engine is installed",
    "megatron.core.models.hybrid.hybrid_block.TENorm": "mamba.layers: replaces the final norm of a hybrid",
    "megatron.core.ssm.mamba_mixer.ExtendedRMSNorm": "mixer: replaces the norm of a mixer",
    "megatron.core.ssm.mamba_mixer.HAVE_MAMBA_SSM": "mixer: replaced where the kernels are missing",
    "megatron.core.ssm.mamba_mixer.causal_conv1d_fn": "mixer: whether the kernels are installed",
    "megatron.core.transformer.multi_latent_attention.MLASelfAttention._qkv_down_projection": "latent: overridden",
    "megatron.core.transformer.multi_latent_attention.MLASelfAttention._resolve_qk_norm_config": "latent: overridden",
}
"""Purpose of each name in megatron-core 0.19.2. Without the name, an override of it would silently never be called."""
