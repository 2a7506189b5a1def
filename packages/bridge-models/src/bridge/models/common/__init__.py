"""What the families share: the fields of a language model, its vocabulary, its place in a pipeline, rules, groups.

It imports bridge.models.errors and the packages below. `base`, the reference API's public path, imports nothing of it.
"""
