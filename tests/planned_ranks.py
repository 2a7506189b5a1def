"""What tests let a process do that makes plans: functions that another process can import."""

import gc
import os
import random
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from bridge.config import Document
from bridge.dist.documents import apply_layout
from bridge.dist.job import BuildJob
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.plan.results import StagePlan
from bridge.dist.run.rank import run_rank
from bridge.dist.train.batch import Batch
from bridge.dist.train.step import TrainOptions
from bridge.dist.train.text import default_text
from bridge.dist.wrapper import Wrapper


class Job(NamedTuple):
    """A model, how it is split and wrapped, on how many ranks."""

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


def train(job: Job, plans: list[Job]) -> tuple[list[float], list[float | None]]:
    """Losses and gradient norms of some steps, after plans."""
    for one in plans:
        one.plan()
    training = TrainOptions(steps=2, text=default_text(), seq_length=16, global_batch_size=2)
    report = run_rank(BuildJob(document=job.document().data, wrapper=job.wrapper, training=training))
    return report.losses, report.grad_norms


def plan_each_twice(jobs: list[Job]) -> tuple[list[bool], list[str]]:
    """Make plans, and then all of them once more: whether each is the same, and the state that they leave changed."""
    for name in ("distributed.tensor", "distributed.fsdp", "nn.functional"):
        __import__(f"torch.{name}")
    before = dict(_state())
    first = [job.plan() for job in jobs]
    again = [job.plan() for job in jobs]
    after = dict(_state())
    changed = [name for name, (value, _) in before.items() if name not in after or after[name][0] != value]
    return [one == other for one, other in zip(first, again, strict=True)], changed


_GROWS = ("used_ids", "cls_to_fsdp_cls", "_te_version", "_torch_version", "_mamba_ssm_version")
"""What torch and Megatron look up once: numbers that were given, classes that were made, versions."""


def _state() -> Iterator[tuple[str, tuple[object, object]]]:
    """Variables of modules, attributes of classes and functions: what each holds, and itself, to keep its address."""
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
    """Without what Python adds by itself, such as the warnings that were given, and what warns when it is looked at."""
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
