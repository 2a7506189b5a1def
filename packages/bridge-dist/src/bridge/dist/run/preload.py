"""Imported once, by the fork server: what ranks on the CPU need, so that each is there at once."""

from bridge.dist.process.imports import import_megatron

import_megatron(with_compiler=False)

from bridge.dist.run import rank as rank  # noqa: E402 - after megatron-core, without torch's compiler
