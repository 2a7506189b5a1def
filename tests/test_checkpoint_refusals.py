"""Checkpoints that are refused: of another model, damaged or hostile; and saving that fails."""

from __future__ import annotations

import errno
import os
import pickle
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_runs import Run, build, train
from environments import run_command
from ranks import RankError, run_ranks
from tampering import COMMON_STATE, Payload, change_common, replace_object, rewrite_metadata, torch_save


def attempt(run: Run) -> str:
    """Return the error of a run."""
    from bridge.dist.engine.groups import destroy_process_groups
    from bridge.dist.errors import CheckpointError

    try:
        build(run)
    except CheckpointError as error:
        destroy_process_groups()
        return str(error)
    raise AssertionError("the run was not refused")


def test_mismatches_are_named_before_anything_is_loaded(saved_checkpoint: Path) -> None:
    """Missing, unexpected and misshapen tensors, on both ranks."""
    wider = Run(
        {}, 0, settings={"ffn_hidden_size": 64, "num_layers": 6, "qk_layernorm": True}, load=str(saved_checkpoint)
    )
    fewer = Run({}, 0, settings={"num_layers": 4, "add_bias_linear": False}, load=str(saved_checkpoint))
    first, second = run_ranks(attempt, 2, wider)
    assert first == second
    assert (
        "decoder.layers.mlp.linear_fc1.weight: the model has the shape [6, 64, 32], the checkpoint [4, 128, 32]"
        in first
    )
    assert "decoder.layers.self_attention.q_layernorm.weight: the checkpoint has no such tensor" in first
    (third,) = run_ranks(attempt, 1, fewer)
    assert "decoder.layers.mlp.linear_fc1.bias: the checkpoint has this tensor, but the model has not" in third


def test_an_iteration_is_not_overwritten(saved_checkpoint: Path) -> None:
    (error,) = run_ranks(attempt, 1, Run({}, 1, save=str(saved_checkpoint)))
    assert error == f"{saved_checkpoint / 'iter_0000001'} exists: save to another folder, or replace it with --force"


def save_on_a_small_disk(run: Run) -> str:
    from bridge.dist.patch import Replacement, replace_attributes

    with replace_attributes(Replacement(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))):
        return attempt(run)


def save_on_full_disks(run: Run) -> list[str]:
    """Return the errors of runs whose disk has no space for the tensors of the second rank, or for the metadata.

    The first of them has a real limit, that of the size of files.
    """
    import torch
    from torch.distributed.checkpoint import FileSystemWriter

    from bridge.dist.patch import Replacement, replace_attributes

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    is_second = torch.distributed.get_rank() == 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if is_second else limits[0], limits[1]))  # bytes
    errors = [attempt(run)]
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for owner, name, fails in ((os, "fsync", is_second), (FileSystemWriter, "finish", not is_second)):
        with replace_attributes(*[Replacement(owner, name, fail)] * fails):
            errors.append(attempt(run))
    return errors


def test_a_disk_that_is_too_small_is_refused_first(tmp_path: Path) -> None:
    (error,) = run_ranks(save_on_a_small_disk, 1, Run({}, 1, save=str(tmp_path)))
    needed = re.fullmatch(
        r".*iter_0000001\.partial needs 0\.(\d{3}) MB, but the disk has 0\.000 MB left: free .*", error
    )
    assert needed is not None, error
    assert int(needed[1]) > 100


def test_a_rank_that_cannot_write_ends_all_with_its_reason_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(save_on_full_disks, 2, Run({"tp": 2}, 1, save=str(tmp_path)))
    assert first == second
    partial = tmp_path / "iter_0000001.partial"
    too_large, *no_space = first
    assert too_large == f"{partial}: cannot be written: File too large"
    for error in no_space:
        assert error.startswith(f"{partial}: cannot be written: No space left on device: the tensors have ")
        assert error.endswith("B were free before: free some space on this disk, or write to another folder")
    assert list(tmp_path.iterdir()) == [partial]


