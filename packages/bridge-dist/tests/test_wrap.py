"""Options of the wrappers on real ranks: training gives the same result as one process, or is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig, FullyShardedDataParallel, param_and_grad_buffer
from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.utils import unwrap_model
from ranks import run_ranks
from wrapped_gpt import (
    BF16,
    EXPERTS,
    OVERLAP,
    SHARDED,
    STRATEGIES,
    TP2,
    VOCAB,
    Built,
    Case,
    Run,
    assert_equal,
    build_case,
    fsdp,
    fsdp2,
    train_cases,
)

from bridge.dist import BuildOptions, Layout, create_process_groups, prepare_stages
from bridge.dist.engine.stages import unwrap
from bridge.dist.engine.wrap import data_parallel
from bridge.dist.errors import PreflightError


@pytest.fixture(scope="module")
def one_process() -> dict[str, Run]:
    """Return the results of one process."""
    cases = {
        "fp32": Case(),
        "bf16": Case(transformer=BF16, ddp={"grad_reduce_in_fp32": True}),
        "frozen embedding": Case(frozen="embedding"),
        "frozen part of a layer": Case(frozen="decoder.layers.0.self_attention"),
        "frozen layer": Case(frozen="decoder.layers.0"),
        "frozen": Case(frozen=""),
    }
    return run_ranks(train_cases, 1, cases)[0]


# DDP

DDP = {
    "overlap": Case(ddp=OVERLAP),
    "buckets by number": Case(ddp={"overlap_grad_reduce": True, "num_buckets": 3}),
    "average": Case(ddp={"average_in_collective": True}),
    "checks of gradients": Case(ddp={"check_for_nan_in_grad": True, "check_for_large_grads": True}),
    "delayed weight gradients": Case(ddp={"delay_wgrad_compute": True}),
    "distributed optimizer": Case(ddp=SHARDED),
    "distributed optimizer, average": Case(ddp=SHARDED | {"average_in_collective": True}),
    "distributed optimizer, overlap, padded buckets": Case(
        ddp=SHARDED | OVERLAP | {"pad_buckets_for_high_nccl_busbw": True}
    ),
    "fp32 accumulation": Case(ddp=SHARDED | OVERLAP | {"reduce_scatter_with_fp32_accumulation": True}),
    # Must come after "fp32 accumulation", which leaves a function replaced in megatron-core.
    "all overlap": Case(ddp=SHARDED | OVERLAP | {"overlap_param_gather": True}),
    "all overlap, aligned": Case(ddp=SHARDED | OVERLAP | {"overlap_param_gather": True, "align_param_gather": True}),
    "all overlap, one bucket": Case(
        ddp=SHARDED | OVERLAP | {"overlap_param_gather": True}, flags={"overlap_param_gather_with_optimizer_step": True}
    ),
}


def test_options_of_ddp_do_not_change_the_training_result(one_process: dict[str, Run]) -> None:
    for runs in run_ranks(train_cases, 2, DDP):
        for run in runs.values():
            assert_equal(run, one_process["fp32"])


def is_function_restored() -> bool:
    with build_case(DDP["fp32 accumulation"]):
        return bool(param_and_grad_buffer.dist_reduce_scatter_func is torch.distributed.reduce_scatter_tensor)


def test_megatron_still_leaves_fp32_accumulation_behind() -> None:
    """When this fails, megatron-core has fixed it: remove the code in wrap/ddp.py that restores the function."""
    assert run_ranks(is_function_restored, 1) == [False]


def test_gradients_have_the_requested_precision(one_process: dict[str, Run]) -> None:
    cases = {
        "fp32": Case(transformer=BF16, ddp={"grad_reduce_in_fp32": True}),
        "fp32 accumulation": Case(transformer=BF16, ddp={"param_name_patterns_for_fp32_local_accumulation": ("all",)}),
        "fp16": Case(transformer={"fp16": True}, ddp={"grad_reduce_in_fp32": True}),
        "fsdp2, fp16": fsdp2(transformer={"fp16": True}),
    }
    for runs in run_ranks(train_cases, 2, cases):
        for run in runs.values():
            assert_equal(run, one_process["bf16"], rel=2**-10)


def test_several_optimizer_instances_train_the_same(one_process: dict[str, Run]) -> None:
    instances = {"num_distributed_optimizer_instances": 2}
    cases = {
        "ddp": Case(ddp=SHARDED | instances),
        "ddp, overlap, average": Case(
            ddp=SHARDED | OVERLAP | instances | {"overlap_param_gather": True, "average_in_collective": True}
        ),
        "megatron-fsdp, gradients sharded": fsdp("optim_grads", ddp=instances),
        "megatron-fsdp": fsdp(ddp=instances),
    }
    for runs in run_ranks(train_cases, 4, cases, 2):
        for run in runs.values():
            assert_equal(run, one_process["fp32"])


def test_optimizer_instances_without_groups_are_refused() -> None:
    with pytest.raises(PreflightError, match="num_distributed_optimizer_instances is 2, the process groups were made"):
        run_ranks(train_cases, 2, {"": Case(ddp=SHARDED | {"num_distributed_optimizer_instances": 2})})


def check_layer_wise_gradients() -> None:
    """Check that each matrix is on one rank only, and that its gradient is that of plain DDP."""
    expected = gradients(Case())
    flags = {"use_layer_wise_distributed_optimizer": True}
    whole = gradients(Case(ddp=OVERLAP, flags=flags | {"use_layer_wise_param_layout": False}))
    assert all(torch.allclose(whole[name], gradient, atol=1e-6) for name, gradient in expected.items())
    with build_case(Case(ddp=OVERLAP, flags=flags)) as made:
        backward(made)
        (stage,) = made.stages
        matrices = {
            name: parameter
            for name, parameter in stage.module.named_parameters()
            if parameter.dim() == 2 and "embedding" not in name and "output_layer" not in name
        }
        mine = set()
        for buffer in stage.buffers:
            for bucket in buffer.buckets:
                size = bucket.grad_data.numel() // made.groups.dp_cp.size()
                for name, parameter in matrices.items():
                    if parameter in bucket.params:
                        start, end, _ = buffer.param_index_map[parameter]
                        shards = (start - bucket.offset) // size, (end - 1 - bucket.offset) // size
                        assert shards[0] == shards[1], name
                        if shards[0] == made.groups.dp_cp.rank():
                            mine.add(name)
        assert mine
        for name in mine:
            assert torch.allclose(matrices[name].main_grad, expected[name], atol=1e-6), name
        everyone: list[Any] = [None, None]
        torch.distributed.all_gather_object(everyone, mine)
        assert sorted(everyone[0] | everyone[1]) == sorted(matrices)
        assert not everyone[0] & everyone[1]


def gradients(case: Case) -> dict[str, torch.Tensor]:
    with build_case(case) as made:
        backward(made)
        return {name: parameter.main_grad.clone() for name, parameter in made.stages[0].module.named_parameters()}


def backward(made: Built) -> None:
    (stage,) = made.stages
    tokens = torch.arange(16)[None] * 7 % VOCAB + made.groups.dp.rank()
    stage(tokens, torch.arange(16)[None], None, labels=tokens.flip(1)).mean().backward()
    stage.finish_grad_sync()


def test_the_layer_wise_layout_gives_the_gradients_of_plain_ddp() -> None:
    run_ranks(check_layer_wise_gradients, 2)


# The FSDP wrappers


def test_options_of_megatron_fsdp_do_not_change_the_training_result(one_process: dict[str, Run]) -> None:
    cases = {
        **{strategy: fsdp(strategy) for strategy in STRATEGIES},
        **{f"{strategy}, tp2": fsdp(strategy, transformer=TP2) for strategy in STRATEGIES},
        "overlap": fsdp(ddp=OVERLAP | {"overlap_param_gather": True}),
        "optim_grads, several buckets": fsdp("optim_grads", ddp=OVERLAP),
        "optim, overlap": fsdp("optim", ddp=OVERLAP | {"overlap_param_gather": True}),
        "fsdp2, tp2": fsdp2(transformer=TP2),
        "fsdp2, overlap": fsdp2(ddp=OVERLAP),
    }
    for runs in run_ranks(train_cases, 2, cases):
        for run in runs.values():
            assert_equal(run, one_process["fp32"])


class Plain(MegatronModule):
    """A stage without Megatron's layers."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.linear = torch.nn.Linear(8, 8)


