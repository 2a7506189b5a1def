"""Every layout with every wrapper trains like one process, or is refused before anything is built.

Each cell trains a few steps on real processes, with Megatron's schedule and optimizer. By default, only the cells on
two processes in RUN_BY_DEFAULT run; `bridge verify` trains those of tiny, for as many steps and within the same
tolerances, in test_verify.py. With BRIDGE_WHOLE_MATRIX=1 all cells run, which takes half an hour on two cores. The test
writes docs/matrix.md.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ranks import run_ranks

from bridge.config import BridgeError, Document, ModelConfig
from bridge.dist.run.parity import TrainingResult
from bridge.dist.run.splits import WRAPPINGS, Split, Wrapping, list_product_splits, list_single_splits
from bridge.dist.run.verify import Row, Tolerance, Verdict, judge
from bridge.dist.wrapper import Wrapper

MODELS = {
    "tiny": "GPTModel",
    "mla-tiny": "GPTModel",
    "moe-tiny": "GPTModel",
    "mamba-tiny": "HybridModel",
    "hybrid-tiny": "HybridModel",
    "t5-tiny": "T5Model",
}
PRECISIONS: dict[str, list[str]] = {
    "fp32": [],
    "bf16": ["transformer.bf16=true", "transformer.params_dtype=torch.bfloat16"],
}
RUN_BY_DEFAULT = {
    ("mla-tiny", "fp32"): 0,
    ("moe-tiny", "fp32"): 1,
    ("hybrid-tiny", "fp32"): 0,
    ("hybrid-tiny", "bf16"): 1,
}
"""Models and precisions of which half of the cells run by default, and which half. Layouts and wrappers form a
chessboard; 0 and 1 are its colours. Each half has every layout and every wrapper, and both together have every pair."""
STEPS = {"fp32": 5, "bf16": 3}
WORLDS = (2, 4)
RUN_WHOLE = "BRIDGE_WHOLE_MATRIX" in os.environ
# bf16 has 8 significant bits, and sums over ranks are rounded in another order.
TOLERANCES = {
    "fp32": Tolerance(loss=1e-5, grad_norm=1e-4, weight=1e-3),
    "bf16": Tolerance(loss=1e-3, grad_norm=1e-2, weight=0.1),
}
WRAPPERS = {
    Wrapper.DDP: "DistributedDataParallel",
    Wrapper.MEGATRON_FSDP: "FullyShardedDataParallel",
    Wrapper.TORCH_FSDP2: "TorchFullyShardedDataParallel",
}
INTRODUCTION = """# What is proven

`tests/test_matrix.py` trains these combinations and writes this page.

*Proven* means that five steps (three in bf16) with Megatron's schedule and Adam give the same losses, gradient norms
and final weights as one process. The fp32 tolerances are 1e-5 for losses, 1e-4 for gradient norms, and for weights
1e-3 of the change that training makes. *Refused* means that an error before anything is built says what to set. A
cell holds for fp32 and bf16; `sp` is sequence parallelism, and `vp` the number of virtual pipeline stages.

Every test run trains, on two processes, all cells of tiny in fp32 and half of the cells of mla-tiny, moe-tiny and
hybrid-tiny: each layout and each wrapper, but not each pair. `BRIDGE_WHOLE_MATRIX=1` trains all cells, also those on
four processes.

