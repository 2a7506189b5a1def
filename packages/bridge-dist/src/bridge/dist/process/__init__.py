"""Process setup: quiet imports of megatron-core, hidden GPU libraries, log messages, signals, the end of the parent.

Imports nothing else of this package, and torch only inside functions.
"""
