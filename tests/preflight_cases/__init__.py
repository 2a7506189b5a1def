"""A case for each pre-flight rule: a setup that it refuses, one that passes, and what comes of the first without it."""

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
SHOWN_ELSEWHERE: dict[str, Case] = {
    **sizes.SHOWN_ELSEWHERE,
    **pipeline.SHOWN_ELSEWHERE,
    **layers.SHOWN_ELSEWHERE,
    **torch_fsdp2.SHOWN_ELSEWHERE,
    **megatron_fsdp.SHOWN_ELSEWHERE,
    **machine.SHOWN_ELSEWHERE,
    **models.SHOWN_ELSEWHERE,
}
"""Of the rules whose ``not_shown`` says why no process here shows what comes of it without them."""
EVERY_CASE = CASES | SHOWN_ELSEWHERE
