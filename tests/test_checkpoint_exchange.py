"""megatron.training loads the checkpoints that Bridge saves, and Bridge those that megatron.training saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_runs import EXPERTS, Run, build, set_megatron_arguments
from ranks import run_ranks


def collect_tensors(stages: list[Any], optimizer: Any = None) -> list[Any]:
    """Return copies of the tensors of stages, or of an optimizer with its main parameters."""
    import torch

    if optimizer is None:
        return [tensor.detach().clone() for stage in stages for tensor in stage.parameters()]
    found = []
    for one in optimizer.chained_optimizers:
        for group in one.optimizer.param_groups:
            for parameter in group["params"]:
                found += [parameter.detach().clone(), *one.optimizer.state[parameter].values()]
    return [torch.as_tensor(tensor).clone() for tensor in found]


def exchange(run: Run, folder: str) -> tuple[int, int, int, bool, list[str]]:
    """Save, load and save again by megatron.training, and load.

    Returns:
        The iteration that megatron.training loads, the step and samples that we load, whether all tensors are still the
        same, and the keys that are only in one of both checkpoints.
    """
    import torch
    from megatron.training import checkpointing

    from bridge.dist.checkpoint.load import load_checkpoint
    from bridge.dist.checkpoint.pickles import read_metadata
    from bridge.dist.engine.groups import destroy_process_groups
    from bridge.dist.train.optimizer import set_up_optimizer

    ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
    stages, _, _ = build(run._replace(save=str(ours)))
    trained = collect_tensors(stages)
    destroy_process_groups()
    stages, groups, _ = build(run._replace(steps=0))
    with set_up_optimizer(stages) as optimizer:
        set_megatron_arguments(run, ours)
        iteration, _ = checkpointing.load_checkpoint(stages, optimizer, None)
        loaded, states = collect_tensors(stages), collect_tensors(stages, optimizer)
        set_megatron_arguments(run, theirs)
        checkpointing.save_checkpoint(7, stages, optimizer, None, 0)
    for tensor in (tensor for stage in stages for tensor in stage.parameters()):
        tensor.data.zero_()
    with set_up_optimizer(stages) as optimizer:
        progress = load_checkpoint(stages, theirs, groups, optimizer=optimizer)
        again, states_again = collect_tensors(stages), collect_tensors(stages, optimizer)
    destroy_process_groups()
    pairs = [(loaded, trained), (again, trained), (states_again, states)]
    same = all(len(mine) == len(other) and all(map(torch.equal, mine, other)) for mine, other in pairs)
    keys = [set(read_metadata(one).state_dict_metadata) for one in (ours / "iter_0000001", theirs / "iter_0000007")]
    return iteration, progress.step, progress.samples, same, sorted(keys[0] ^ keys[1])


EXCHANGED = {
    "tp2": Run({"tp": 2}, 1),
    "pp2": Run({"pp": 2}, 1, settings={"bf16": True}),
    "pp2 vp2": Run({"pp": 2, "vp": 2}, 1),
    "ep2": Run({"ep": 2}, 1, settings=EXPERTS),
}


@pytest.mark.parametrize("case", EXCHANGED)
def test_megatron_training_loads_what_we_save_and_we_load_what_it_saves(case: str, tmp_path: Path) -> None:
    for iteration, step, samples, same, keys in run_ranks(exchange, 2, EXCHANGED[case], str(tmp_path)):
        assert (iteration, step, samples) == (1, 7, 28)
        assert same
        assert not keys
