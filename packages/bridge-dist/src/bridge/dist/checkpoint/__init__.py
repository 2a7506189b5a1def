"""Checkpoints of live stages in Megatron's format torch_dist: saved atomically, and loaded under any layout.

Imports `bridge.dist.engine` and what is below it, torch and megatron-core.
"""
