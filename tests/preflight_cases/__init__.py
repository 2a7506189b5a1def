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
NO_REPRODUCTION: dict[str, Case] = {
    **sizes.NO_REPRODUCTION,
    **pipeline.NO_REPRODUCTION,
    **layers.NO_REPRODUCTION,
    **ddp.NO_REPRODUCTION,
    **torch_fsdp2.NO_REPRODUCTION,
    **megatron_fsdp.NO_REPRODUCTION,
    **machine.NO_REPRODUCTION,
    **models.NO_REPRODUCTION,
}
"""Cases of rules with ``no_reproduction``: the common test does not reproduce the failure."""
EVERY_CASE = CASES | NO_REPRODUCTION
