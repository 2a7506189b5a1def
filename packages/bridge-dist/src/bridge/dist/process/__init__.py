"""What a process of ours imports and logs: megatron-core without noise, libraries of GPU kernels, messages told once.

Imports nothing else of this package, and no torch until it is asked to.
"""
