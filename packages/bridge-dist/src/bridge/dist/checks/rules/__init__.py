"""The pre-flight rules of all models, one file per subject. Model families add their own.

Importing this package does not import torch.
"""

from __future__ import annotations

from bridge.dist.checks.preflight import Rule
from bridge.dist.checks.rules import ddp, layers, machine, megatron_fsdp, pipeline, process_groups, sizes, torch_fsdp2

MODEL_RULES: tuple[Rule, ...] = (
    *sizes.RULES,
    *pipeline.RULES,
    *layers.RULES,
    *process_groups.RULES,
    *ddp.RULES,
    *torch_fsdp2.RULES,
    *megatron_fsdp.RULES,
)
"""Rules that depend only on the configuration, the layout and the build options."""

RULES: tuple[Rule, ...] = (*MODEL_RULES, *machine.RULES)
"""All rules, including those that depend on the machine."""
