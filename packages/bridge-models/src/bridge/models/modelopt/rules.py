"""The pre-flight rules of models with a ModelOpt state. Importing them imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import Rule, Setup, rule

MODELOPT = "nvidia-modelopt 0.47"
"""The version that the rules about ModelOpt were seen in."""

_SHOWN = "it takes a checkpoint of a quantised model: tests/test_modelopt.py shows it"


@rule(seen=MODELOPT, not_shown=_SHOWN)
def modelopt_virtual_pipeline(setup: Setup) -> Iterator[str]:
    """ModelOpt keeps the state of one stage a rank: a ValueError in place of a checkpoint."""
    if _restores(setup) and setup.has_virtual_pipeline:
        yield "a ModelOpt state is of one stage a rank, without a virtual pipeline: set vp = 1"


@rule(seen=MODELOPT, not_shown=_SHOWN)
def modelopt_meta_device(setup: Setup) -> Iterator[str]:
    """What is restored before wrapping has no memory on the meta device: an error about copying out of it."""
    if _restores(setup) and setup.transformer.init_model_with_meta_device:
        yield "what is restored needs memory, on the meta device there is none: set init_model_with_meta_device = False"


@rule(seen=MODELOPT, not_shown=_SHOWN)
def modelopt_experts(setup: Setup) -> Iterator[str]:
    """A ValueError when the experts are converted."""
    if _restores(setup) and setup.transformer.num_moe_experts and setup.layout.ep > 1 and setup.layout.tp > 1:
        yield "ModelOpt quantises experts under expert or tensor parallelism, not both: set ep = 1 or tp = 1"


def _restores(setup: Setup) -> bool:
    return setup.model is not None and setup.model.restore_modelopt_state


MODELOPT_RULES: tuple[Rule, ...] = (modelopt_virtual_pipeline, modelopt_meta_device, modelopt_experts)
