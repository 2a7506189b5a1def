"""Invalid input to `bridge build` and in programs gives a clear error and leaves no process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from environments import SMALL_DOCUMENT, run_command, run_in_one_process, run_process
from process_starts import BRIDGE

BAD_INPUT = {
    "an unknown key": ("key.yaml", [], r"key.yaml:5:3: $.transformer.num_layer: ", "did you mean 'num_layers'"),
    "a wrong type": ("type.yaml", [], "type.yaml:5:3: $.transformer.num_layers: expected an integer, got 'four'"),
    "no vocab_size": ("vocab.yaml", [], "vocab_size is not set"),
    "layers that do not divide": (
        "good.yaml",
        ["--nproc", "2", "--pp", "2", "--vp", "4"],
        "4 does not divide into pp x vp",
    ),
    "virtual stages without a pipeline": ("good.yaml", ["--vp", "2"], "vp = 2 needs a pipeline, but pp = 1"),
    "a world that does not fit": ("good.yaml", ["--nproc", "3", "--tp", "2"], "3 ranks do not fit tp x pp x cp = 2"),
    "a dp that does not fit": ("good.yaml", ["--nproc", "2", "--dp", "3"], "dp is 2 with 2"),
    "experts that do not split": ("good.yaml", ["--nproc", "2", "--etp", "4"], "etp x ep = 4 x 1 = 4 does not divide"),
    "heads that do not split": (
        "good.yaml",
        ["--nproc", "3", "--tp", "3"],
        "num_attention_heads = 4 is not a multiple of tp = 3",
    ),
    "no such file": ("missing.yaml", [], "missing.yaml: no such file"),
    "a misspelt file": ("goood.yaml", [], "no such file; did you mean 'good.yaml'?"),
    "a folder": (
        ".",
        [],
        ".: is a folder without config.json, latest_checkpointed_iteration.txt, latest_train_state.pt or "
        "metadata.json: give a document",
    ),
    "not YAML": ("torn.yaml", [], "torn.yaml:2:2: ", "not YAML"),
    "an override of nothing": ("good.yaml", ["transformer.num_layer=2"], "did you mean 'num_layers'"),
    "a field given to the wrong owner": ("good.yaml", ["num_layers=2"], "give it as transformer.num_layers"),
    "a batch that does not divide": ("good.yaml", ["--steps", "1", "--nproc", "3"], "choose a multiple of 3"),
    "samples that are too long": (
        "good.yaml",
        ["--steps", "1", "--seq-length", "65"],
        "longer than the model's seq_length",
    ),
    "no such text": ("good.yaml", ["--steps", "1", "--text", "no.txt"], "cannot read the text no.txt"),
    "training without a wrapper": ("good.yaml", ["--steps", "1", "--wrap", "none"], "needs a data-parallel wrapper"),
    "bytes beyond the vocabulary": ("good.yaml", ["--steps", "1", "vocab_size=64"], "set vocab_size to at least 256"),
    "a loss per token": ("good.yaml", ["--steps", "1", "transformer.calculate_per_token_loss=true"], "set it to false"),
    "gathered logits": ("good.yaml", ["--steps", "1", "parallel_output=false"], "parallel_output = false"),
    "weights on meta": (
        "good.yaml",
        ["--steps", "1", "transformer.init_model_with_meta_device=true"],
        "set it to false",
    ),
    "Megatron-FSDP with a pipeline": (
        "good.yaml",
        ["--nproc", "2", "--pp", "2", "--wrap", "megatron-fsdp"],
        "Megatron-FSDP does not support pipeline parallelism: set pp = 1, or wrap with ddp [megatron-fsdp-pipeline]",
    ),
    "a checkpoint that cannot be saved": (
        "good.yaml",
        ["--steps", "1", "--wrap", "megatron-fsdp", "--sharding-strategy", "optim_grads", "--save", "run"],
        "--sharding-strategy optim_grads can neither save nor load checkpoints: use optim_grads_params",
    ),
    "stages that send another dtype than is expected": (
        "good.yaml",
        ["--nproc", "2", "--pp", "2", "transformer.bf16=true", "transformer.pipeline_dtype=torch.float32"],
        "pipeline_dtype is torch.float32, but the stages of this model send torch.bfloat16",
    ),
    "interleaving that computes wrong gradients": (
        "good.yaml",
        ["--nproc", "2", "--pp", "2", "--vp", "2", "transformer.batch_p2p_comm=true"],
        "set batch_p2p_comm = False and overlap_p2p_comm = True",
    ),
}


@pytest.fixture(scope="module")
def bad_input_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    folder = tmp_path_factory.mktemp("documents")
    documents = {
        "good": SMALL_DOCUMENT,
        "key": SMALL_DOCUMENT.replace("num_layers", "num_layer"),
        "type": SMALL_DOCUMENT.replace("num_layers: 4", "num_layers: four"),
        "vocab": SMALL_DOCUMENT.replace("vocab_size: 256\n", ""),
        "torn": "a: [1, 2\nb: }",
    }
    for name, text in documents.items():
        (folder / f"{name}.yaml").write_text(text)
    lines = [["build", file, *arguments] for file, arguments, *_ in BAD_INPUT.values()]
    return dict(zip(BAD_INPUT, run_in_one_process(lines, folder), strict=True))


@pytest.mark.parametrize("name", BAD_INPUT)
def test_invalid_input_is_a_clear_error(name: str, bad_input_results: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = bad_input_results[name]
    assert code == 1
    assert out == ""
    for expected in BAD_INPUT[name][2:]:
        assert expected in err
    assert "Traceback" not in err


def test_missing_gpus_are_an_error() -> None:
    code, _, err = run_command("build", "tiny", "--nproc", "2", "--device", "cuda")
    assert code == 1
    assert "--device cuda needs one GPU per rank: 2 rank(s), 0 visible GPU(s)" in err


def test_a_wrong_option_is_a_usage_error() -> None:
    done = run_process(BRIDGE, "build", "tiny", "--wrap", "paper")
    assert done.returncode == 2
    assert "'paper' is not one of 'ddp'" in done.stderr


def test_ranks_of_a_launcher_do_not_share_standard_input() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    done = run_process(BRIDGE, "build", "-", environment=place, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "cannot share standard input: pass a file name" in done.stderr


def test_an_error_on_a_rank_is_reported_once_and_ends_all_ranks(tmp_path: Path) -> None:
    document = tmp_path / "persistent.yaml"
    document.write_text(SMALL_DOCUMENT.replace("transformer:\n", "transformer:\n  persist_layer_norm: true\n"))
    code, _, err = run_command("build", document, "--nproc", "2")
    assert code == 1
    assert "rank 0: UnsupportedError: " in err or "rank 1: UnsupportedError: " in err
    assert "persistent layer norm" in err
    assert "Traceback" not in err


PROGRAM = """\
import os, sys, torch
from bridge.config import load_config
from bridge.dist import Layout, create_process_groups
from bridge.dist.cpu import cpu_runtime
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

