"""Models modified by ModelOpt on two ranks: tensor parallelism, and every wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from modelopt_models import (
    SMALL,
    check_rebuilt,
    compute_logits,
    create_groups,
    make_config,
    quantise,
    rebuild,
    restore_error,
    save_file,
    save_ranks,
    save_shards,
    sparsify,
    train_two_steps,
)
from ranks import run_ranks

from bridge.dist.errors import PreflightError
from bridge.models.gpt import GPTModelBuilder

TORCH_FSDP2: dict[str, Any] = {"use_torch_fsdp2": True}
MEGATRON_FSDP: dict[str, Any] = {
    "use_megatron_fsdp": True,
    "ddp": {
        "use_megatron_fsdp": True,
        "use_distributed_optimizer": True,
        "data_parallel_sharding_strategy": "optim_grads_params",
        "gradient_reduce_div_fusion": False,
    },
}


def run_on_two_ranks(folder: Path) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}
    saved = {}
    layouts: dict[str, dict[str, int]] = {"dp": {}, "tp": {"tp": 2}}
    for name, sizes in layouts.items():
        config = make_config("tiny", SMALL | {"restore_modelopt_state": True}, sizes)
        groups = create_groups(config)
        model = GPTModelBuilder(config).build_model(groups)
        quantise(model)
        saved[name] = save_shards(model, folder / name)
        found[name] = check_rebuilt(model, config, groups, saved[name])
        if name == "tp":
            check_rebuilt(model, config, groups, save_ranks(model, folder / "ranks"))
            parts = [torch.empty(0) for _ in range(2)]
            torch.distributed.all_gather_object(parts, compute_logits(model, 5))
            found["tp, one file"] = restore_error(config, groups, save_file(model, folder))

    # Load the checkpoint of two tensor-parallel ranks into whole models.
    config = make_config("tiny", SMALL)
    groups = create_groups(config)
    _, stage = rebuild(config, groups, saved["tp"])
    torch.testing.assert_close(compute_logits(stage, 5), torch.cat(parts, dim=-1))
    for name, options in {"torch-fsdp2": TORCH_FSDP2, "megatron-fsdp": MEGATRON_FSDP}.items():
        found[name] = train_two_steps(*rebuild(config, groups, saved["dp"], **options), groups)

    model = GPTModelBuilder(config).build_model(groups)
    sparsify(model)
    checkpoint = save_shards(model, folder / "sparse")
    for name, options in {"ddp, sparse": {}, "torch-fsdp2, sparse": TORCH_FSDP2}.items():
        found[name] = train_two_steps(*rebuild(config, groups, checkpoint, **options), groups)
    with pytest.raises(PreflightError, match="Megatron-FSDP crashes"):
        rebuild(config, groups, checkpoint, **MEGATRON_FSDP)
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = run_ranks(run_on_two_ranks, 2, tmp_path_factory.mktemp("two"))
    assert first == second
    return first


def test_state_and_weights_are_restored_under_data_and_tensor_parallelism(two_ranks: dict[str, Any]) -> None:
    assert "the file of one rank, but 2 hold parts of the model" in two_ranks["tp, one file"]


@pytest.mark.parametrize("wrapper", ["torch-fsdp2", "megatron-fsdp"])
def test_a_quantised_model_trains_the_same_in_every_wrapper(two_ranks: dict[str, Any], wrapper: str) -> None:
    assert two_ranks[wrapper] == [pytest.approx(step, rel=1e-5) for step in two_ranks["dp"]]


def test_a_sparse_model_trains_the_same_with_torch_fsdp2(two_ranks: dict[str, Any]) -> None:
    expected = [pytest.approx(step, rel=1e-5) for step in two_ranks["ddp, sparse"]]
    assert two_ranks["torch-fsdp2, sparse"] == expected
