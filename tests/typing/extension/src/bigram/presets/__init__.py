"""Presets: documents that have a name."""