def die_while_saving(run: Run) -> None:
    """Save, and die on the second rank when its tensors are written."""
    import torch

    from bridge.dist.patch import Replacement, replace_attributes

    def die(descriptor: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    is_second = torch.distributed.get_rank() == 1
    with replace_attributes(*[Replacement(os, "fsync", die)] * is_second):
        train(run)


def test_a_rank_killed_while_saving_leaves_no_checkpoint_and_ends_the_others(tmp_path: Path) -> None:
    """The next run takes over the folder."""
    run = Run({"tp": 2}, 1, save=str(tmp_path))
    began = time.monotonic()
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(die_while_saving, 2, run)
    assert time.monotonic() - began < 60
    assert [file.name for file in tmp_path.iterdir()] == ["iter_0000001.partial"]
    assert "has no metadata.json" in run_ranks(attempt, 1, Run({}, 0, load=str(tmp_path)))[0]
    run_ranks(train, 2, run)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def set_first_path(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).relative_path = "../secret.distcp"


HOSTILE: dict[str, tuple[Any, str]] = {
    "metadata": (
        lambda one, bad: (one / ".metadata").write_bytes(pickle.dumps(bad)),
        ".metadata cannot be read: it refers to",
    ),
    "part of the metadata": (
        lambda one, bad: rewrite_metadata(one, lambda metadata: setattr(metadata, "planner_data", bad)),
        ".metadata cannot be read: it refers to",
    ),
    "class of the metadata": (
        lambda one, bad: (one / ".metadata").write_bytes(
            b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n(N}X\x07\x00\x00\x00version\x88stb."
        ),
        "it changes Metadata",
    ),
    "another object": (lambda one, bad: (one / ".metadata").write_bytes(pickle.dumps([])), "it holds a list"),
    "no pickle": (lambda one, bad: (one / ".metadata").write_bytes(b"{}"), ".metadata cannot be read"),
    "a path out of the folder": (
        lambda one, bad: rewrite_metadata(one, set_first_path),
        "which is no file of this folder",
    ),
    "common state": (
        lambda one, bad: replace_object(one, COMMON_STATE, [bad]),
        "cannot be read: it refers to getattr",
    ),
    "common.pt": (lambda one, bad: torch_save([bad], one / "common.pt"), "common.pt cannot be read"),
    "random states": (
        lambda one, bad: replace_object(one, "rng_state/shard_0.0_1.1", [[bad]]),
        "rng_state/shard_0.0_1.1",
    ),
    "form of the random states": (
        lambda one, bad: replace_object(one, "rng_state/shard_0.0_1.1", [{"torch_rng_state": 1}]),
        "are not those of Megatron: cuda_rng_state",
    ),
    "arguments": (lambda one, bad: change_common(one, args={}), "args in the common state of"),
    "iteration": (lambda one, bad: change_common(one, iteration="1"), "is '1': expected int"),
    "content": (lambda one, bad: change_common(one, content_metadata=[1]), "is [1]: expected dict"),
    "optimizer": (lambda one, bad: change_common(one, optimizer=[]), "is not a mapping"),
    "groups of the optimizer": (
        lambda one, bad: change_common(one, optimizer={"optimizer": {"param_groups": 1}}),
        "has no groups of parameters",
    ),
    "step of the optimizer": (
        lambda one, bad: change_common(one, optimizer={"optimizer": {"param_groups": [{"step": "x"}]}}),
        "has the steps ['x']: expected numbers",
    ),
    "a pipe": (
        lambda one, bad: [(one / ".metadata").unlink(), os.mkfifo(one / ".metadata")],
        "is no regular file of at most 1,073,741,824 bytes",
    ),
    "a pipe as format": (
        lambda one, bad: [(one / "metadata.json").unlink(), os.mkfifo(one / "metadata.json")],
        "is no regular file",
    ),
    "truncated": (lambda one, bad: os.truncate(one / "__0_0.distcp", 1000), "it is truncated"),
    "no data": (lambda one, bad: (one / "__0_0.distcp").unlink(), "there is no file __0_0.distcp"),
    "no metadata": (lambda one, bad: (one / ".metadata").unlink(), "No such file"),
    "another format": (
        lambda one, bad: (one / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "in the format 'zarr': save it with --ckpt-format torch_dist",
    ),
    "a path as iteration": (
        lambda one, bad: (one.parent / "latest_checkpointed_iteration.txt").write_text("../1"),
        "must hold the number of an iteration, got '../1'",
    ),
    "an iteration of many digits": (
        lambda one, bad: (one.parent / "latest_checkpointed_iteration.txt").write_text("9" * 5000),
        "must hold the number of an iteration, got '9999",
    ),
    "a huge tracker": (
        lambda one, bad: (one.parent / "latest_checkpointed_iteration.txt").write_text("1" + " " * 200_000),
        "latest_checkpointed_iteration.txt: is no regular file of at most 100,000 bytes",
    ),
    "no such iteration": (
        lambda one, bad: (one.parent / "latest_checkpointed_iteration.txt").write_text("2"),
        "iter_0000002: pass the folder of a Megatron checkpoint",
    ),
}


def attempt_all(runs: list[Run]) -> list[str]:
    return [attempt(run) for run in runs]


def test_damaged_and_hostile_checkpoints_are_refused_and_run_nothing(saved_checkpoint: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(ran)))
    assert ran.exists()  # the payload works
    ran.unlink()
    for name, (damage, _) in HOSTILE.items():
        shutil.copytree(saved_checkpoint, tmp_path / name)
        damage(tmp_path / name / "iter_0000001", Payload(ran))
    errors = run_ranks(attempt_all, 1, [Run({}, 1, load=str(tmp_path / name)) for name in HOSTILE])[0]
    for error, (name, (_, expected)) in zip(errors, HOSTILE.items(), strict=True):
        assert expected in error, name
        assert str(tmp_path / name) in error
        assert "\n" not in error
    assert not ran.exists()


def test_the_command_refuses_before_training(saved_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(saved_checkpoint, other)
    (other / "iter_0000001" / "tokenizer").mkdir()
    tokenizer = other / "iter_0000001" / "tokenizer" / "tokenizer.json"
    tokenizer.write_text("no tokenizer")
    for arguments, expected in {
        (
            "--steps",
            "1",
            "--save",
            str(saved_checkpoint),
        ): f"{saved_checkpoint} exists: choose another folder, --load it",
        (
            "--load",
            str(saved_checkpoint / "iter_0000002"),
        ): "no such folder: give one with weights, or a Megatron checkpoint",
        ("--load", str(other), "--steps", "1"): str(tokenizer),
    }.items():
        code, _, err = run_command("build", "tiny", *arguments)
        assert code == 1
        assert expected in err


def meet_an_unexpected_error() -> str:
    """Raise an error of no checkpoint on the second rank, and return what this rank is told."""
    from bridge.dist.checkpoint.together import raise_together
    from bridge.dist.errors import CheckpointError

    try:
        with raise_together():
            if os.environ["RANK"] == "1":
                raise MemoryError("no room")
    except CheckpointError as error:
        return str(error)
    return ""


def test_an_unexpected_error_on_one_rank_ends_all() -> None:
    assert run_ranks(meet_an_unexpected_error, 2, timeout=30) == ["MemoryError: no room"] * 2
