"""Plans of presets, and overrides that several tests of plans use."""

from __future__ import annotations

from typing import Any

from bridge.config import Document
from bridge.dist.document_layout import apply_layout
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.plan.results import Plan
from bridge.dist.train.batch import Batch

HALF = ("transformer.bf16=true", "transformer.params_dtype=torch.bfloat16")
RECOMPUTED = (
    "transformer.recompute_granularity=full",
    "transformer.recompute_method=uniform",
    "transformer.recompute_num_layers=1",
)


def plan_preset(preset: str, sizes: dict[str, int], *overrides: str, world_size: int, **options: Any) -> Plan:
    document = Document.load(preset, list(overrides))
    apply_layout(document, sizes)
    batch = options.pop("batch", Batch(seq_length=document.data["seq_length"], global_batch_size=world_size))
    return plan(document, PlanOptions(batch=batch, world_size=world_size, **options))
