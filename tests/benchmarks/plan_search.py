"""Measure how many choices a search decides and plans in a minute, and how long single plans of large jobs take.

uv run python tests/benchmarks/plan_search.py [PRESET] [GPUS]
"""

from __future__ import annotations

import random
import resource
import sys
import time

from bridge.config import Document
from bridge.dist.document_layout import apply_layout
from bridge.dist.job import make_builder
from bridge.dist.plan.count.microbatch import Memo
from bridge.dist.plan.forecast.machine import load_machine
from bridge.dist.plan.forecast.search import search
from bridge.dist.plan.forecast.space import Choice, Fixed, list_choices
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.run.pool import start_fork_server
from bridge.dist.train.batch import Batch
from bridge.dist.wrapper import Wrapper

LARGE = {
    "llama-3.1-405b": (
        {"tp": 8, "pp": 16, "vp": 8},
        16_384,
        [
            "transformer.sequence_parallel=true",
            "transformer.account_for_embedding_in_pipeline_split=true",
            "transformer.account_for_loss_in_pipeline_split=true",
        ],
    ),
    "deepseek-v3": (
        {"pp": 16, "ep": 64},
        2048,
        ["transformer.pipeline_model_parallel_layout=Ettt|(tttt|)*14,ttL"],
    ),
}


def main() -> None:
    preset, gpus = sys.argv[1] if sys.argv[1:] else "llama-3.1-8b", int(sys.argv[2]) if sys.argv[2:] else 64
    start_fork_server(2, "bridge.dist.plan.forecast.search")
    for name, (sizes, world_size, overrides) in LARGE.items():
        document = Document.load(name, overrides)
        apply_layout(document, sizes)
        batch = Batch(seq_length=document.data["seq_length"], global_batch_size=world_size)
        options = PlanOptions(batch=batch, world_size=world_size, distributed_optimizer=True)
        found = plan(document, options)
        sys.stdout.write(f"{name} on {world_size:,} ranks: {found.parameters:,} parameters, {found.seconds:.1f} s\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sys.stdout.write(f"peak memory of this process: {peak:.2f} GiB\n")

    document = Document.load(preset)
    machine = load_machine("h100")
    options = PlanOptions(
        batch=Batch(seq_length=document.data["seq_length"], global_batch_size=8 * gpus),
        world_size=gpus,
        gpu_memory=machine.memory,
    )
    start = time.perf_counter()
    outcome = search(document, options, machine)
    seconds = time.perf_counter() - start
    decided = outcome.planned + outcome.too_large + outcome.slower
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    sys.stdout.write(
        f"{preset} on {gpus} GPUs: {decided} choices, {outcome.planned} of them planned, in {seconds:.1f} s: "
        f"{60 * decided / seconds:,.0f} decided a minute; peak memory of a worker: {peak:.2f} GiB\n"
    )
    start = time.perf_counter()
    fixed = Fixed(wrapper=Wrapper.DDP)
    config = make_builder(document.config()).transformer_config
    choices = [one for one in list_choices(config, options, fixed) if isinstance(one, Choice)]
    memo: Memo = {}
    some = random.Random(0).sample(choices, 60)
    for choice in some:
        plan(choice.apply(document, fixed), choice.change_options(options), memo=memo)
    seconds = time.perf_counter() - start
    sys.stdout.write(f"random choices with DDP in one process: {60 * len(some) / seconds:.0f} planned a minute\n")


if __name__ == "__main__":
    main()
