"""Rows that architectures share: each maps some fields of config.json to fields of a document, and back.

Nothing here depends on an architecture. Imports ``targets`` and ``translation`` beside this folder, and bridge.config.
"""
