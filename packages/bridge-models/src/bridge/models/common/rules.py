"""Pre-flight rules of all language models. Importing this module does not import torch.

The rules of one family are in its `rules` module. The entry-point group ``bridge.rules`` maps a builder to its rules.
"""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import Rule, Setup, rule
from bridge.models.common.vocab import find_vocabulary_problem

VALIDATED = "validate() of the configuration refuses it too"
"""Reason that the common test does not reproduce a failure, for ``no_reproduction``."""


@rule(no_reproduction=VALIDATED)
def vocabulary_divides(setup: Setup) -> Iterator[str]:
    """Each tensor-parallel rank holds an equal part of the embedding."""
    if (problem := find_vocabulary_problem(setup.model, setup.layout.tp)) is not None:
        yield problem


LANGUAGE_RULES: tuple[Rule, ...] = (vocabulary_divides,)
