"""What documents may say: which values a field takes, and which values go together.

It imports nothing of `bridge.config` but the descriptions of classes, and neither torch nor megatron-core.
"""
