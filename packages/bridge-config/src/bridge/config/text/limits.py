"""Limits of a document. Readers stop at them, and writers refuse data beyond them."""

from __future__ import annotations

MAX_BYTES = 10 * 2**20
MAX_DEPTH = 100
MAX_VALUES = 100_000
MAX_KEY = 1024  # characters; the limit of YAML for keys without a question mark
MAX_DIGITS = 4300  # the limit of Python, where converting integers takes quadratic time
