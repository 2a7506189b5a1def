"""The CPU runtime on real ranks: meshes, collectives and training by megatron-core."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.autograd.graph
from ranks import run_ranks
from torch.distributed import device_mesh

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runtime refuses beside a real GPU")


def _distribute() -> tuple[list[str], tuple[int, ...], float]:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = device_mesh.init_device_mesh("cuda", (2,))
    same = device_mesh.DeviceMesh.from_group(mesh.get_group(), "cuda")
    sharded = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    dropped: Any = torch.nn.functional.dropout(sharded.cuda(), 0.5)  # torch has no generator for a mesh of missing GPUs
    return [mesh.device_type, same.device_type], tuple(dropped.to_local().shape), sharded.full_tensor().sum().item()


def test_a_mesh_of_cuda_devices_uses_cpus() -> None:
    assert run_ranks(_distribute, 2) == [(["cpu", "cpu"], (2, 3), 12.0)] * 2


VOCABULARY, LENGTH, BATCH, STEPS = 64, 8, 8, 3


@dataclass(frozen=True, kw_only=True)
class _Case:
    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1
    experts: int | None = None
    wrapper: str = "ddp"
    distributed_optimizer: bool = False
    overlap: bool = False
    fused: bool = False
    bf16: bool = False
    dropout: float = 0.0
    recompute: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


def _train(case: _Case) -> list[tuple[float, float]]:
    """Train with megatron-core's model, wrapper, schedule and optimizer; return loss and gradient norm of each step."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        FullyShardedDataParallel,
        TorchFullyShardedDataParallel,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module, MegatronModule

    from bridge.dist import Layout, create_process_groups
    from bridge.dist.engine.weights import draw_weights

    groups = create_process_groups(Layout(tp=case.tp, pp=case.pp, ep=case.ep, dp=case.dp))
    model_parallel_cuda_manual_seed(1)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    config = TransformerConfig(
        transformer_impl="local",
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        expert_model_parallel_size=case.ep,
        num_moe_experts=case.experts,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=case.experts is None,
        hidden_dropout=case.dropout,
        attention_dropout=case.dropout,
        recompute_granularity="full" if case.recompute else None,
        recompute_method="uniform" if case.recompute else None,
        recompute_num_layers=1 if case.recompute else None,
        bias_activation_fusion=case.fused,
        bias_dropout_fusion=case.fused,
        gradient_accumulation_fusion=False,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=case.bf16,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=case.experts),
        VOCABULARY,
        LENGTH,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == case.pp - 1,
        pg_collection=groups,
    ).cuda(torch.cuda.current_device())
    draw_weights([model], groups, vocab_size=VOCABULARY)
    stage: Any = Float16Module(config, model) if case.bf16 else model
    distributed_optimizer = case.distributed_optimizer or case.wrapper == "megatron-fsdp"
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=case.overlap,
        overlap_param_gather=case.overlap,
        use_megatron_fsdp=case.wrapper == "megatron-fsdp",
        data_parallel_sharding_strategy="optim_grads_params" if case.wrapper == "megatron-fsdp" else "no_shard",
        gradient_reduce_div_fusion=case.wrapper != "megatron-fsdp",  # gloo cannot scale in a reduction
        check_for_nan_in_grad=True,
    )
    wrappers: dict[str, Callable[..., MegatronModule]] = {
        "ddp": DistributedDataParallel,
        "megatron-fsdp": FullyShardedDataParallel,
        "torch-fsdp2": TorchFullyShardedDataParallel,
    }
    stage = wrappers[case.wrapper](config, ddp, stage)
    config.finalize_model_grads_func = finalize_model_grads
    if case.overlap:
        config.no_sync_func = stage.no_sync
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-2,
            min_lr=1e-2,
            bf16=case.bf16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed_optimizer,
            overlap_param_gather=case.overlap,
        ),
        [stage],
    )
    causal = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device="cuda").triu(1)
    positions = torch.arange(LENGTH, device="cuda")[None]

    def forward(batches: Iterator[torch.Tensor], stage: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., object]]:
        tokens = next(batches).cuda(non_blocking=True)
        losses = stage(tokens[:, :-1], positions, causal, labels=tokens[:, 1:].contiguous())

        def reduce(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            mean = losses.float().mean()
            return mean, {"loss": mean.detach().clone()}

        return losses, reduce

    history = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        mine = tokens.chunk(case.dp)[groups.dp.rank()].split(2)
        stage.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(mine),
            model=[stage],
            num_microbatches=len(mine),
            seq_length=LENGTH,
            micro_batch_size=2,
            forward_only=False,
        )
        stepped, norm, _ = optimizer.step()
        assert stepped
        loss = torch.stack([report["loss"] for report in reports]).mean() if reports else torch.zeros(())
        torch.distributed.all_reduce(loss, group=groups.dp)
        history.append((loss.item() / case.dp, float(norm)))
    return history


DENSE = _Case()
SPARSE = _Case(experts=4)
HALF = _Case(bf16=True)


@functools.cache
def _train_alone(case: _Case) -> list[tuple[float, float]]:
    return run_ranks(_train, 1, case)[0]


