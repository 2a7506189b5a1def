"""Compare published layouts with the first choice of a search: rows of a table in Markdown. A row takes a minute.

uv run python .github/scripts/compare_recipes.py [NAME]...
"""

from __future__ import annotations

import sys
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridge.config import Document
from bridge.dist.document_layout import replace_layout
from bridge.dist.layout import Layout
from bridge.dist.plan.layers import Layers, list_first_imports, prepare_process
from bridge.dist.run.pool import start_fork_server
from bridge.dist.wrapper import Wrapper

if TYPE_CHECKING:
    from bridge.dist.plan.forecast.ranking import Candidate, SearchResult
    from bridge.dist.plan.forecast.space import Fixed
    from bridge.dist.plan.plan import PlanOptions


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
    from bridge.dist.plan.forecast.ranking import explain_difference

    published = plan_published(recipe)
    planned = published.plan
    memory = f"{planned.worst.total_bytes / 2**30:.1f} GiB, {'fits' if planned.fits else 'does not fit'}"
    sys.stderr.write(f"{published.choice}: {published.seconds:.2f} s, {memory}\n")
    found = search_layouts(recipe)
    best = found.candidates[0]
    columns = (
        f"{recipe.preset} on {planned.world_size} GPUs",
        f"{published.choice.layout}: {memory}, {published.seconds:.2f} s",
        *(f"{one.choice}: {one.seconds:.2f} s" for one in (best, found.with_ddp or best)),
        explain_difference(best, published),
    )
    return f"| {' | '.join(columns)} |"


def plan_published(recipe: Recipe) -> Candidate:
    """Plan the published layout of a recipe."""
    from bridge.dist.plan.forecast.machine import load_machine
    from bridge.dist.plan.forecast.ranking import Candidate
    from bridge.dist.plan.forecast.space import Choice, count_ends
    from bridge.dist.plan.forecast.step_time import estimate_time
    from bridge.dist.plan.plan import plan

    document, options, fixed = prepare(recipe)
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
    return Candidate(choice, planned, estimate_time(planned, load_machine("h100")))


def search_layouts(recipe: Recipe, *, executor: Executor | None = None) -> SearchResult:
    """Search for the fastest layout of a recipe's model, GPUs and batch."""
    from bridge.dist.plan.forecast.machine import load_machine
    from bridge.dist.plan.forecast.search import search

    document, options, fixed = prepare(recipe)
    return search(document, options, load_machine("h100"), fixed=fixed, top=1, executor=executor)


def prepare(recipe: Recipe) -> tuple[Document, PlanOptions, Fixed]:
    """Return the model, the options of its plan, and the precision, which a search must not change."""
    from bridge.dist.plan.forecast.machine import load_machine
    from bridge.dist.plan.forecast.space import Fixed
    from bridge.dist.plan.plan import PlanOptions
    from bridge.dist.train.batch import Batch

    document = Document.load(recipe.preset)
    if recipe.fp8_recipe:
        # NVIDIA's recipes keep no copies of weights in bf16.
        for name, value in {"fp8": "hybrid", "fp8_recipe": recipe.fp8_recipe, "fp8_param": True}.items():
            document.set(f"transformer.{name}", value)
    replace_layout(document, {}, sequence_parallel=False)
    options = PlanOptions(
        batch=Batch(seq_length=recipe.seq_length, global_batch_size=recipe.global_batch_size),
        world_size=recipe.layout.world_size,
        gpu_memory=load_machine("h100").memory,
        layers=Layers.TRANSFORMER_ENGINE,
    )
    return document, options, Fixed(fp8_recipes=(recipe.fp8_recipe,))


if __name__ == "__main__":
    main()
