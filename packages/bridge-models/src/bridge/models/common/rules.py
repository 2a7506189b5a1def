"""The pre-flight rules of all language models. Importing them imports no torch.

A family's own are in its `rules`; its tuple is declared for its builder in the entry-point group ``bridge.rules``.
"""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import Rule, Setup, rule
from bridge.models.common.vocab import vocabulary_problem

VALIDATED = "the configuration's own validate refuses it too"
"""Why a rule is not shown by building what it refuses."""


@rule(not_shown=VALIDATED)
def vocabulary_divides(setup: Setup) -> Iterator[str]:
    """Each tensor-parallel rank holds an equal part of the embedding."""
    if (problem := vocabulary_problem(setup.model, setup.layout.tp)) is not None:
        yield problem


LANGUAGE_RULES: tuple[Rule, ...] = (vocabulary_divides,)