@pytest.mark.parametrize(
    ("case", "alone"),
    [
        pytest.param(_Case(tp=2), DENSE, id="tensor parallel"),
        pytest.param(_Case(pp=2), DENSE, id="pipeline"),
        pytest.param(_Case(tp=2, pp=2), DENSE, id="tensor parallel, pipeline"),
        pytest.param(_Case(dp=2), DENSE, id="ddp"),
        pytest.param(_Case(dp=2, distributed_optimizer=True), DENSE, id="distributed optimizer"),
        pytest.param(_Case(dp=2, distributed_optimizer=True, overlap=True), DENSE, id="overlap"),
        pytest.param(_Case(dp=2, wrapper="torch-fsdp2"), DENSE, id="fsdp2"),
        pytest.param(_Case(dp=2, wrapper="megatron-fsdp"), DENSE, id="megatron-fsdp"),
        pytest.param(_Case(recompute=True), DENSE, id="recomputation"),
        pytest.param(replace(SPARSE, dp=2, ep=2), SPARSE, id="experts, all-to-all"),
    ],
)
def test_a_layout_trains_like_one_process(case: _Case, alone: _Case) -> None:
    if case.wrapper == "megatron-fsdp":
        pytest.importorskip("einops", reason="Megatron-FSDP imports einops, which megatron-core does not depend on")
    expected = _train_alone(alone)
    last = run_ranks(_train, case.world_size, case)[-1]
    assert last == [pytest.approx(values, rel=1e-5) for values in expected]


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_bf16_trains_the_same_on_two_ranks(distributed_optimizer: bool) -> None:
    expected = _train_alone(HALF)
    case = replace(HALF, dp=2, distributed_optimizer=distributed_optimizer)
    assert run_ranks(_train, 2, case)[-1] == [pytest.approx(values, rel=1e-2) for values in expected]


def test_fused_functions_compute_the_same() -> None:
    """The fused GELU is the tanh approximation, which differs from the exact one by about 1e-5."""
    expected = _train_alone(DENSE)
    assert run_ranks(_train, 1, _Case(fused=True))[0] == [pytest.approx(values, rel=1e-3) for values in expected]


def test_dropout_is_repeated_by_recomputation() -> None:
    expected = run_ranks(_train, 1, _Case(dropout=0.1))[0]
    assert run_ranks(_train, 1, _Case(dropout=0.1, recompute=True))[0] == [pytest.approx(v, rel=1e-5) for v in expected]


def start_collectives() -> list[float]:
    """Start asynchronous collectives on two ranks; return what they have written before they are awaited."""
    import torch
    from torch import distributed

    rank = distributed.get_rank()
    mine = torch.full((1_000_000,), 1.0 + rank)
    gathered, scattered, exchanged = torch.zeros(2_000_000), torch.zeros(500_000), torch.zeros(1_000_000)
    works = [
        distributed.all_gather_into_tensor(gathered, mine, async_op=True),
        distributed.reduce_scatter_tensor(scattered, mine, async_op=True),
        distributed.all_to_all_single(exchanged, mine, async_op=True),
        distributed.all_reduce(mine, async_op=True),
    ]
    means = [tensor.mean().item() for tensor in (gathered, scattered, exchanged, mine)]
    for work in works:
        work.wait()
    return means


def test_a_collective_is_complete_when_it_returns() -> None:
    # Megatron may free a buffer after the call, as streams allow on a GPU; ranks crash if gloo still writes to it.
    assert run_ranks(start_collectives, 2) == [[1.5, 3.0, 1.5, 3.0]] * 2


def exchange_uneven_parts() -> tuple[list[float], list[float]]:
    """Gather one row of rank 0 and two rows of rank 1; reduce-scatter parts of the same sizes."""
    import torch
    from torch import distributed

    rank, sizes = distributed.get_rank(), [1, 2]
    whole = torch.zeros(3)
    distributed.all_gather(list(whole.split(sizes)), torch.full((sizes[rank],), 5.0 + rank))
    share = torch.empty(sizes[rank])
    distributed.reduce_scatter(share, list((torch.arange(3.0) + 10 * rank).split(sizes)))
    return whole.tolist(), share.tolist()


def test_parts_of_different_sizes_are_exchanged() -> None:
    # Expert-tensor parallelism needs this; gloo itself accepts only equal parts.
    assert run_ranks(exchange_uneven_parts, 2) == [([5.0, 6.0, 6.0], [10.0]), ([5.0, 6.0, 6.0], [12.0, 14.0])]


def gather_two_precisions(*, by_gloo: bool) -> tuple[list[float], list[float]]:
    """Gather two tensors of different precision in one coalesced operation on two ranks; return both."""
    import torch
    from torch import distributed
    from torch.distributed import distributed_c10d

    # The CPU runtime replaces the name in torch.distributed only, so this one still uses gloo itself.
    coalescing = distributed_c10d._coalescing_manager if by_gloo else distributed._coalescing_manager
    rank = distributed.get_rank()
    half, full = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(2)
    with coalescing(distributed.group.WORLD, async_ops=True) as gathering:
        distributed.all_gather_into_tensor(half, torch.full((2,), 1.0 + rank, dtype=torch.bfloat16))
        distributed.all_gather_into_tensor(full, torch.full((1,), 3.0 + rank))
    gathering.wait()
    return half.tolist(), full.tolist()


def gather_at_once() -> tuple[list[float], list[float]]:
    return gather_two_precisions(by_gloo=False)


def gather_by_gloo() -> tuple[list[float], list[float]]:
    return gather_two_precisions(by_gloo=True)


def test_tensors_of_different_precision_are_gathered_at_once() -> None:
    expected = ([1.0, 1.0, 2.0, 2.0], [3.0, 4.0])
    assert run_ranks(gather_at_once, 2) == [expected] * 2
    # If gloo can do this, `skip_coalescing` is no longer needed for it.
    assert run_ranks(gather_by_gloo, 2) != [expected] * 2
