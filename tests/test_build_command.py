"""The command `bridge build`: reports, parity of losses, and output on the terminal."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from environments import SMALL_DOCUMENT, run_command, run_in_one_process, run_process
from process_starts import BRIDGE

from bridge.dist.wrapper import ShardingStrategy


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


def test_the_report_of_one_rank_has_the_expected_numbers(one_rank: dict[str, Any]) -> None:
    # 250 tokens and 128 positions of width 64, an untied output layer and a final norm. Each layer has two norms,
    # attention and MLP with biases: 2 * 128 + (64 * 192 + 192) + (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64).
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


def test_the_report_contains_its_document_and_speed(one_rank: dict[str, Any]) -> None:
    assert (one_rank["kind"], one_rank["layers"], one_rank["device"]) == ("build", "pytorch", "cpu")
    assert one_rank["overrides"] == list(PADDED[1:])
    assert one_rank["document"]["vocab_size"] == 250
    assert {"python", "torch", "megatron-core", "bridge-dist"} <= one_rank["versions"].keys()
    # Per token: 2 FLOPs for each of 4 x 12 x 64 x 64 + 250 x 64 weights, and attention over 128 positions of width 64
    # (scores and values). The backward pass takes twice as much; the batch has 8 samples of 128 tokens.
    assert one_rank["model_flops"] == 3 * 2 * 8 * 128 * (4 * 12 * 64 * 64 + 250 * 64 + 4 * 2 * 128 * 64)
    assert one_rank["tokens_per_second_per_gpu"] * one_rank["step_seconds"] == pytest.approx(8 * 128)
    assert one_rank["model_flops_utilization"] is None


def test_a_report_is_compared_with_a_plan_of_the_same_job(one_rank: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(one_rank))
    (tmp_path / "small.json").write_text(json.dumps(one_rank | {"micro_batch_size": 3}))
    (tmp_path / "untrained.json").write_text(json.dumps(one_rank | {"seq_length": None}))
    (tmp_path / "edited.json").write_text(json.dumps(one_rank | {"document": {"_target_": "bridge.models.gpt.GPT"}}))
    plan = ("plan", *PADDED, "--global-batch-size", "8", "--layers", "installed", "--json")
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
    "untrained": "untrained.json: $.seq_length: the build trained no step",
    "edited": "edited.json: $._target_: ",
}


def test_four_ranks_with_virtual_stages_train_the_same(one_rank: dict[str, Any]) -> None:
    report = build(*PADDED, "--steps", "3", "--nproc", "4", "--tp", "2", "--pp", "2", "--vp", "2")
    assert report["losses"] == pytest.approx(one_rank["losses"], rel=1e-5)
    assert report["grad_norms"] == pytest.approx(one_rank["grad_norms"], rel=1e-5)
    assert report["parameters"] == one_rank["parameters"]
    layers = [[chunk["layers"] for chunk in rank["chunks"]] for rank in report["ranks"]]
    assert layers == [[[0], [2]], [[0], [2]], [[1], [3]], [[1], [3]]]
    assert all(rank["peak_memory_bytes"]["resident"] > 100 * 2**20 for rank in report["ranks"])
    assert report["model_flops"] == one_rank["model_flops"]  # independent of the padding
    tokens_per_rank = report["tokens_per_second_per_gpu"] * report["step_seconds"]
    assert tokens_per_rank == pytest.approx(8 * 128 / 4)


def test_vocabulary_padding_changes_neither_losses_nor_the_logical_count() -> None:
    """250 tokens are padded to 256 rows on one rank and to 512 on four; padding must get no probability."""
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
    # 50,257 tokens are padded to a multiple of 128 x 2: 50,432 rows of width 768.
    assert report["padded_parameters"] == 124_439_808 + (50_432 - 50_257) * 768


@pytest.mark.parametrize(
    ("wrap", "strategy"), [*(("megatron-fsdp", strategy) for strategy in ShardingStrategy), ("torch-fsdp2", None)]
)
def test_every_wrapper_trains_the_same(wrap: str, strategy: str | None, one_rank: dict[str, Any]) -> None:
    chosen = [] if strategy is None else ["--sharding-strategy", strategy]
    report = build(*PADDED, "--steps", "3", "--nproc", "2", "--wrap", wrap, *chosen)
    assert (report["wrap"], report["sharding_strategy"]) == (wrap, strategy)
    assert [[chunk["layers"] for chunk in rank["chunks"]] for rank in report["ranks"]] == [[[0, 1, 2, 3]]] * 2
    assert report["losses"] == pytest.approx(one_rank["losses"], rel=1e-5)


def test_the_report_is_a_table_on_the_terminal() -> None:
    done = run_process(
        BRIDGE, "build", "tiny", "--nproc", "2", "--pp", "2", "--device", "cpu", environment={"COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stderr
    assert "2 rank(s): tp=1 pp=2" in done.stdout
    assert "peak memory, GiB" in done.stdout
    assert len(re.findall(r"^│ +[01] │ +\d\.\d{3} │$", done.stdout, re.MULTILINE)) == 2
    for expected in ("0-1", "2-3", "DistributedDataParallel > GPTModel", "parameters of the whole model: 241,024"):
        assert expected in done.stdout
    assert "Warning" not in done.stderr


def test_fp16_trains_with_a_scaled_loss(one_rank: dict[str, Any]) -> None:
    report = build(*PADDED, "--steps", "3", "--nproc", "2", "transformer.fp16=true")
    assert report["losses"] == pytest.approx(one_rank["losses"], rel=2**-10)
    assert report["ranks"][0]["chunks"][0]["wrappers"] == ["DistributedDataParallel", "Float16Module", "GPTModel"]


def test_help_imports_no_torch() -> None:
    check = (
        "import sys; from bridge.config.cli.entry import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'megatron', 'megatron.core'} & set(sys.modules)"
    )
    done = run_process(sys.executable, "-c", check)
    assert done.returncode == 0, done.stderr
    assert "build" in done.stdout


def test_a_layout_applies_to_the_model_in_a_run_config(tmp_path: Path) -> None:
    model = SMALL_DOCUMENT.replace("bridge.models.gpt.", "megatron.training.models.gpt.").replace("\n", "\n  ").rstrip()
    (tmp_path / "run_config.yaml").write_text(f"model:\n  {model}\ntrain: {{micro_batch_size: 1}}\n")
    code, out, err = run_command("build", tmp_path / "run_config.yaml", "--nproc", "2", "--tp", "2", "--json")
    assert code == 0, err
    assert json.loads(out)["layout"]["tp"] == 2
    assert "run_config.yaml: note: left out, Bridge reads only the model: train" in err
