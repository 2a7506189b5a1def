"""Each rank chooses its device; tests that need GPUs patch the driver files and torch's device count."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import rank_functions
import torch
import torch.distributed

from bridge.dist.errors import LaunchError
from bridge.dist.run import devices, world
from bridge.dist.run.devices import Device, choose_device, choose_gpu, count_gpus, hide_gpus
from bridge.dist.run.pool import launch
from bridge.dist.run.rank_environment import RankEnvironment
from bridge.dist.run.start import prepare


def make_rank(number: int, world_size: int = 4, local_rank: int | None = None) -> RankEnvironment:
    return RankEnvironment(rank=number, world_size=world_size, address="localhost", port=1, local_rank=local_rank)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretend that the machine has two GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_DRIVER_FILES", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "can_use_gpus", lambda: True)
    return monkeypatch


def test_without_a_driver_the_cpu_is_chosen() -> None:
    assert count_gpus() == 0
    assert choose_device(Device.AUTO, local_ranks=1) is Device.CPU


def test_auto_chooses_gpus_if_each_rank_gets_one(gpus: pytest.MonkeyPatch) -> None:
    assert choose_device(Device.AUTO, local_ranks=2) is Device.CUDA
    assert choose_device(Device.AUTO, local_ranks=3) is Device.CPU
    assert choose_device(Device.AUTO, local_ranks=None) is Device.CUDA
    assert choose_device(Device.CPU, local_ranks=1) is Device.CPU


def test_ranks_on_gpus_are_spawned_and_others_forked(gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # restored after the test
    gpus.setenv("OMP_NUM_THREADS", "")  # restored after the test
    del os.environ["OMP_NUM_THREADS"]
    start_method = prepare(Device.AUTO, None, ranks=2)
    assert int(os.environ["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)
    assert launch(rank_functions.is_cuda_usable_after_imports, ranks=1, start_method=start_method)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert prepare(Device.AUTO, None, ranks=3) == "forkserver"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_ranks_that_would_share_the_only_gpu_use_the_cpu(gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("CUDA_VISIBLE_DEVICES", "0")  # restored after the test
    gpus.setattr(torch.cuda, "device_count", lambda: 1)
    assert prepare(Device.AUTO, None, ranks=2) == "forkserver"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_cuda_with_too_few_gpus_is_an_error(gpus: pytest.MonkeyPatch) -> None:
    assert choose_device(Device.CUDA, local_ranks=2) is Device.CUDA
    with pytest.raises(LaunchError, match=r"3 rank\(s\), 2 visible GPU\(s\); start fewer ranks, or choose"):
        choose_device(Device.CUDA, local_ranks=3)
    gpus.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(LaunchError, match=r"1 rank\(s\), 0 visible GPU\(s\)"):
        choose_device(Device.CUDA, local_ranks=1)


def test_gpus_that_torch_cannot_use_are_not_chosen(
    gpus: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver counts its GPUs even if it is older than torch's CUDA. Here torch really finds none."""
    gpus.undo()
    gpus.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # restored after the test
    gpus.setattr(devices, "_DRIVER_FILES", ("/dev/null",))
    gpus.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError, match="--device cuda: there is a driver, but torch can use no GPU"):
        prepare(Device.CUDA, None, ranks=2)
    assert prepare(Device.AUTO, None, ranks=2) == "forkserver"
    assert "but torch can use no GPU" in capsys.readouterr().err


def test_hidden_gpus_are_not_counted(gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("CUDA_VISIBLE_DEVICES", "0")  # restored after the test
    hide_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert count_gpus() == 0


def test_a_rank_that_sees_one_gpu_uses_it(gpus: pytest.MonkeyPatch) -> None:
    shown = {"CUDA_VISIBLE_DEVICES": "3"}
    gpus.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device(Device.AUTO, local_ranks=8, environment=shown) is Device.CUDA
    assert choose_gpu(make_rank(3, local_rank=3), gpus=1, environment=shown) == 0
    assert choose_device(Device.AUTO, local_ranks=8, environment={}) is Device.CPU


SECOND_OF_TWO = """
from bridge.dist.run import devices
devices.count_gpus = lambda: 1
devices.can_use_gpus = lambda: True
print(devices.choose_device(devices.Device.AUTO, local_ranks=2))
"""


@pytest.mark.parametrize(
    ("before", "device"), [("", "cpu"), ("CUDA_VISIBLE_DEVICES=1", "cuda")], ids=["of torchrun", "of a script"]
)
def test_a_gpu_that_torchrun_shows_to_all_its_ranks_is_of_none(before: str, device: str) -> None:
    launcher = [f"{before} {sys.executable} -c '{SECOND_OF_TWO}'; exit $?"]  # a shell that stays, as torchrun does
    shown = {"CUDA_VISIBLE_DEVICES": "0", "TORCHELASTIC_RUN_ID": "none"}
    ran = subprocess.run(["sh", "-c", *launcher], capture_output=True, text=True, check=True, env=os.environ | shown)
    assert ran.stdout.strip() == device


def test_a_rank_that_sees_all_gpus_uses_its_local_rank() -> None:
    assert choose_gpu(make_rank(5, 8, local_rank=1), gpus=4, environment={}) == 1
    assert choose_gpu(make_rank(0, 1), gpus=4, environment={}) == 0


@pytest.mark.parametrize(
    ("place", "count", "message"),
    [
        (
            make_rank(3, local_rank=3),
            2,
            "rank 3 is number 3 on its node, where 2 GPU\\(s\\) are visible: start one rank for",
        ),
        (make_rank(1, local_rank=1), 1, "rank 1 is number 1 on its node, where 1 GPU"),
        (make_rank(1), 4, "LOCAL_RANK is not set and rank 1 sees 4 GPU"),
    ],
)
def test_a_rank_without_its_own_gpu_is_an_error(place: RankEnvironment, count: int, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        choose_gpu(place, gpus=count, environment={})


class _Properties:
    uuid = "GPU-1"


def test_two_ranks_on_one_gpu_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that a launcher gave the same GPU claim it differently, which the comparison of ranks then reports."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: _Properties)
    store = torch.distributed.HashStore()
    assert [world._claim_gpu(0, make_rank(number), store) for number in (1, 0, 2)] == [
        "its own",
        "that of rank 1",
        "that of rank 1",
    ]
    assert world._claim_gpu(0, make_rank(1), store) == "its own"


def test_tf32_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")  # restored after the test
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    devices.forbid_tf32()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
