"""Schema versions of megatron-core's transformer configurations. All are 1: no field has been moved or removed yet."""

from bridge.config.schema.versions import Schema

TRANSFORMER = Schema(1)
MLA_TRANSFORMER = Schema(1)
HETEROGENEOUS_TRANSFORMER = Schema(1)
