"""What documents may say: descriptions of classes, live and shipped, the names they use, and the values fields take.

It imports only the errors, paths and problems of `bridge.config`, and neither torch nor megatron-core.
"""
