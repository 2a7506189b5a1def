"""Building, training, saving and loading keep tensors of the CPU and of the GPU apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_runs import Run, build, make_job
from device_tracker import track_devices
from ranks import run_ranks

from bridge.config import ModelConfig
from bridge.dist import destroy_process_groups


def make_faults() -> list[str]:
    with track_devices() as tracker:
        on_gpu, on_cpu = torch.ones(2, device="cuda"), torch.ones(2)
        assert on_gpu.device.type == "cuda"
        on_gpu + on_gpu.to(on_gpu.device)
        on_cpu + (on_gpu * 2).cpu()
        on_cpu.numpy()
        torch.distributed.all_reduce(on_gpu)
        assert tracker.faults == []
        on_gpu + on_cpu
        on_gpu.add_(on_cpu.cuda().to("cpu"))
        (on_gpu * 2).numpy()
        torch.distributed.all_reduce(on_cpu)
    return [fault.partition(" at ")[0] for fault in tracker.faults]


def test_faults_are_noticed() -> None:
    assert run_ranks(make_faults, 1) == [
        [
            "aten::add of tensors on both devices",
            "aten::add_ of tensors on both devices",
            "numpy reads a tensor of the GPU",
            "c10d::allreduce_ of a CPU tensor",
        ]
    ]


def train_twice(run: Run, folder: str) -> tuple[list[float], set[str], list[str]]:
    """Train two steps and save, go on for two, save a folder of transformers and load it.

    Returns the losses, the devices of the parameters and the faults.
    """
    from bridge.models.huggingface import load_weights, save_weights

    with track_devices() as tracker:
        before = build(run._replace(save=f"{folder}/checkpoint"))[2]
        destroy_process_groups()
        stages, groups, after = build(run._replace(load=f"{folder}/checkpoint"))
        model = ModelConfig.from_dict(make_job(run).document)
        save_weights(stages, f"{folder}/folder", groups, model=model)
        load_weights(stages, f"{folder}/folder", groups)
        devices = {parameter.device.type for stage in stages for parameter in stage.parameters()}
    destroy_process_groups()
    return before + after, devices, tracker.faults


CASES = {
    "tp2": Run({"tp": 2}, 2, distributed_optimizer=True, settings={"sequence_parallel": True}),
    "pp2 vp2, bf16": Run({"pp": 2, "vp": 2}, 2, settings={"bf16": True}),
    "cp2": Run({"cp": 2}, 2),
    "dp2, bf16": Run({}, 2, distributed_optimizer=True, settings={"bf16": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_devices_are_not_mixed(case: str, tmp_path: Path) -> None:
    (tmp_path / "tracked").mkdir()
    for losses, devices, faults in run_ranks(train_twice, 2, CASES[case], str(tmp_path / "tracked")):
        assert faults == []
        assert devices == {"cuda"}
        assert losses[-1] < losses[0]
