"""Process setup: quiet imports of megatron-core, hiding of GPU libraries, deduplicated log messages.

Imports nothing else of this package, and torch only inside functions.
"""