def forgets_to_return(stages):
    pass

with cpu_runtime():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    config = load_config("tiny")
    builder = config.get_builder_cls()(config)
    groups = create_process_groups(Layout())
    model_parallel_cuda_manual_seed(1)
    for call in {calls}:
        try:
            exec(call)
        except Exception as error:
            print(f"{{type(error).__name__}}: {{error}}", file=sys.stderr)
"""
WRONG_CALLS = {
    "config.pre_wrap_hooks[:] = [forgets_to_return, print]; "
    "builder.build_distributed_models(groups, wrap_with_ddp=False)": (
        "HookError: hook 1 of 2, __main__.forgets_to_return, returned None: a hook must return the list of stages"
    ),
    "builder.build_distributed_models(groups)": (
        "OptionsError: wrap_with_ddp is True but ddp_config is None: pass a DistributedDataParallelConfig"
    ),
    "builder.build_distributed_models("
    "groups, DistributedDataParallelConfig(), use_megatron_fsdp=True, use_torch_fsdp2=True)": (
        "OptionsError: use_megatron_fsdp and use_torch_fsdp2 are both True"
    ),
}


def test_invalid_calls_in_a_program_are_clear_errors() -> None:
    done = run_process(sys.executable, "-c", PROGRAM.format(calls=list(WRONG_CALLS)))
    said = [line for line in done.stderr.splitlines() if "Error: " in line]
    assert len(said) == len(WRONG_CALLS), done.stderr
    assert "Warning" not in done.stderr
    assert "DEPRECATED" not in done.stderr
    for line, expected in zip(said, WRONG_CALLS.values(), strict=True):
        assert expected in line
