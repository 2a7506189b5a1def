"""Stages built on the meta device get memory and initial weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer import MegatronModule, TransformerConfig
from ranks import run_ranks
from wrapped_gpt import BF16, EXPERTS, PP2, TP2, Built, Case, build_case, fsdp, fsdp2, train_built

from bridge.dist import BuildOptions, Layout, create_process_groups, prepare_stages
from bridge.dist.engine.meta import materialize


def test_materialize_skips_children_by_default() -> None:
    with torch.device("meta"):
        parent = torch.nn.Module()
        parent.weight = torch.nn.Parameter(torch.empty(2))
        parent.child = torch.nn.Linear(2, 2)
    parent.kept = torch.nn.Buffer(torch.tensor([3.0]))
    materialize(parent, torch.device("cpu"), recurse=False)
    assert (parent.weight.is_meta, parent.child.weight.is_meta, parent.kept.item()) == (False, True, 3.0)
    materialize(parent, torch.device("cpu"))
    assert not parent.child.weight.is_meta


def test_materialize_keeps_attributes_and_ties() -> None:
    with torch.device("meta"):
        first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    first.weight.allreduce = False  # type: ignore[attr-defined]
    second.weight = first.weight
    model = materialize(torch.nn.Sequential(first, second), torch.device("cpu"))
    assert model[0].weight is model[1].weight
    assert model[0].weight.allreduce is False
    assert not model[0].weight.is_meta


def parameter_attributes(made: Built) -> dict[str, list[str]]:
    return {name: sorted(vars(parameter)) for name, parameter in made.stages[0].named_parameters()}


def train_on_meta(cases: dict[str, Case]) -> list[str]:
    """Check that stages train the same with and without the meta device; return the warnings."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bridge.dist.engine.meta").addHandler(handler)
    for name, case in cases.items():
        with build_case(case) as made:
            expected_attributes, expected = parameter_attributes(made), train_built(made, steps=1)
        with build_case(replace(case, transformer=case.transformer | {"init_model_with_meta_device": True})) as made:
            assert not any(tensor.is_meta for tensor in made.stages[0].state_dict().values() if tensor is not None)
            assert parameter_attributes(made) == expected_attributes, name
            assert train_built(made, steps=1) == expected, name
    return records


def test_stages_from_the_meta_device_train_the_same() -> None:
    cases = {
        "ddp, bf16": Case(transformer=BF16, drawn=False),
        "ddp, tp2": Case(transformer=TP2, drawn=False),
        "ddp, experts, bf16": Case(transformer=EXPERTS | BF16, drawn=False),
        "ddp, pp2, tied": Case(transformer=PP2, tied=True, drawn=False),
        "megatron-fsdp, whole weights": fsdp("optim_grads", drawn=False),
        "megatron-fsdp, bf16": fsdp(transformer=BF16, drawn=False),
        "megatron-fsdp, tp2": fsdp(transformer=TP2, drawn=False),
        "megatron-fsdp, experts": fsdp(transformer=EXPERTS, drawn=False),
        "fsdp2, bf16": fsdp2(transformer=BF16, drawn=False),
    }
    assert run_ranks(train_on_meta, 2, cases, timeout=240) == [[], []]


class Unknown(torch.nn.Module):
    """A module without a `reset_parameters` method."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.count = torch.nn.Buffer(torch.ones((), dtype=torch.long))


class MetaStage(MegatronModule):
    """A stage with three modules on the meta device: known, unknown, and partly materialized."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        with torch.device("meta"):
            self.known, self.unknown, self.partly = torch.nn.LayerNorm(3), Unknown(), torch.nn.Linear(3, 3)
        self.partly.bias = torch.nn.Parameter(torch.full((3,), 5.0))


def build_unknown_modules(flags: dict[str, Any], ddp: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bridge.dist.engine.meta").addHandler(handler)
    config = Case(transformer={"init_model_with_meta_device": True}).config.transformer
    groups = create_process_groups(Layout())
    options = BuildOptions(ddp_config=DistributedDataParallelConfig(**ddp), **flags)
    (stage,) = prepare_stages([MetaStage(config)], config, groups, options)
    values = {}
    for name, tensor in stage.state_dict().items():
        local = tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
        values[name.removeprefix("module.")] = local.flatten().tolist()
    return values, records


@pytest.mark.parametrize("case", [Case(), fsdp("optim_grads"), fsdp(), fsdp2(), Case(flags={"wrap_with_ddp": False})])
def test_modules_that_cannot_initialise_are_nan_and_named(case: Case) -> None:
    ((values, records),) = run_ranks(build_unknown_modules, 1, case.flags, case.ddp)
    assert values["known.weight"] == [1.0] * 3
    assert values["unknown.scale"] == pytest.approx([float("nan")] * 3, nan_ok=True)
    assert values["partly.bias"] == [5.0] * 3
    assert all(abs(value) < 1 for value in values["partly.weight"])
    (record,) = records
    assert "no module initialises unknown.scale, unknown.count, which are NaN: load a checkpoint before use" in record
