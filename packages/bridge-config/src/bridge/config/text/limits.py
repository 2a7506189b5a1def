"""The bounds of a text: readers give up beyond them, and writers write nothing that is."""

from __future__ import annotations

MAX_BYTES = 10 * 2**20
MAX_DEPTH = 100
MAX_VALUES = 100_000
MAX_KEY = 1024  # characters; YAML's own limit for a key that is not announced by a question mark
MAX_DIGITS = 4300  # as Python's own limit: reading and writing numbers takes the square of their length
