"""The pre-flight rules of models with a ModelOpt state. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.dist.checks.preflight import Rule, Setup, rule

MODELOPT = "nvidia-modelopt 0.47"
"""The version in which the failures that these rules prevent were observed."""

_NO_REPRODUCTION = "it needs a checkpoint of a quantised model; tests/test_modelopt.py reproduces it"


@rule(observed_in=MODELOPT, no_reproduction=_NO_REPRODUCTION)
def modelopt_virtual_pipeline(setup: Setup) -> Iterator[str]:
    """ModelOpt stores the state of one stage per rank: saving a checkpoint raises a ValueError."""
    if _restores(setup) and setup.has_virtual_pipeline:
        yield "ModelOpt does not support virtual pipeline stages: set vp = 1"


@rule(observed_in=MODELOPT, no_reproduction=_NO_REPRODUCTION)
def modelopt_meta_device(setup: Setup) -> Iterator[str]:
    """The state is restored before wrapping, when parameters on the meta device have no memory: copying fails."""
    if _restores(setup) and setup.transformer.init_model_with_meta_device:
        yield "a ModelOpt state cannot be restored on the meta device: set init_model_with_meta_device = False"


@rule(observed_in=MODELOPT, no_reproduction=_NO_REPRODUCTION)
def modelopt_experts(setup: Setup) -> Iterator[str]:
    """ModelOpt raises a ValueError when it converts the experts."""
    if _restores(setup) and setup.transformer.num_moe_experts and setup.layout.ep > 1 and setup.layout.tp > 1:
        yield "ModelOpt does not support expert and tensor parallelism together: set ep = 1 or tp = 1"


def _restores(setup: Setup) -> bool:
    return setup.model is not None and setup.model.restore_modelopt_state


MODELOPT_RULES: tuple[Rule, ...] = (modelopt_virtual_pipeline, modelopt_meta_device, modelopt_experts)
