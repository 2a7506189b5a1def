"""Convert between folders of transformers and Megatron checkpoints, tensor by tensor and without a model in memory.

Imports everything of this package below it, bridge.dist, torch and megatron-core.
"""
