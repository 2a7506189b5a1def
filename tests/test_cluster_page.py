"""The scripts in docs/cluster.md and docs/training.md run unchanged on two simulated nodes of one machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sysconfig
from pathlib import Path

import numpy
import pytest

SCRIPTS = Path(sysconfig.get_path("scripts"))
DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "cluster.md").read_text()
PROGRAMS = DOCS / "programs"
TORCHRUN, SLURM = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
JOB = ("tiny", "--tp", "2", "--steps", "2", "--seq-length", "16", "--json")

# Replaces srun: starts a task for each node, with Slurm's variables.
SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 "$@" &
done
wait -n && wait -n
"""
SCONTROL = """\
#!/bin/sh
[ "$*" = "show hostnames node[1-2]" ] && echo localhost && echo node2
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {"torchrun.sh": TORCHRUN, "job.sbatch": SLURM, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(folder: Path, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PATH": f"{folder}:{SCRIPTS}:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        [folder / script, *arguments],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_report(*nodes: subprocess.Popen[str]) -> dict[str, object]:
    """Return the report, which only rank 0 prints."""
    written = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), written
    report: dict[str, object] = json.loads("".join(output for output, _ in written))
    return report


def test_the_torchrun_script_trains_on_two_nodes(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "GPUS_PER_NODE": "1"}
    report = read_report(*(start(folder, "torchrun.sh", *JOB, **meeting, NODE_RANK=str(node)) for node in range(2)))
    assert report["world_size"] == 2


def test_an_error_on_all_ranks_is_reported_once_and_recorded(folder: Path) -> None:
    """Two ranks of one agent; the layout needs four."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "GPUS_PER_NODE": "2", "NNODES": "1", "NODE_RANK": "0"}
    recorded = folder / "error.json"
    process = start(folder, "torchrun.sh", "tiny", "--tp", "4", **meeting, TORCHELASTIC_ERROR_FILE=str(recorded))
    _, written = process.communicate(timeout=300)
    assert process.returncode == 1
    assert len(re.findall("^2 ranks do not fit tp x pp x cp = 4", written, re.MULTILINE)) == 1, written
    assert "2 ranks do not fit" in recorded.read_text()


def make_slurm_variables() -> dict[str, str]:
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}
    return job | {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


def test_the_slurm_script_trains_on_two_nodes(folder: Path) -> None:
    report = read_report(start(folder, "job.sbatch", *JOB, **make_slurm_variables()))
    assert report["layout"] == {"tp": 2, "pp": 1, "vp": 1, "cp": 1, "ep": 1, "etp": 2, "dp": 1}


def read_losses(process: subprocess.Popen[str]) -> dict[int, float]:
    """Return the loss of each step that the training script printed, and check that it printed no warning."""
    written, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "Warning" not in errors
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+): loss (\S+),", written, re.MULTILINE)}


def test_the_training_script_goes_on_under_another_layout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that torchrun started and that was cut off after step 3 goes on under Slurm."""
    for name in ("train.py", "train.sbatch"):
        shutil.copy(PROGRAMS / name, folder)
    (folder / "train.sbatch").chmod(0o755)
    numpy.save(folder / "tokens.npy", numpy.fromfile(DOCS.parent / "LICENSE", numpy.uint8))
    monkeypatch.chdir(folder)
    torchrun = folder / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec "{SCRIPTS / "torchrun"}" --nproc-per-node 2 "$@"\n')
    torchrun.chmod(0o755)
    training = ("tiny", "tokens.npy", "run", "--steps", "6", "--save-every", "3", "--global-batch-size", "4")
    whole = read_losses(start(folder, "torchrun", "train.py", *training, "--tp", "2"))
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(folder / "run" / "iter_0000006")
    (folder / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = read_losses(start(folder, "train.sbatch", *training, "--pp", "2", **make_slurm_variables()))
    assert resumed == pytest.approx({step: whole[step] for step in (4, 5, 6)}, abs=2e-5)
