"""Which layers models are built from: Transformer Engine's where it can be used, and layers in PyTorch elsewhere.

The layers take the places that megatron-core's backend spec provider names: norms under sequence parallelism, attention
under context parallelism and with heads of unequal width (multi-latent attention), grouped experts; and Mamba's mixer.
All of it is torch operations and Megatron's collectives, so it runs wherever torch does. It imports
bridge.models.errors and the packages below.
"""
