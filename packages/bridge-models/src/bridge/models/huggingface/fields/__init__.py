"""Kinds of rows that architectures share: what some fields of config.json are in a document, for both directions.

Nothing here knows an architecture. Imports ``targets`` and ``translation`` beside this folder, and bridge.config.
"""
