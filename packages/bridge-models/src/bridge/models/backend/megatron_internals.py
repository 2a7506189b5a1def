"""Non-public names of megatron-core that bridge-models relies on."""

MEGATRON_NAMES = {
    "megatron.core.extensions.transformer_engine.HAVE_TE": "choice: whether Transformer Engine is installed",
    "megatron.core.models.hybrid.hybrid_block.TENorm": "mamba.layers: replaces the final norm of a hybrid",
    "megatron.core.ssm.mamba_mixer.ExtendedRMSNorm": "mixer: replaces the norm of a mixer",
    "megatron.core.ssm.mamba_mixer.HAVE_MAMBA_SSM": "mixer: replaced where the kernels are missing",
    "megatron.core.ssm.mamba_mixer.causal_conv1d_fn": "mixer: whether the kernels are installed",
    "megatron.core.transformer.multi_latent_attention.MLASelfAttention._qkv_down_projection": "latent: overridden",
    "megatron.core.transformer.multi_latent_attention.MLASelfAttention._resolve_qk_norm_config": "latent: overridden",
}
"""Name -> use, as of megatron-core 0.19.2. If a name disappears, an override of it is silently never called."""
