"""Compare published layouts with the first choice of a search: rows of a table in Markdown. It takes minutes a row.

uv run python .github/scripts/compare_recipes.py [NAME]...
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from bridge.config import Document
from bridge.dist.document_layout import replace_layout
from bridge.dist.layout import Layout
from bridge.dist.plan.layers import Layers, list_first_imports, prepare_process
from bridge.dist.run.pool import start_fork_server
from bridge.dist.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A layout that NVIDIA publishes for H100 GPUs in the performance summaries of Megatron Bridge."""

    preset: str
    layout: Layout
    global_batch_size: int
    seq_length: int
    fp8_recipe: str | None = "tensorwise"
    wrapper: Wrapper = Wrapper.DDP


RECIPES = {
    "8b": Recipe(
        preset="llama-3-8b",
        layout=Layout(dp=8),
        global_batch_size=128,
        seq_length=8192,
        wrapper=Wrapper.MEGATRON_FSDP,
    ),
    "70b": Recipe(
        preset="llama-3.1-70b", layout=Layout(tp=4, pp=8, vp=5, dp=2), global_batch_size=256, seq_length=8192
    ),
    "405b": Recipe(
        preset="llama-3.1-405b", layout=Layout(tp=8, pp=8, vp=8, cp=2, dp=8), global_batch_size=1536, seq_length=8192
    ),
    "30b": Recipe(preset="qwen3-30b-a3b", layout=Layout(ep=16, dp=16), global_batch_size=1024, seq_length=4096),
    "120b": Recipe(
        preset="gpt-oss-120b",
        layout=Layout(pp=4, ep=8, dp=16),
        global_batch_size=1280,
        seq_length=4096,
        fp8_recipe=None,
    ),
}


def main() -> None:
    """Print a row for each named recipe, by default for all."""
    prepare_process(Layers.TRANSFORMER_ENGINE)
    start_fork_server(2, "bridge.dist.plan.forecast.search", first=list_first_imports(Layers.TRANSFORMER_ENGINE))
    for name in sys.argv[1:] or RECIPES:
        sys.stdout.write(compare(RECIPES[name]) + "\n")
        sys.stdout.flush()


def compare(recipe: Recipe) -> str:
    """Return a row: the published layout, the first choice, the first one with DDP, and why the first is ahead."""
    from bridge.dist.plan.forecast.machine import load_machine
    from bridge.dist.plan.forecast.ranking import Candidate, explain_difference
    from bridge.dist.plan.forecast.search import search
    from bridge.dist.plan.forecast.space import Choice, Fixed, count_ends
    from bridge.dist.plan.forecast.step_time import estimate_time
    from bridge.dist.plan.plan import PlanOptions, plan
    from bridge.dist.train.batch import Batch

    machine = load_machine("h100")
    document = Document.load(recipe.preset)
    if recipe.fp8_recipe:
        # NVIDIA's recipes keep no copies of weights in bf16.
        for name, value in {"fp8": "hybrid", "fp8_recipe": recipe.fp8_recipe, "fp8_param": True}.items():
            document.set(f"transformer.{name}", value)
    replace_layout(document, {}, sequence_parallel=False)
    fixed = Fixed(fp8_recipes=(recipe.fp8_recipe,), wrapper=recipe.wrapper)
    options = PlanOptions(
        batch=Batch(seq_length=recipe.seq_length, global_batch_size=recipe.global_batch_size),
        world_size=recipe.layout.world_size,
        gpu_memory=machine.memory,
        layers=Layers.TRANSFORMER_ENGINE,
    )
    layers = document.data["transformer"]["num_layers"]
    choice = Choice(
        layout=recipe.layout,
        micro_batch_size=1,
        wrapper=recipe.wrapper,
        distributed_optimizer=recipe.wrapper is Wrapper.DDP,
        counted=count_ends(layers, recipe.layout.pp * recipe.layout.vp) or (),
        fp8_recipe=recipe.fp8_recipe,
    )
    planned = plan(choice.apply(document, fixed), choice.change_options(options))
    published = Candidate(choice, planned, estimate_time(planned, machine))
    sys.stderr.write(f"{choice}: {published.seconds:.2f} s, {planned.worst.total_bytes / 2**30:.1f} GiB\n")
    found = search(document, options, machine, fixed=replace(fixed, wrapper=None), top=1)
    best = found.candidates[0]
    memory = f"{planned.worst.total_bytes / 2**30:.1f} GiB, {'fits' if planned.fits else 'does not fit'}"
    columns = (
        f"{recipe.preset} on {options.world_size} GPUs",
        f"{choice.layout}: {memory}, {published.seconds:.2f} s",
        *(f"{one.choice}: {one.seconds:.2f} s" for one in (best, found.with_ddp or best)),
        explain_difference(best, published),
    )
    return f"| {' | '.join(columns)} |"


if __name__ == "__main__":
    main()