def wrap_plain_model() -> int:
    config = Case().config.transformer
    groups = create_process_groups(Layout())
    ddp_config = DistributedDataParallelConfig(**fsdp().ddp)
    options = BuildOptions(ddp_config=ddp_config, use_megatron_fsdp=True)
    (stage,) = prepare_stages([Plain(config)], config, groups, options)
    assert ddp_config.suggested_communication_unit_size is None
    with pytest.raises(ZeroDivisionError):  # when this stops failing, wrap/megatron_fsdp.py need not set a size
        FullyShardedDataParallel(config=config, ddp_config=ddp_config, module=Plain(config), pg_collection=groups)
    return int(stage.ddp_config.suggested_communication_unit_size)


def test_megatron_still_unwraps_one_of_the_two_wrappers_of_megatron_fsdp() -> None:
    """When this fails, `bridge.dist.engine.stages.unwrap` is no longer needed."""
    adapter, wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel), MegatronFSDP.__new__(MegatronFSDP)
    for module in (adapter, wrapper):
        torch.nn.Module.__init__(module)
    adapter.module, wrapper.module = wrapper, torch.nn.Identity()
    assert unwrap_model(adapter) is wrapper
    assert unwrap(adapter) is wrapper.module


def test_megatron_fsdp_wraps_a_model_without_megatron_layers() -> None:
    assert run_ranks(wrap_plain_model, 1) == [1_000_000_000]


