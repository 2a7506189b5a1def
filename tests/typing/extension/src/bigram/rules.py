"""What is known not to work, checked before anything is built. Imports no torch, so that `bridge validate` is quick."""

from collections.abc import Iterator

from bridge.dist.checks.preflight import Setup, rule


@rule()
def in_one_piece(setup: Setup) -> Iterator[str]:
    """The model is a single stage, and its layers do not split a sequence."""
    if setup.layout.pp > 1:
        yield "a bigram model has no layers to divide over a pipeline: set pp = 1"
    if setup.layout.cp > 1 or setup.transformer.sequence_parallel:
        yield "a bigram model does not split sequences: set cp = 1 and sequence_parallel = False"


RULES = (in_one_piece,)
