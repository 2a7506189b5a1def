"""Megatron checkpoints of live stages: training goes on from them under any layout; megatron.training reads them."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from environments import run_command
from ranks import run_ranks

from bridge.config import Document

SMALL = {
    "_target_": "bridge.models.gpt.GPTModelConfig",
    "vocab_size": 256,
    "seq_length": 32,
    "transformer": {
        "_target_": "megatron.core.transformer.transformer_config.TransformerConfig",
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
    },
}
COMMON_STATE = "common_state/shard_0_1"
EXPERTS = {"num_moe_experts": 4, "add_bias_linear": False, "moe_grouped_gemm": True}


class Run(NamedTuple):
    """One training run: layout, wrapper, settings of the transformer, and folders to load and save."""

    sizes: dict[str, int]
    steps: int
    wrapper: str = "ddp"
    distributed_optimizer: bool = False
    settings: dict[str, Any] | None = None
    load: str | None = None
    save: str | None = None


def make_job(run: Run) -> Any:
    from bridge.dist.document_layout import apply_layout
    from bridge.dist.job import BuildJob
    from bridge.dist.train.step import TrainOptions
    from bridge.dist.train.text import find_default_text
    from bridge.dist.wrapper import Wrapper

    options = TrainOptions(steps=run.steps, text=find_default_text(), seq_length=32, global_batch_size=4)
    document = Document(SMALL | {"transformer": SMALL["transformer"] | (run.settings or {})})  # type: ignore[operator]
    apply_layout(document, dict(run.sizes))
    return BuildJob(
        document=document.data,
        wrapper=Wrapper(run.wrapper),
        distributed_optimizer=run.distributed_optimizer,
        training=options if run.steps else None,
        checkpoint=None if run.load is None else Path(run.load),
        save=None if run.save is None else Path(run.save),
    )


def build(run: Run) -> tuple[list[Any], Any, list[float]]:
    """Build and train as one rank; return the stages, the process groups and the losses."""
    import torch

    from bridge.config import ModelConfig
    from bridge.dist.engine.groups import create_process_groups
    from bridge.dist.run.execute import build_and_train

    job = make_job(run)
    config: Any = ModelConfig.from_dict(job.document)
    layout = job.finalize(config, torch.distributed.get_world_size())
    groups = create_process_groups(layout, embedding_ranks=job.find_embedding_ranks(config))
    built = build_and_train(job, config, layout, groups)
    return built.stages, groups, [step.loss for step in built.steps]


def train(run: Run) -> list[float]:
    from bridge.dist.engine.groups import destroy_process_groups

    losses = build(run)[2]
    destroy_process_groups()
    return losses


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
    "bf16, ddp": Run({"tp": 2}, 2, settings={"bf16": True}),
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


# What is refused


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of one rank after one step."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(train, 1, Run({}, 1, save=str(folder)))
    return folder


def test_files_of_a_checkpoint(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "1"
    iteration = saved / "iter_0000001"
    files = sorted(file.name for file in iteration.iterdir())
    assert files == [".metadata", "__0_0.distcp", "bridge.yaml", "metadata.json", "run_config.yaml"]
    for name in ("bridge.yaml", "run_config.yaml"):
        document = Document.load(iteration / name)
        document.migrate()
        assert document.config().as_dict()["transformer"]["hidden_size"] == 32


def test_mismatches_are_named_before_anything_is_loaded(saved: Path) -> None:
    """Missing, unexpected and misshapen tensors, on both ranks."""
    wider = Run({}, 0, settings={"ffn_hidden_size": 64, "num_layers": 6, "qk_layernorm": True}, load=str(saved))
    fewer = Run({}, 0, settings={"num_layers": 4, "add_bias_linear": False}, load=str(saved))
    first, second = run_ranks(attempt, 2, wider)
    assert first == second
    assert (
        "decoder.layers.mlp.linear_fc1.weight: the model has the shape [6, 64, 32], the checkpoint [4, 128, 32]"
        in first
    )
    assert "decoder.layers.self_attention.q_layernorm.weight: the checkpoint has no such tensor" in first
    (third,) = run_ranks(attempt, 1, fewer)
    assert "decoder.layers.mlp.linear_fc1.bias: the checkpoint has this tensor, but the model has not" in third


def test_an_iteration_is_not_overwritten(saved: Path) -> None:
    (error,) = run_ranks(attempt, 1, Run({}, 1, save=str(saved)))
    assert error == f"{saved / 'iter_0000001'} exists: save to another folder, or remove it"


def save_on_a_small_disk(run: Run) -> str:
    from bridge.dist.patch import Replacement, replace_attributes

    with replace_attributes(Replacement(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))):
        return attempt(run)


def save_on_a_full_disk(run: Run) -> str:
    """Return the error of a run whose second rank finds no space on its disk."""
    import torch

    from bridge.dist.patch import Replacement, replace_attributes

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    is_full = torch.distributed.get_rank() == 1
    with replace_attributes(*[Replacement(os, "fsync", fail)] * is_full):
        return attempt(run)


def test_a_disk_that_is_too_small_is_refused_first(tmp_path: Path) -> None:
    (error,) = run_ranks(save_on_a_small_disk, 1, Run({}, 1, save=str(tmp_path)))
    assert "needs 0.001 GB" in error
    assert "0.000 GB left" in error


def test_a_rank_that_cannot_write_leaves_no_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(save_on_a_full_disk, 2, Run({"tp": 2}, 1, save=str(tmp_path)))
    assert first == second
    assert "the data cannot be read or written" in first  # megatron-core logs which error it was
    assert [file.name for file in tmp_path.iterdir()] == ["iter_0000001.partial"]


@pytest.mark.parametrize("wrapper", ["megatron-fsdp", "torch-fsdp2"])
def test_fsdp_is_refused_by_name(wrapper: str, tmp_path: Path) -> None:
    for error in run_ranks(attempt, 2, Run({}, 1, wrapper=wrapper, save=str(tmp_path))):
        assert wrapper.replace("-", " ").casefold() in error.replace("-", " ").casefold()
        assert "--wrap ddp --distributed-optimizer" in error


def test_another_optimizer_is_refused(saved: Path) -> None:
    (error,) = run_ranks(attempt, 1, Run({}, 1, distributed_optimizer=True, load=str(saved)))
    assert error.endswith("leave out --distributed-optimizer")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def rewrite_metadata(iteration: Path, change: Any) -> None:
    metadata = pickle.loads((iteration / ".metadata").read_bytes())
    change(metadata)
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))


def torch_save(value: object, file: Path) -> None:
    import torch

    torch.save(value, file)


def replace_object(iteration: Path, key: str, value: object) -> None:
    """Write another object in place of one of a checkpoint."""
    torch_save(value, iteration / "other.distcp")

    def change(metadata: Any) -> None:
        (stored,) = (stored for index, stored in metadata.storage_data.items() if index.fqn == key)
        stored.relative_path, stored.offset = "other.distcp", 0
        stored.length = (iteration / "other.distcp").stat().st_size

    rewrite_metadata(iteration, change)


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
    "no such iteration": (
        lambda one, bad: (one.parent / "latest_checkpointed_iteration.txt").write_text("2"),
        "iter_0000002: pass the folder of a Megatron checkpoint",
    ),
}


def attempt_all(runs: list[Run]) -> list[str]:
    return [attempt(run) for run in runs]


def test_damaged_and_hostile_checkpoints_are_refused_and_run_nothing(saved: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(ran)))
    assert ran.exists()  # the payload works
    ran.unlink()
    for name, (damage, _) in HOSTILE.items():
        shutil.copytree(saved, tmp_path / name)
        damage(tmp_path / name / "iter_0000001", Payload(ran))
    errors = run_ranks(attempt_all, 1, [Run({}, 1, load=str(tmp_path / name)) for name in HOSTILE])[0]
    for error, (name, (_, expected)) in zip(errors, HOSTILE.items(), strict=True):
        assert expected in error, name
        assert str(tmp_path / name) in error
        assert "\n" not in error
    assert not ran.exists()


def test_the_command_saves_and_goes_on(tmp_path: Path) -> None:
    """The steps, the data and the random states go on; a checkpoint is loaded without training too."""

    def build(*arguments: str) -> dict[str, Any]:
        code, out, err = run_command("build", "tiny", "--global-batch-size", "4", *arguments, "--json")
        assert code == 0, err
        report: dict[str, Any] = json.loads(out)
        return report

    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    whole = build("--steps", "3")["losses"]
    halves = build("--steps", "2", "--save", first)["losses"]
    halves += build("--steps", "1", "--load", first, "--save", second)["losses"]
    assert halves == whole
    assert (tmp_path / "second" / "iter_0000003" / ".metadata").is_file()
    assert build("--load", second)["losses"] == []


def test_a_checkpoint_is_the_file_of_a_command(saved: Path) -> None:
    for folder in (saved, saved / "iter_0000001"):
        code, out, err = run_command("show", str(folder))
        assert code == 0, err
        assert "hidden_size: 32" in out
    code, out, err = run_command("build", str(saved), "--steps", "1", "--global-batch-size", "4", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["weights"] == str(saved)
    assert report["losses"] == run_ranks(train, 1, Run({}, 2))[0][1:]
    assert run_command("build", str(saved), "--random-init", "--json")[0] == 0
    code, _, err = run_command("verify", str(saved))
    assert code == 1
    assert "verify does not load Megatron checkpoints" in err


def test_the_command_refuses_before_training(saved: Path, tmp_path: Path) -> None:
    for arguments, expected in {
        ("--steps", "1", "--save", str(saved)): f"{saved / 'iter_0000001'} exists",
        ("--load", str(saved), "--wrap", "torch-fsdp2"): "cannot save or load torch-fsdp2",
        ("--save", str(tmp_path), "--wrap", "megatron-fsdp"): "cannot save or load megatron-fsdp",
    }.items():
        code, _, err = run_command("build", "tiny", *arguments)
        assert code == 1
        assert expected in err


# megatron.training


UNSET = [
    "async_save",
    "ckpt_assume_constant_structure",
    "ckpt_fully_parallel_save",
    "ckpt_fully_parallel_load",
    "auto_detect_ckpt_format",
    "finetune",
    "no_load_optim",
    "no_load_rng",
    "no_save_optim",
    "no_save_rng",
    "log_progress",
    "verify_integrity",
    "data_parallel_random_init",
    "exit_on_missing_checkpoint",
    "vocab_file",
    "phase_transition_iterations",
    "load_main_params_from_ckpt",
    "non_persistent_global_ckpt_dir",
    "enable_msc",
    "non_persistent_ckpt_type",
    "stream_ckpt_dequant",
    "distrib_optim_fully_reshardable_mem_efficient",
]


def set_megatron_arguments(run: Run, folder: Path) -> None:
    """Set the arguments of megatron.training that its functions for checkpoints read."""
    from argparse import Namespace

    import torch
    from megatron.core import num_microbatches_calculator
    from megatron.training.global_vars import set_args

    num_microbatches_calculator.unset_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, 4, 1, 1)
    unset = dict.fromkeys(UNSET)
    transformer = SMALL["transformer"] | (run.settings or {})  # type: ignore[operator]
    set_args(
        Namespace(
            **unset | {"load": str(folder), "save": str(folder)},
            add_position_embedding=True,
            async_strategy="mcore",
            bf16=transformer.get("bf16", False),
            ckpt_format="torch_dist",
            ckpt_load_validate_sharding_integrity=True,
            consumed_train_samples=28,
            dist_ckpt_optim_fully_reshardable=True,
            dist_ckpt_strictness="assume_ok_unexpected",  # its default; the strict ones of 0.19.2 fail with torch 2.15
            fp16=False,
            hidden_size=transformer["hidden_size"],
            num_attention_heads=transformer["num_attention_heads"],
            num_layers=transformer["num_layers"],
            pipeline_model_parallel_size=run.sizes.get("pp", 1),
            tensor_model_parallel_size=run.sizes.get("tp", 1),
            use_dist_ckpt=True,
            use_distributed_optimizer=run.distributed_optimizer,
            world_size=torch.distributed.get_world_size(),
        )
    )


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