# Frozen parameters


@pytest.mark.parametrize("frozen", ["embedding", "decoder.layers.0.self_attention", "decoder.layers.0", ""])
def test_frozen_parameters_train_the_same_in_every_wrapper(frozen: str, one_process: dict[str, Run]) -> None:
    names = {
        "embedding": "frozen embedding",
        "decoder.layers.0": "frozen layer",
        "decoder.layers.0.self_attention": "frozen part of a layer",
        "": "frozen",
    }
    expected = one_process[names[frozen]]
    assert expected.losses[1:] != pytest.approx(one_process["fp32"].losses[1:], rel=1e-5)
    cases = {
        "ddp": Case(frozen=frozen),
        "distributed optimizer": Case(ddp=SHARDED, frozen=frozen),
        "fsdp2": fsdp2(frozen=frozen),
        **{strategy: fsdp(strategy, frozen=frozen) for strategy in STRATEGIES if strategy != "optim"},
    }
    for runs in run_ranks(train_cases, 2, cases):
        for run in runs.values():
            assert_equal(run, expected)


def test_frozen_parameters_with_only_a_sharded_optimizer_are_refused() -> None:
    with pytest.raises(PreflightError, match=r"fails with frozen parameters when data_parallel_sharding_strategy is"):
        run_ranks(train_cases, 2, {"": fsdp("optim", frozen="embedding")})


def train_frozen_unchecked() -> None:
    data_parallel.check_stages = lambda *_: None
    train_cases({"": fsdp("optim", frozen="embedding")})


def test_megatron_still_fails_with_frozen_parameters_and_only_a_sharded_optimizer() -> None:
    """When this fails, megatron-core has fixed it: remove the pre-flight rule."""
    with pytest.raises(AttributeError, match="is_data_distributed"):
        run_ranks(train_frozen_unchecked, 2)


def test_fsdp2_refuses_tied_embeddings() -> None:
    with pytest.raises(PreflightError, match="torch FSDP2 fails with tied embeddings: untie them"):
        run_ranks(train_cases, 1, {"": fsdp2(tied=True)})


# Random initialisation


def test_random_init_copies_weights_of_the_first_rank_in_every_wrapper() -> None:
    drawn = {
        "ddp": Case(drawn=False),
        "fsdp2": fsdp2(drawn=False),
        **{strategy: fsdp(strategy, drawn=False) for strategy in STRATEGIES},
    }
    cases = {"expected": drawn["ddp"]} | {name: replace(case, seed_by_rank=True) for name, case in drawn.items()}
    cases |= {
        f"{name}, meta": replace(cases[name], transformer={"init_model_with_meta_device": True}) for name in drawn
    }
    for runs in run_ranks(train_cases, 2, cases):
        for run in runs.values():
            assert_equal(run, runs["expected"])


def expert_weights() -> dict[str, float]:
    with build_case(
        Case(transformer=EXPERTS | {"expert_model_parallel_size": 2}, drawn=False, seed_by_rank=True)
    ) as made:
        return {name: parameter.sum().item() for name, parameter in made.stages[0].named_parameters()}


def test_experts_are_equal_only_within_their_group() -> None:
    ranks = run_ranks(expert_weights, 4)
    experts = {name for name in ranks[0] if "local_experts" in name and "weight" in name}
    assert experts
    assert ranks[0] == ranks[2]
    assert ranks[1] == ranks[3]
    assert {name for name in ranks[0] if ranks[0][name] != ranks[1][name]} == experts
