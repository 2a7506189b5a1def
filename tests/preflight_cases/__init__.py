"""A case for each pre-flight rule: a setup that it refuses, one that passes, and the outcome without the rule."""

from preflight_cases import ddp, layers, machine, megatron_fsdp, models, pipeline, process_groups, sizes, torch_fsdp2
from preflight_cases.setting import Case

CASES: dict[str, Case] = {
    **sizes.CASES,
    **pipeline.CASES,
    **layers.CASES,
    **process_groups.CASES,
    **ddp.CASES,
    **torch_fsdp2.CASES,
    **megatron_fsdp.CASES,
    **machine.CASES,
    **models.CASES,
}
NOT_SHOWN: dict[str, Case] = {
    **sizes.NOT_SHOWN,
    **pipeline.NOT_SHOWN,
    **layers.NOT_SHOWN,
    **torch_fsdp2.NOT_SHOWN,
    **megatron_fsdp.NOT_SHOWN,
    **machine.NOT_SHOWN,
    **models.NOT_SHOWN,
}
"""Cases of rules with ``not_shown``: no process of these tests shows the outcome without the rule."""
EVERY_CASE = CASES | NOT_SHOWN
