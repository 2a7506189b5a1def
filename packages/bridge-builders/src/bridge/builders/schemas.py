"""Versions of megatron-core's transformer configs in documents: their form has changed in no way yet."""

from bridge.config.schema.versions import Schema

TRANSFORMER = Schema(1)
MLA_TRANSFORMER = Schema(1)
HETEROGENEOUS_TRANSFORMER = Schema(1)
