"""Code that model families share: base configuration, vocabulary, pipeline stages, process groups, pre-flight rules.

It imports bridge.models.errors and the packages below. `base` has the names of Megatron Bridge's module at the same
path and imports nothing else from bridge.models.
"""
