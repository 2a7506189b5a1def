"""The choice of layers: Transformer Engine's where it can be used, elsewhere the layers in PyTorch of this package.

These replace what megatron-core's local layers lack: norms under sequence parallelism, attention under context
parallelism and with heads of unequal width (multi-latent attention), grouped experts, and Mamba's mixer. They consist
of torch operations and Megatron's collectives, so they run wherever torch does. The package imports
bridge.models.errors and the packages below.
"""
