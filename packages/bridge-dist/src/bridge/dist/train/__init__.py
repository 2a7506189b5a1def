"""Short training runs: the text and its batches, the optimizer, steps with Megatron's schedule, FLOPs of a step.

May import the checks, the engine, the CPU runtime, and the modules beside the subpackages.
"""
