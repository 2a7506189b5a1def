"""`bridge build` as its users meet it: real processes, real files, the terminal's output."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
from environments import run_command, run_in_one_process

SCRIPTS = Path(sysconfig.get_path("scripts"))
BRIDGE = str(SCRIPTS / "bridge")

DOCUMENT = """\
_target_: bridge.models.gpt.GPTModelConfig
vocab_size: 256
seq_length: 64
transformer:
  num_layers: 4
  hidden_size: 32
  num_attention_heads: 4
"""


def run(*command: str, environment: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | (environment or {}), **options
    )


def build(*arguments: str) -> dict[str, Any]:
    code, out, err = run_command("build", *arguments, "--json")
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    return report


# 250 tokens pad to 256 rows, on two ranks as on one.
PADDED = ("tiny", "vocab_size=250", "should_pad_vocab=true")


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return build(*PADDED, "--steps", "3")


def test_the_report_of_one_rank(one_rank: dict[str, Any]) -> None:
    # 250 tokens and 128 positions of width 64, an untied output layer, a final norm; per layer two norms, attention
    # and MLP with biases: 2 * 128 + (64 * 192 + 192) + (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64).
    parameters = 2 * 250 * 64 + 128 * 64 + 128 + 4 * (2 * 128 + 12_480 + 4_160 + 16_640 + 16_448)
    padded = parameters + 2 * 6 * 64
    assert (one_rank["parameters"], one_rank["padded_parameters"]) == (parameters, padded)
    assert one_rank["world_size"] == 1
    assert one_rank["layout"] == {"tp": 1, "pp": 1, "vp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": 1}
    assert one_rank["wrap"] == "ddp"
    (peak,) = (rank["peak_memory_bytes"] for rank in one_rank["ranks"])
    assert (peak["allocated"], peak["reserved"]) == (None, None)
    assert 100 * 2**20 < peak["resident"] < 4 * 2**30  # torch is never less, this model never as much
    assert one_rank["ranks"] == [
        {
            "rank": 0,
            "tp": 0,
            "pp": 0,
            "dp": 0,
            "cp": 0,
            "ep": 0,
            "chunks": [
                {
                    "vp_stage": 0,
                    "layers": [0, 1, 2, 3],
                    "parameters": padded,
                    "wrappers": ["DistributedDataParallel", "GPTModel"],
                }
            ],
            "peak_memory_bytes": peak,
        }
    ]
    assert len(one_rank["losses"]) == len(one_rank["grad_norms"]) == 3
    assert one_rank["losses"][-1] < one_rank["losses"][0]


def test_the_report_says_what_made_it_and_how_fast(one_rank: dict[str, Any]) -> None:
    assert (one_rank["kind"], one_rank["layers"], one_rank["device"]) == ("build", "pytorch", "cpu")
    assert one_rank["overrides"] == list(PADDED[1:])
    assert one_rank["document"]["vocab_size"] == 250
    assert {"python", "torch", "megatron-core", "bridge-dist"} <= one_rank["versions"].keys()
    # Per token twice each of 4 layers' 12 x 64 x 64 and of the output's 250 x 64, attention over 128 positions of
    # width 64, scores and values; three times that with the backward pass, for 8 samples of 128 tokens.
    assert one_rank["model_flops"] == 3 * 2 * 8 * 128 * (4 * 12 * 64 * 64 + 250 * 64 + 4 * 2 * 128 * 64)
    assert one_rank["tokens_per_second_per_gpu"] * one_rank["step_seconds"] == pytest.approx(8 * 128)
    assert one_rank["model_flops_utilization"] is None


def test_a_report_is_held_against_the_plan_of_what_it_says(one_rank: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(one_rank))
    (tmp_path / "small.json").write_text(json.dumps(one_rank | {"micro_batch_size": 3}))
    (tmp_path / "untrained.json").write_text(json.dumps(one_rank | {"seq_length": None}))
    (tmp_path / "edited.json").write_text(json.dumps(one_rank | {"document": {"_target_": "bridge.models.gpt.GPT"}}))
    plan = ("plan", *PADDED, "--global-batch-size", "8", "--json")
    alone, planned, *wrong = run_in_one_process(
        [["compare", "run.json", "--json"], plan, *(["compare", f"{name}.json"] for name in WRONG_REPORTS)], tmp_path
    )
    code, out, err = alone
    assert code in (0, None), err
    found = json.loads(out)
    assert (found["kind"], found["files"]) == ("comparison", ["run.json", "its plan"])
    rows = {row["name"]: row["values"] for row in found["rows"]}
    for name in ("layers", "layout", "wrapper", "batch", "parameters"):
        assert rows[name][0] == rows[name][1]
    (stage,) = json.loads(planned[1])["stages"]
    kinds = ("weights", "gradients", "master", "state", "activations", "unsharded", "peak")
    keys = ("weight", "gradient", "master", "state", "activation", "unsharded", "total")
    for name, key in zip(kinds, keys, strict=True):
        assert rows[name] == [None, stage[f"{key}_bytes"]]
    assert rows["resident"] == [one_rank["ranks"][0]["peak_memory_bytes"]["resident"], None]
    assert rows["step_seconds"] == [one_rank["step_seconds"], None]
    for (code, out, err), says in zip(wrong, WRONG_REPORTS.values(), strict=True):
        assert (code, out) == (1, "")
        assert says in err
        assert "Traceback" not in err


WRONG_REPORTS = {
    "small": "does not divide into microbatches of 3",
    "untrained": "untrained.json: $.seq_length: the build trained nothing",
    "edited": "edited.json: $._target_: ",
}


def test_four_ranks_with_virtual_stages_train_alike(one_rank: dict[str, Any]) -> None:
    report = build(*PADDED, "--steps", "3", "--nproc", "4", "--tp", "2", "--pp", "2", "--vp", "2")
    assert report["losses"] == pytest.approx(one_rank["losses"], rel=1e-5)
    assert report["grad_norms"] == pytest.approx(one_rank["grad_norms"], rel=1e-5)
    assert report["parameters"] == one_rank["parameters"]
    layers = [[chunk["layers"] for chunk in rank["chunks"]] for rank in report["ranks"]]
    assert layers == [[[0], [2]], [[0], [2]], [[1], [3]], [[1], [3]]]
    assert all(rank["peak_memory_bytes"]["resident"] > 100 * 2**20 for rank in report["ranks"])
    assert report["model_flops"] == one_rank["model_flops"]  # however the vocabulary is padded
    tokens_per_rank = report["tokens_per_second_per_gpu"] * report["step_seconds"]
    assert tokens_per_rank == pytest.approx(8 * 128 / 4)


def test_vocabulary_padding_changes_neither_losses_nor_the_logical_count() -> None:
    """250 tokens pad to 256 rows on one rank and, 128 a rank, to 512 on four; the padding must take no probability."""
    small = (*PADDED, "share_embeddings_and_output_weights=true")
    one, four = build(*small, "--steps", "2"), build(*small, "--steps", "2", "--nproc", "4", "--tp", "4")
    assert four["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert four["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-5)
    assert one["parameters"] == four["parameters"]
    assert (one["padded_parameters"] - one["parameters"], four["padded_parameters"] - four["parameters"]) == (
        6 * 64,
        262 * 64,
    )


def test_gpt2_has_its_published_number_of_parameters() -> None:
    report = build("gpt2-124m", "--nproc", "2", "--tp", "2")
    assert report["parameters"] == 124_439_808
    # 50,257 tokens, 128 x 2 to a share: 50,432 rows of 768.
    assert report["padded_parameters"] == 124_439_808 + (50_432 - 50_257) * 768


@pytest.mark.parametrize("wrap", ["megatron-fsdp", "torch-fsdp2"])
def test_every_wrapper_trains_alike(wrap: str, one_rank: dict[str, Any]) -> None:
    report = build(*PADDED, "--steps", "3", "--nproc", "2", "--wrap", wrap)
    assert report["wrap"] == wrap
    assert [[chunk["layers"] for chunk in rank["chunks"]] for rank in report["ranks"]] == [[[0, 1, 2, 3]]] * 2
    assert report["losses"] == pytest.approx(one_rank["losses"], rel=1e-5)


def test_a_table_on_the_terminal() -> None:
    done = run(BRIDGE, "build", "tiny", "--nproc", "2", "--pp", "2", "--device", "cpu", environment={"COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    assert "2 rank(s): tp=1 pp=2" in done.stdout
    assert "peak memory, GiB" in done.stdout
    assert len(re.findall(r"^│ +[01] │ +\d\.\d{3} │$", done.stdout, re.MULTILINE)) == 2
    for expected in ("0-1", "2-3", "DistributedDataParallel > GPTModel", "parameters of the whole model: 241,024"):
        assert expected in done.stdout
    assert "Warning" not in done.stderr


BAD_INPUT = {
    "an unknown key": ("key.yaml", [], r"key.yaml:5:3: $.transformer.num_layer: ", "did you mean 'num_layers'"),
    "a wrong type": ("type.yaml", [], "type.yaml:5:3: $.transformer.num_layers: expected an integer, got 'four'"),
    "no vocab_size": ("vocab.yaml", [], "vocab_size is not set"),
    "layers that do not divide": (
        "good.yaml",
        ["--nproc", "2", "--pp", "2", "--vp", "4"],
        "4 does not divide into pp x vp",
    ),
    "a world that does not fit": ("good.yaml", ["--nproc", "3", "--tp", "2"], "3 ranks do not fit tp x pp x cp = 2"),
    "a dp that does not fit": ("good.yaml", ["--nproc", "2", "--dp", "3"], "dp is 2 with 2"),
    "experts that do not split": ("good.yaml", ["--nproc", "2", "--etp", "4"], "etp x ep = 4 x 1 = 4 does not divide"),
    "heads that do not split": (
        "good.yaml",
        ["--nproc", "3", "--tp", "3"],
        "num_attention_heads = 4 is not a multiple of tp = 3",
    ),
    "no such file": ("missing.yaml", [], "missing.yaml: $: no such file"),
    "a misspelt file": ("goood.yaml", [], "no such file; did you mean 'good.yaml'?"),
    "a folder": (".", [], ".yaml, .yml or .json"),
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
        "Megatron-FSDP fails in a pipeline: set pp = 1, or wrap with ddp [megatron-fsdp-pipeline]",
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
        "good": DOCUMENT,
        "key": DOCUMENT.replace("num_layers", "num_layer"),
        "type": DOCUMENT.replace("num_layers: 4", "num_layers: four"),
        "vocab": DOCUMENT.replace("vocab_size: 256\n", ""),
        "torn": "a: [1, 2\nb: }",
    }
    for name, text in documents.items():
        (folder / f"{name}.yaml").write_text(text)
    lines = [["build", file, *arguments] for file, arguments, *_ in BAD_INPUT.values()]
    return dict(zip(BAD_INPUT, run_in_one_process(lines, folder), strict=True))


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_a_clear_error(name: str, bad_input_results: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = bad_input_results[name]
    assert code == 1
    assert out == ""
    for expected in BAD_INPUT[name][2:]:
        assert expected in err
    assert "Traceback" not in err


def test_gpus_that_are_not_there() -> None:
    code, _, err = run_command("build", "tiny", "--nproc", "2", "--device", "cuda")
    assert code == 1
    assert "--device cuda needs a GPU for each rank: 2 rank(s), 0 GPU(s) visible here" in err


def test_a_wrong_option_is_a_usage_error() -> None:
    done = run(BRIDGE, "build", "tiny", "--wrap", "paper")
    assert done.returncode == 2
    assert "'paper' is not one of 'ddp'" in done.stderr


def test_ranks_of_a_launcher_do_not_share_standard_input() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    done = run(BRIDGE, "build", "-", environment=place, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "cannot all read standard input: name a file" in done.stderr


def test_what_a_rank_raises_is_said_once_and_ends_all(tmp_path: Path) -> None:
    document = tmp_path / "persistent.yaml"
    document.write_text(DOCUMENT.replace("transformer:\n", "transformer:\n  persist_layer_norm: true\n"))
    code, _, err = run_command("build", document, "--nproc", "2")
    assert code == 1
    assert "rank 0: UnsupportedError: " in err or "rank 1: UnsupportedError: " in err
    assert "persistent layer norm" in err
    assert "Traceback" not in err


def test_fp16_trains_with_a_scaled_loss(one_rank: dict[str, Any]) -> None:
    report = build(*PADDED, "--steps", "3", "--nproc", "2", "transformer.fp16=true")
    assert report["losses"] == pytest.approx(one_rank["losses"], rel=2**-10)
    assert report["ranks"][0]["chunks"][0]["wrappers"] == ["DistributedDataParallel", "Float16Module", "GPTModel"]


def test_help_imports_no_torch() -> None:
    check = (
        "import sys; from bridge.config.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'megatron', 'megatron.core'} & set(sys.modules)"
    )
    done = run(sys.executable, "-c", check)
    assert done.returncode == 0, done.stderr
    assert "build" in done.stdout


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


def test_a_program_that_asks_for_the_impossible() -> None:
    done = run(sys.executable, "-c", PROGRAM.format(calls=list(WRONG_CALLS)))
    said = [line for line in done.stderr.splitlines() if "Error: " in line]
    assert len(said) == len(WRONG_CALLS), done.stderr
    assert "Warning" not in done.stderr
    assert "DEPRECATED" not in done.stderr
    for line, expected in zip(said, WRONG_CALLS.values(), strict=True):
        assert expected in line


def test_a_killed_rank_ends_all_and_is_named(tmp_path: Path) -> None:
    """Whatever the ranks are doing at the time, the other one must not wait for the dead one."""
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen([BRIDGE, "build", "tiny", "--nproc", "2", "--steps", "100000"], stderr=stderr)
        ranks = grandchildren(process.pid, 2)
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(timeout=60) == 1
    assert re.search(r"^rank [01] was killed: SIGKILL, signal 9", errors.read_text(), re.MULTILINE)
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]


def grandchildren(pid: int, count: int) -> list[int]:
    """Wait for the fork server's children, the ranks, to be there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = [rank for child in children(pid) for rank in children(child)]
        if len(found) == count:
            return found
        time.sleep(0.1)
    raise TimeoutError(f"no {count} ranks")


def children(pid: int) -> list[int]:
    listed = run("ps", "-o", "pid=", "--ppid", str(pid))
    return [int(child) for child in listed.stdout.split()]


def test_a_layout_reaches_the_model_of_a_reference_document(tmp_path: Path) -> None:
    model = DOCUMENT.replace("bridge.models.gpt.", "megatron.training.models.gpt.").replace("\n", "\n  ").rstrip()
    (tmp_path / "run_config.yaml").write_text(f"model:\n  {model}\ntrain: {{micro_batch_size: 1}}\n")
    code, out, err = run_command("build", tmp_path / "run_config.yaml", "--nproc", "2", "--tp", "2", "--json")
    assert code == 0, err
    assert json.loads(out)["layout"]["tp"] == 2
    assert "run_config.yaml: note: left out, Bridge reads the model alone: train" in err
