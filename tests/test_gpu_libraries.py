"""Libraries that need a GPU are treated as missing where no GPU is visible, for example on a login node."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARIES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "mamba_ssm", "causal_conv1d")
# Transformer Engine raises this without a driver (its issue 3381); Megatron catches only ImportError.
STAND_IN = 'raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")\n'
PRESETS = ("tiny", "mla-tiny", "moe-tiny", "hybrid-tiny", "t5-tiny")

TRAIN = """\
import sys

from bridge.dist.process.imports import import_megatron
import_megatron(with_compiler=False)  # like the commands

import torch

from bridge.config import Document, ModelConfig
from bridge.dist import create_process_groups, destroy_process_groups
from bridge.dist.cpu import install
from bridge.dist.job import BuildJob
from bridge.dist.run.execute import build_and_train
from bridge.dist.train.step import TrainOptions
from bridge.dist.train.text import find_default_text
from bridge.dist.wrapper import Wrapper

install()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
training = TrainOptions(steps=1, text=find_default_text(), seq_length=16, global_batch_size=1)
for preset in sys.argv[1:]:
    job = BuildJob(document=Document.load(preset).data, wrapper=Wrapper.DDP, training=training)
    config = ModelConfig.from_dict(job.document)
    layout = job.check(config, 1)
    run = build_and_train(job, config, layout, create_process_groups(layout))
    print(preset, run.steps[0].loss)
    destroy_process_groups()
"""

TOO_LATE = """\
import transformer_engine

from bridge.dist.cpu import CpuRuntimeError, install

try:
    install()
except CpuRuntimeError as error:
    print(error)
"""


def run_with(stand_in: str, folder: Path, script: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a separate process, with stand-ins for the libraries on its path."""
    for name in LIBRARIES:
        (folder / f"{name}.py").write_text(stand_in)
    environment = os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_every_family_trains_with_pytorch_layers(tmp_path: Path) -> None:
    done = run_with(STAND_IN, tmp_path, TRAIN, *PRESETS)
    assert done.returncode == 0, done.stderr
    losses = dict(line.split() for line in done.stdout.splitlines() if line.startswith(PRESETS))
    assert list(losses) == list(PRESETS)
    assert [float(loss) for loss in losses.values()] == [pytest.approx(6, abs=1)] * len(PRESETS)
    for line in (
        "Transformer Engine is installed but no GPU is visible: building layers in PyTorch",
        "mamba-ssm and causal-conv1d are installed but no GPU is visible: computing Mamba layers in PyTorch",
    ):
        assert done.stderr.count(line) == 1


def test_a_library_that_is_already_imported_is_an_error(tmp_path: Path) -> None:
    done = run_with("", tmp_path, TOO_LATE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "transformer_engine cannot compute on the CPU, but is already imported and Megatron would use it: "
        "install the CPU runtime before importing megatron-core\n"
    )
