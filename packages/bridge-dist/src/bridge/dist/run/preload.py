"""Imported once, by the fork server: what ranks on the CPU need, so that each is there at once."""

from bridge.dist.imports import import_megatron

import_megatron(with_compiler=False)

from bridge.dist import job as job  # noqa: E402 - after megatron-core, without torch's compiler
