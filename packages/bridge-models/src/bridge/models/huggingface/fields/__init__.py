"""Rows that architectures share: each maps some fields of config.json to fields of a document, and back.

Nothing here depends on an architecture. It imports ``targets`` and ``translation`` of the parent package, and
bridge.config.
"""
