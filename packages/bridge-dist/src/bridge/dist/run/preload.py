"""The imports of ranks on the CPU. The fork server imports this module once, so that ranks start without importing."""

from bridge.dist.process.imports import import_megatron

import_megatron(with_compiler=False)

from bridge.dist.run import rank as rank  # noqa: E402 - after megatron-core, without torch's compiler
