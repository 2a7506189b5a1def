"""Comparison of training under several layouts and wrappers with training on one process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from megatron.core.transformer import TransformerConfig

from bridge.config import BridgeError, Document, ModelConfig
from bridge.dist.document_layout import switch_off_dropout
from bridge.dist.errors import LaunchError
from bridge.dist.job import BuildJob, read_text
from bridge.dist.loaders import find_loader
from bridge.dist.run.origin import DRAWN, Origin
from bridge.dist.run.parity import TrainingResult, train_and_compare, train_reference
from bridge.dist.run.pool import RankPool, StartMethod
from bridge.dist.run.splits import WRAPPINGS, Split, Wrapping
from bridge.dist.train.step import TrainOptions


class Verdict(StrEnum):
    """The outcome of one layout."""

    EQUAL = "equal"
    DIFFERENT = "different"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout and wrapper compared with one process: largest relative differences over steps, ranks and parameters.

    ``parameter`` is the one that differs most; ``reason`` says why the layout was refused or failed.
    """

    layout: str
    wrapper: str
    verdict: Verdict
    loss_difference: float | None = None
    grad_norm_difference: float | None = None
    weight_difference: float | None = None
    parameter: str | None = None
    reason: str | None = None
    logits_difference: float | None = None
    """From the library that the weights come from; None if the logits were not compared."""

    @property
    def is_mismatch(self) -> bool:
        """Whether the training differs from that of one process, or failed."""
        return self.verdict in (Verdict.DIFFERENT, Verdict.FAILED)


class Tolerance(NamedTuple):
    """Largest relative differences that rounding explains, for losses, gradient norms, weights and logits."""

    loss: float
    grad_norm: float
    weight: float
    logits: float = 1e-5


# fp32 rounds to 24 bits, and sums over ranks round in another order.
_FULL_PRECISION = Tolerance(loss=1e-5, grad_norm=1e-4, weight=1e-3)
# Every 16-bit operation rounds to 8 (bfloat16) or 11 bits, and sums over ranks round in another order.
_HALF_PRECISION = Tolerance(loss=1e-3, grad_norm=1e-2, weight=0.1, logits=2e-2)


def choose_tolerance(config: TransformerConfig) -> Tolerance:
    """Return the tolerance for a configuration's precision."""
    return _HALF_PRECISION if config.bf16 or config.fp16 else _FULL_PRECISION


def save_expected_logits(
    document: Document, training: TrainOptions, weights: Path, *, samples: int, file: Path
) -> None:
    """Write the first tokens to train on, and the logits of the library that a folder of weights comes from.

    Raises:
        ComparisonError: The library is not installed, or cannot run the model.
    """
    batch = read_text(training, document.config()).make_batch(0, size=samples, seq_length=training.seq_length)
    tokens = batch[:, :-1]
    torch.save({"tokens": tokens, "logits": find_loader(weights).compute_logits(weights, tokens)}, file)


def verify(
    document: Document,
    training: TrainOptions,
    *,
    world_size: int,
    cases: Sequence[tuple[Split, Wrapping]],
    start_method: StartMethod = "forkserver",
    origin: Origin = DRAWN,
    logits: Path | None = None,
    save: Path | None = None,
) -> Iterator[Row]:
    """Train a document's model on one process, then under each layout on ``world_size`` local processes, and compare.

    Dropout is switched off, and the document's own layout is ignored. The processes are reused from layout to layout;
    a failure affects only its own layout.

    Args:
        document: The document of the model.
        training: What is trained.
        world_size: The number of ranks.
        cases: The layouts and wrappers to compare.
        start_method: How ranks are started.
        origin: Where the initial weights come from, and with a checkpoint the optimizer and the place in the text.
        logits: The file of ``save_expected_logits``; None compares no logits.
        save: A folder to save the model of the one process to, after the last step.

    Raises:
        BridgeError: The document is invalid, or its training on one process failed.
    """
    document = deepcopy(document)
    switch_off_dropout(document)
    with TemporaryDirectory() as folder, RankPool(start_method=start_method) as pool:
        final_weights = Path(folder) / "weights.pt"
        alone = replace(_make_job(document, Split(), WRAPPINGS[0], training, origin), save=save)
        allowed = choose_tolerance(_check_job(alone, world_size=1))
        expected = pool.run(train_reference, alone, final_weights, ranks=1)[0]
        for split, wrapping in cases:
            row = Row(layout=split.format_name(world_size), wrapper=str(wrapping), verdict=Verdict.EQUAL)
            try:
                job = _make_job(document, split, wrapping, training, origin)
                _check_job(job, world_size=world_size)
            except BridgeError as error:
                yield replace(row, verdict=Verdict.REFUSED, reason=str(error))
                continue
            try:
                trained = pool.run(train_and_compare, job, final_weights, logits, ranks=world_size)[0]
            except LaunchError as error:
                yield replace(row, verdict=Verdict.FAILED, reason=str(error))
                continue
            yield judge(row, trained, expected, allowed)


def judge(row: Row, trained: TrainingResult, expected: TrainingResult, allowed: Tolerance) -> Row:
    """Fill in the differences of a run from the expected one, and whether they are within tolerance."""
    differences = Tolerance(
        loss=compute_relative_difference(trained.losses, expected.losses),
        grad_norm=compute_relative_difference(trained.grad_norms, expected.grad_norms),
        weight=trained.weight_difference,
        logits=trained.logits_difference or 0.0,
    )
    # `<=` is False for NaN, which therefore counts as different.
    equal = all(difference <= limit for difference, limit in zip(differences, allowed, strict=True))
    return replace(
        row,
        verdict=Verdict.EQUAL if equal else Verdict.DIFFERENT,
        loss_difference=differences.loss,
        grad_norm_difference=differences.grad_norm,
        weight_difference=differences.weight,
        parameter=trained.parameter,
        logits_difference=trained.logits_difference,
    )


def compute_relative_difference(values: Sequence[float | None], expected: Sequence[float | None]) -> float:
    """Return the largest relative difference of two sequences; None, a step that overflowed, equals only None."""
    return max(_compare_numbers(value, other) for value, other in zip(values, expected, strict=True))


def _compare_numbers(value: float | None, expected: float | None) -> float:
    if value == expected:
        return 0.0
    # NaN counts as different; max() could ignore it.
    if value is None or not expected or math.isnan(value) or math.isnan(expected):
        return math.inf
    return abs(value - expected) / abs(expected)


def _make_job(document: Document, split: Split, wrapping: Wrapping, training: TrainOptions, origin: Origin) -> BuildJob:
    return BuildJob(
        document=split.apply_to(document).data,
        wrapper=wrapping.wrapper,
        distributed_optimizer=wrapping.distributed_optimizer,
        training=training,
        **vars(origin),
    )


def _check_job(job: BuildJob, *, world_size: int) -> TransformerConfig:
    """Check a job for ``world_size`` ranks and return its Megatron configuration.

    Raises:
        BridgeError: The job is not possible.
    """
    config = ModelConfig.from_dict(job.document)
    job.check(config, world_size)
    builder = job.make_builder(config)
    builder.check_restore()
    return builder.transformer_config
