"""The pre-flight rules of a GPT. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridge.dist.checks.preflight import MEGATRON, Rule, Setup, rule
from bridge.models.common.rules import LANGUAGE_RULES, VALIDATED
from bridge.models.modelopt.rules import MODELOPT_RULES


@rule(observed_in=MEGATRON, no_reproduction=VALIDATED)
def predictions_in_a_pipeline(setup: Setup) -> Iterator[str]:
    """The last stage has its own copy of the position embedding, and the two copies are not kept in sync."""
    if (problem := find_prediction_problem(setup.model, setup.layout.pp)) is not None:
        yield problem


def find_prediction_problem(model: Any, pp: int) -> str | None:
    """Describe the problem with multi-token prediction on ``pp`` pipeline stages; None if there is none."""
    if model.transformer.mtp_num_layers and pp > 1 and model.position_embedding_type == "learned_absolute":
        return (
            "multi-token prediction trains incorrectly with learned_absolute positions and pipeline parallelism: "
            "set position_embedding_type to rope, or transformer.pipeline_model_parallel_size to 1"
        )
    return None


GPT_RULES: tuple[Rule, ...] = (*MODELOPT_RULES, *LANGUAGE_RULES, predictions_in_a_pipeline)