"""
DOCUMENT = Path(__file__).parents[1] / "docs" / "matrix.md"


class Cell(NamedTuple):
    """A model in a precision, under a layout on a number of ranks, with a wrapper."""

    model: str
    precision: str
    world_size: int
    split: Split
    wrapping: Wrapping

    @property
    def layout(self) -> str:
        return self.split.format_name(self.world_size)


def list_runs(model: str, precision: str, world_size: int) -> list[list[Cell]]:
    """Return the cells to train, by layout."""
    every = [
        [Cell(model, precision, world_size, split, wrapping) for wrapping in WRAPPINGS]
        for split in list_splits(world_size)
    ]
    if RUN_WHOLE:
        return every
    if world_size != 2 or (model, precision) not in RUN_BY_DEFAULT:
        return []
    half = RUN_BY_DEFAULT[model, precision]
    return [cells[(row + half) % 2 :: 2] for row, cells in enumerate(every)]


def list_splits(world_size: int) -> list[Split]:
    return list_single_splits(world_size) + list_product_splits(world_size)


@functools.cache
def load_document(model: str, precision: str) -> Document:
    return Document.load(model, PRECISIONS[precision])


def make_job(cell: Cell) -> Any:
    from bridge.dist.job import BuildJob
    from bridge.dist.train.step import TrainOptions
    from bridge.dist.train.text import find_default_text

    document = cell.split.apply_to(load_document(cell.model, cell.precision))
    return BuildJob(
        document=document.data,
        wrapper=cell.wrapping.wrapper,
        distributed_optimizer=cell.wrapping.distributed_optimizer,
        training=TrainOptions(
            steps=STEPS[cell.precision],
            text=find_default_text(),
            seq_length=16,
            global_batch_size=4,
            micro_batch_size=2 if cell.layout.endswith("dp1") else 1,  # two microbatches on four ranks
        ),
    )


@functools.cache
def find_refusal(cell: Cell) -> str | None:
    """Return why a cell is refused, or None."""
    job = make_job(cell)
    try:
        job.check(ModelConfig.from_dict(job.document), cell.world_size)
    except BridgeError as error:
        return str(error)
    return None


def train_cells(cells: Sequence[Cell], weights: Path) -> list[TrainingResult]:
    """Train the cells in turn; compare their weights with a file, or write the file if it does not exist."""
    import torch

    from bridge.dist import create_process_groups, destroy_process_groups
    from bridge.dist.run.collect import list_wrapper_names
    from bridge.dist.run.execute import build_and_train
    from bridge.dist.run.parity import compare_weights, save_weights

    def trained(cell: Cell) -> TrainingResult:
        job = make_job(cell)
        config = ModelConfig.from_dict(job.document)
        layout = job.check(config, torch.distributed.get_world_size())
        run = build_and_train(job, config, layout, create_process_groups(layout))
        half = ["Float16Module"] if cell.precision == "bf16" else []
        for stage in run.stages:
            names = [
                name.removeprefix("FSDP") for name in list_wrapper_names(stage)
            ]  # torch FSDP2 adds the prefix to the class name
            assert [names[0], *names[-1 - len(half) :]] == [WRAPPERS[cell.wrapping.wrapper], *half, MODELS[cell.model]]
        if not weights.exists():
            save_weights(run, weights)
        return compare_weights(run, weights)

    found = []
    for cell in cells:
        try:
            found.append(trained(cell))
        except Exception as error:
            error.add_note(f"{cell.layout} with {cell.wrapping}")
            raise
        destroy_process_groups()
        gc.collect()  # threads of a group use the CPU until its models are freed
    return found


class Reference(NamedTuple):
    """The result of one process, and the file of its final weights."""

    trained: TrainingResult
    weights: Path


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Reference]:
    folder = tmp_path_factory.mktemp("weights")
    found = {}
    for model, precision in itertools.product(MODELS, PRECISIONS) if RUN_WHOLE else RUN_BY_DEFAULT:
        weights = folder / f"{model}-{precision}.pt"
        cell = Cell(model, precision, 1, Split(), WRAPPINGS[0])
        found[model, precision] = Reference(run_ranks(train_cells, 1, [cell], weights)[0][0], weights)
    return found


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_every_cell_is_refused_or_trains_as_one_process(
    model: str,
    precision: str,
    world_size: int,
    references: dict[tuple[str, str], Reference],
) -> None:
    if not (runs := list_runs(model, precision, world_size)):
        pytest.skip("in runs of the whole matrix only")
    expected, weights = references[model, precision]
    limits = TOLERANCES[precision]
    wrong = []
    for cells in runs:  # separate processes, so that leftovers of cells do not add up
        run = [cell for cell in cells if find_refusal(cell) is None]
        found = run_ranks(train_cells, world_size, run, weights, timeout=600) if run else []
        for cell, *by_rank in zip(run, *found, strict=True):
            for trained in by_rank:
                row = Row(layout=cell.layout, wrapper=str(cell.wrapping), verdict=Verdict.EQUAL)
                if (verdict := judge(row, trained, expected, limits)).is_mismatch:
                    wrong.append(str(verdict))
    assert not wrong, "\n".join(wrong)


def test_training_lowers_the_loss(references: dict[tuple[str, str], Reference]) -> None:
    for trained, _ in references.values():
        assert trained.losses[-1] < trained.losses[0]


def test_the_documentation_shows_the_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    found = render_page()
    with capsys.disabled():
        sys.stdout.write("\n" + found)
    if DOCUMENT.read_text() != found:
        DOCUMENT.write_text(found)
        pytest.fail("docs/matrix.md said otherwise; it has been written anew: run the whole matrix")


def render_page() -> str:
    """Render the page of the documentation: a table for each model, followed by the reasons of refusals."""
    notes: list[str] = []

    def format_verdict(cells: list[Cell]) -> str:
        reasons = {find_refusal(cell) for cell in cells}
        assert len(reasons) == 1, f"{cells[0].layout}: the precisions differ"
        (reason,) = reasons
        if reason is None:
            return "proven"
        if reason not in notes:
            notes.append(reason)
        return f"refused [{notes.index(reason) + 1}]"

    tables = []
    for model in MODELS:
        lines = [
            f"## {model}",
            "",
            f"| layout | {' | '.join(map(str, WRAPPINGS))} |",
            "|" + " --- |" * (1 + len(WRAPPINGS)),
        ]
        for world_size in WORLDS:
            for split in list_splits(world_size):
                verdicts = [
                    format_verdict([Cell(model, precision, world_size, split, wrapping) for precision in PRECISIONS])
                    for wrapping in WRAPPINGS
                ]
                lines.append(f"| {split.format_name(world_size)} | {' | '.join(verdicts)} |")
        tables.append("\n".join(lines))
    reasons = "\n".join(f"{number}. {' '.join(reason.split())}" for number, reason in enumerate(notes, start=1))
    return INTRODUCTION + "\n\n".join(tables) + "\n\n## Why refused\n\n" + reasons + "\n"
