"""Plans of presets and of measured layers, and overrides that several tests of plans use."""

from __future__ import annotations

from typing import Any

from bridge.config import Document
from bridge.dist.document_layout import apply_layout
from bridge.dist.job import make_builder
from bridge.dist.plan.count.microbatch import Memo
from bridge.dist.plan.forecast.bounds import Bounds
from bridge.dist.plan.forecast.space import Choice, Fixed
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


def measure_layers(
    bounds: Bounds,
    choice: Choice,
    document: Document,
    options: PlanOptions,
    fixed: Fixed,
    *,
    memo: Memo | None = None,
) -> None:
    """Measure the layers of a choice for its bounds, as a search does."""
    layers = make_builder(document.config()).transformer_config.num_layers
    for kind in bounds.list_unmeasured(choice):
        alone, changed = kind.spread(options, stages=layers)
        measured = plan(alone.apply(document, fixed), changed, memo=memo, stages=bounds.list_measurable(kind))
        bounds.learn_layers(kind, measured)
