"""Checkpoints of live stages in Megatron's distributed format (torch_dist).

Imports `bridge.dist.engine` and what is below it, torch and megatron-core.
"""
