"""Training goes on from Megatron checkpoints, under any layout and wrapper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_runs import EXPERTS, Run, train
from environments import run_command
from ranks import run_ranks

from bridge.config import Document
from bridge.dist.run.origin import Origin, choose_origin


def resume(folder: Path, first: Run, second: Run) -> tuple[list[float], list[float]]:
    """Train four steps, and two steps twice with a checkpoint between them; return the losses of both."""
    ranks = 2
    whole = run_ranks(train, ranks, first._replace(steps=4))[0]
    before = run_ranks(train, ranks, first._replace(save=str(folder)))[0]
    after = run_ranks(train, ranks, second._replace(load=str(folder)))[0]
    return whole, before + after


SAME = {
    "ddp": Run({}, 2),
    "distributed optimizer": Run({}, 2, distributed_optimizer=True),
    "bf16": Run({"tp": 2}, 2, distributed_optimizer=True, settings={"bf16": True}),
    "experts": Run({"ep": 2}, 2, distributed_optimizer=True, settings=EXPERTS),
    "experts, ddp": Run({"ep": 2}, 2, settings=EXPERTS),
    "pp2 vp2": Run({"pp": 2, "vp": 2}, 2),
}


@pytest.mark.parametrize("case", SAME)
def test_two_and_two_steps_equal_four(case: str, tmp_path: Path) -> None:
    whole, halves = resume(tmp_path, SAME[case], SAME[case])
    assert halves == whole


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Run({"tp": 2}, 2), Run({"pp": 2, "vp": 2}, 2)),
        (Run({"pp": 2}, 2, distributed_optimizer=True), Run({"tp": 2}, 2, distributed_optimizer=True)),
    ],
)
def test_training_goes_on_under_another_layout(first: Run, second: Run, tmp_path: Path) -> None:
    whole, halves = resume(tmp_path, first, second)
    assert halves == pytest.approx(whole, rel=1e-5)


BF16 = {"bf16": True}
PLAIN, DISTRIBUTED = {"wrapper": "ddp"}, {"distributed_optimizer": True}
MEGATRON_FSDP, TORCH_FSDP2 = {"wrapper": "megatron-fsdp"}, {"wrapper": "torch-fsdp2"}
GATED_EXPERTS = EXPERTS | {"gated_linear_unit": True}
CHAINS: dict[str, tuple[list[Run], float]] = {
    "fp32": ([Run({}, 1, **kind) for kind in (PLAIN, DISTRIBUTED, MEGATRON_FSDP, TORCH_FSDP2, PLAIN)], 0),
    "bf16": ([Run({}, 1, settings=BF16, **kind) for kind in (PLAIN, DISTRIBUTED, PLAIN)], 0),
    "bf16, fsdp": ([Run({}, 1, settings=BF16, **kind) for kind in (TORCH_FSDP2, MEGATRON_FSDP, TORCH_FSDP2)], 0),
    "other layouts": (
        [
            Run({"tp": 2, "etp": 1}, 1, settings=GATED_EXPERTS, **MEGATRON_FSDP),
            Run({"pp": 2}, 1, settings=GATED_EXPERTS, **TORCH_FSDP2),
            Run({"etp": 2}, 1, settings=GATED_EXPERTS, **DISTRIBUTED),
            Run({"ep": 2}, 1, settings=GATED_EXPERTS, **MEGATRON_FSDP),
        ],
        1e-5,
    ),
}


def train_chain(runs: list[Run], folder: Path) -> tuple[list[float], list[float]]:
    """Train as the first run does without a stop, and by runs that each go on from the one before."""
    whole = train(runs[0]._replace(steps=len(runs)))
    losses = []
    for number, run in enumerate(runs):
        losses += train(run._replace(load=str(folder) if number else None, save=str(folder)))
    return whole, losses


@pytest.mark.parametrize("case", CHAINS)
def test_every_wrapper_and_optimizer_goes_on_from_every_other(case: str, tmp_path: Path) -> None:
    runs, tolerance = CHAINS[case]
    whole, losses = run_ranks(train_chain, 4 if tolerance else 2, runs, tmp_path)[0]
    assert losses == (pytest.approx(whole, rel=tolerance) if tolerance else whole)


def test_files_of_a_checkpoint(saved_checkpoint: Path) -> None:
    assert sorted(file.name for file in saved_checkpoint.iterdir()) == [
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
    ]
    assert (saved_checkpoint / "latest_checkpointed_iteration.txt").read_text() == "1"
    iteration = saved_checkpoint / "iter_0000001"
    files = sorted(file.name for file in iteration.iterdir())
    assert files == [".metadata", "__0_0.distcp", "bridge.yaml", "metadata.json", "run_config.yaml"]
    for name in ("bridge.yaml", "run_config.yaml"):
        document = Document.load(iteration / name)
        document.migrate()
        assert document.config().as_dict()["transformer"]["hidden_size"] == 32
    held = yaml.safe_load((iteration / "run_config.yaml").read_text())["checkpoint"]  # Megatron Bridge reads these
    assert held == {"save_optim": True, "save_rng": True, "fully_parallel_save": True}


def test_the_command_saves_and_goes_on(tmp_path: Path) -> None:
    """The steps, the data and the random states go on; a checkpoint is loaded without training too."""

    def build(*arguments: str) -> dict[str, Any]:
        code, out, err = run_command("build", "tiny", "--global-batch-size", "4", *arguments, "--json")
        assert code == 0, err
        report: dict[str, Any] = json.loads(out)
        return report

    folder = tmp_path / "run"
    run = str(folder)
    whole = build("--steps", "3")["losses"]
    halves = build("--steps", "2", "--save", run)["losses"]
    (folder / "iter_0000002" / "tokenizer").mkdir()
    (folder / "iter_0000002" / "tokenizer" / "vocab.txt").write_text("a")
    resumed = build("--steps", "1", "--load", run, "--save", run)
    assert halves + resumed["losses"] == whole
    assert (resumed["iteration"], resumed["saved"]) == (3, run)
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert (folder / "iter_0000003" / "tokenizer" / "vocab.txt").read_text() == "a"
    untrained = build("--load", run, "--save", run, "--force")
    assert (untrained["losses"], untrained["iteration"]) == ([], 3)
    names = ["iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt"]
    assert sorted(file.name for file in folder.iterdir()) == names


def test_a_checkpoint_is_the_file_of_a_command(saved_checkpoint: Path) -> None:
    for folder in (saved_checkpoint, saved_checkpoint / "iter_0000001"):
        code, out, err = run_command("show", str(folder))
        assert code == 0, err
        assert "hidden_size: 32" in out
    code, out, err = run_command("build", str(saved_checkpoint), "--steps", "1", "--global-batch-size", "4", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["weights"] == str(saved_checkpoint)
    assert report["losses"] == run_ranks(train, 1, Run({}, 2))[0][1:]
    assert run_command("build", str(saved_checkpoint), "--random-init", "--json")[0] == 0


def load_progress(folder: Path) -> tuple[int, int]:
    """Return the steps and samples of a checkpoint."""
    from bridge.dist.checkpoint.folder import find_iteration
    from bridge.dist.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint(find_iteration(folder))
    return checkpoint.step, checkpoint.samples


def test_verify_goes_on_from_a_checkpoint_under_every_layout(saved_checkpoint: Path, tmp_path: Path) -> None:
    """Its data go on where those of the checkpoint stopped."""
    document = tmp_path / "model.yaml"
    shutil.copy(saved_checkpoint / "iter_0000001" / "bridge.yaml", document)
    options = ("--nproc", "2", "--steps", "1", "--global-batch-size", "4", "--json", "--load", str(saved_checkpoint))
    cells = ("--only", "tp2 with ddp,pp2 with torch-fsdp2")
    code, out, err = run_command("verify", str(document), *options, *cells, "--save", str(tmp_path / "run"))
    assert code == 0, err
    assert f"{tmp_path / 'run'}: written" in err
    assert {row["verdict"] for row in json.loads(out)} == {"equal"}
    assert load_progress(tmp_path / "run") == (2, 8)
    assert choose_origin(Document.load(str(saved_checkpoint)), None, random_init=False) == Origin(
        checkpoint=saved_checkpoint
    )
    assert choose_origin(Document.load(str(saved_checkpoint)), None, random_init=True) == Origin()
