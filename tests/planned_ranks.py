"""Functions for processes that make plans, importable in another process."""

import gc
import os
import random
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from bridge.config import Document
from bridge.dist.document_layout import apply_layout
from bridge.dist.job import BuildJob
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.plan.results import StagePlan
from bridge.dist.run.rank import run_rank
from bridge.dist.train.batch import Batch
from bridge.dist.train.step import TrainOptions
from bridge.dist.train.text import find_default_text
from bridge.dist.wrapper import Wrapper


class Job(NamedTuple):
    """A model, its layout and wrapper, and the number of ranks."""

    preset: str
    overrides: tuple[str, ...]
    sizes: dict[str, int]
    world_size: int
    wrapper: Wrapper = Wrapper.DDP

    def document(self) -> Document:
        document = Document.load(self.preset, list(self.overrides))
        apply_layout(document, self.sizes)
        return document

    def plan(self) -> list[StagePlan]:
        batch = Batch(seq_length=64, global_batch_size=8)
        return plan(self.document(), PlanOptions(batch=batch, world_size=self.world_size, wrapper=self.wrapper)).stages


def train(job: Job) -> tuple[list[float], list[float | None]]:
    """Train two steps; return losses and gradient norms."""
    training = TrainOptions(steps=2, text=find_default_text(), seq_length=16, global_batch_size=2)
    report = run_rank(BuildJob(document=job.document().data, wrapper=job.wrapper, training=training))
    return report.losses, report.grad_norms


def plan_each_twice(jobs: list[Job]) -> tuple[list[bool], list[str]]:
    """Make all plans twice; return whether each pair is equal, and the names of state that changed."""
    for name in ("distributed.tensor", "distributed.fsdp", "nn.functional"):
        __import__(f"torch.{name}")
    before = dict(_state())
    first = [job.plan() for job in jobs]
    again = [job.plan() for job in jobs]
    after = dict(_state())
    changed = [name for name, (value, _) in before.items() if name not in after or after[name][0] != value]
    return [one == other for one, other in zip(first, again, strict=True)], changed


def plan_and_train(plans: list[Job], job: Job) -> tuple[list[bool], list[str], tuple[list[float], list[float | None]]]:
    """Make all plans twice, then train; return what each of the two functions returns."""
    return *plan_each_twice(plans), train(job)


_GROWS = ("used_ids", "cls_to_fsdp_cls", "_te_version", "_torch_version", "_mamba_ssm_version")
"""Caches of torch and Megatron that may grow: numbers, generated classes, versions."""


def _state() -> Iterator[tuple[str, tuple[object, object]]]:
    """Yield module variables and attributes with their content; the object itself keeps its id in use."""
    gc.collect()
    for name, module in list(sys.modules.items()):
        if not name.startswith(("megatron.", "torch.distributed.", "torch.autograd.")):
            continue
        for variable, value in _named(module):
            yield f"{name}.{variable}", (_content(value), value)
            if isinstance(value, type | types.FunctionType) and value.__module__ == name:
                for attribute, inner in _named(value):
                    yield f"{name}.{variable}.{attribute}", (_content(inner), inner)
    yield "sys.excepthook", (sys.excepthook, None)
    yield "os.environ", (dict(os.environ), None)
    yield "random", (random.getstate(), None)
    yield "torch.random", (torch.get_rng_state().tolist(), None)


def _named(owner: Any) -> list[tuple[str, object]]:
    """Return the variables of `owner` without those that Python adds, and those whose access warns."""
    return [
        (name, value)
        for name, value in vars(owner).items()
        if not name.startswith(("__", "_abc_", "reduce_op", *_GROWS))
    ]


def _content(value: object, depth: int = 2) -> object:
    if isinstance(value, dict):
        return [(id(key), _content(item, depth - 1)) for key, item in value.items()] if depth else id(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_content(item, depth - 1) for item in value] if depth else id(value)
    if isinstance(value, torch.Tensor):
        return (id(value), value._version)
    return value if isinstance(value, int | float | str | None) else id(value)
