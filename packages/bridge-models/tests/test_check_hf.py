"""`bridge check-hf`: the tensors of a folder against its config.json, from headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sparse_folders import Tensor, list_deepseek_v3, list_gpt_oss, write_folder

from bridge.models.commands.weights import check_hf

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
LLAMA_TENSORS: dict[str, Tensor] = {
    "model.embed_tokens.weight": ("BF16", (128, 64)),
    "model.layers.0.input_layernorm.weight": ("F32", (64,)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (64, 64)),
    "model.layers.0.self_attn.k_proj.weight": ("BF16", (64, 64)),
    "model.layers.0.self_attn.v_proj.weight": ("BF16", (64, 64)),
    "model.layers.0.self_attn.o_proj.weight": ("BF16", (64, 64)),
    "model.layers.0.post_attention_layernorm.weight": ("F32", (64,)),
    "model.layers.0.mlp.gate_proj.weight": ("BF16", (96, 64)),
    "model.layers.0.mlp.up_proj.weight": ("BF16", (96, 64)),
    "model.layers.0.mlp.down_proj.weight": ("BF16", (64, 96)),
    "model.norm.weight": ("F32", (64,)),
    "lm_head.weight": ("BF16", (128, 64)),
}


def check(*arguments: object) -> Result:
    return CliRunner().invoke(check_hf, [str(argument) for argument in arguments])


def test_deepseek_v3_from_its_headers(tmp_path: Path) -> None:
    """The numbers are those of its page: 684,531,386,000 elements, of which docs/huggingface.md says what each is."""
    config = json.loads((Path(__file__).parent / "huggingface" / "deepseek-ai--DeepSeek-V3.json").read_text())
    write_folder(tmp_path, config, list_deepseek_v3(), files=163)
    start = time.process_time()
    report = json.loads(check(tmp_path, "--json").stdout)
    assert time.process_time() - start < 4  # measured: 1.0 s of a busy core
    assert (report["ok"], report["model_type"]) == (True, "deepseek_v3")
    assert report["parameters"] == 671_026_404_352 + 11_610_067_968
    assert (report["files"], report["tensors"]) == (163, 91_991)
    elements = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
    assert sum(each["bytes"] // elements[dtype] for dtype, each in report["precisions"].items()) == 684_531_386_000


@pytest.mark.parametrize(
    ("model", "layers", "experts", "files", "size"),
    [("gpt-oss-20b", 24, 32, 3, 13_761_264_768), ("gpt-oss-120b", 36, 128, 15, 65_248_815_744)],
)
def test_gpt_oss_from_its_headers(model: str, layers: int, experts: int, files: int, size: int, tmp_path: Path) -> None:
    """The size is total_size of the published index."""
    config = json.loads((Path(__file__).parent / "huggingface" / f"openai--{model}.json").read_text())
    write_folder(tmp_path, config, list_gpt_oss(layers, experts), files=files)
    report = json.loads(check(tmp_path, "--json").stdout)
    assert report["ok"], report
    assert (report["files"], report["tensors"], report["bytes"]) == (files, 19 * layers + 3, size)


def test_bytes_that_ranks_read_of_deepseek_v3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 ranks: each expert is read once, all else by the 8 expert-parallel ranks of its stage."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = json.loads((Path(__file__).parent / "huggingface" / "deepseek-ai--DeepSeek-V3.json").read_text())
    write_folder(tmp_path, config, list_deepseek_v3(), files=163)
    stages = "transformer.pipeline_model_parallel_layout=Et*15|t*16|t*16|t*14mL"
    report = json.loads(check(tmp_path, stages, "--pp", 4, "--ep", 8, "--gpus", 32, "--json").stdout)
    assert [one["pp"] for one in report["reads"]] == [0, 1, 2, 3]
    assert [one["ranks"] for one in report["reads"]] == [list(range(start, start + 8)) for start in (0, 8, 16, 24)]
    experts = 59 * 256 * 3 * (2048 * 7168 + 16 * 56 * 4)  # in FP8, with a scale for each block
    embedding = 2 * 129280 * 7168
    # The layer of multi-token prediction has copies of embedding and output layer: they are compared, once by all
    # ranks together. Megatron-Core keeps a second embedding on the stage of that layer.
    others = report["bytes"] - experts - 2 * embedding + embedding
    read = sum(len(one["ranks"]) * one["bytes"] for one in report["reads"])
    assert read == experts + 8 * others + 4 * embedding


def test_bytes_that_ranks_read_of_gpt_oss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 ranks: two hold each expert, all hold the norms, the routers and the biases after attention."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = json.loads((Path(__file__).parent / "huggingface" / "openai--gpt-oss-120b.json").read_text())
    write_folder(tmp_path, config, list_gpt_oss(36, 128), files=15)
    done = check(tmp_path, "--tp", 8, "--ep", 4, "--etp", 1, "--json")
    (reads,) = json.loads(done.stdout)["reads"]
    assert (reads["pp"], reads["ranks"]) == (0, list(range(8)))
    experts = 36 * 128 * (5760 + 2880) * (90 * 17 + 2)  # blocks of 16 bytes with one scale, and a bias
    copied = 36 * 2 * (2 * 2880 + 128 * 2881 + 2880) + 2 * 2880
    assert 8 * reads["bytes"] == 65_248_815_744 + experts + 7 * copied
    shown = check(tmp_path, "--tp", 8, "--ep", 4, "--etp", 1)
    assert shown.stdout.splitlines()[-2:] == [
        "pipeline rank   ranks   first   bytes read by each",
        f"            0       8       0 {reads['bytes']:>20,}",
    ]


def test_report_of_a_small_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, LLAMA | {"quantization_config": None}, LLAMA_TENSORS, files=2)
    matrices = 2 * 128 * 64 + 4 * 64 * 64 + 3 * 64 * 96
    done = check(tmp_path)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"{tmp_path}: ok",
        f"llama, {matrices + 3 * 64:,} parameters",
        f"12 tensors in 2 file(s), {2 * matrices + 4 * 3 * 64:,} bytes",
        f"BF16           9 tensors, {2 * matrices:,} bytes",
        "F32            3 tensors, 768 bytes",
    ]


@pytest.mark.parametrize(
    ("config", "changes", "path", "message"),
    [
        ({}, {"model.norm.weight": None}, "model.norm.weight", "missing: decoder.final_layernorm.weight"),
        ({}, {"model.norm.bias": ("F32", (64,))}, "model.norm.bias", "unknown: "),
        ({}, {"lm_head.weight": ("BF16", (64, 64))}, "lm_head.weight", "expected the shape [128, 64], got [64, 64]"),
        ({"num_hiden_layers": 1}, {}, "$.num_hiden_layers", "unknown to Bridge"),
    ],
)
def test_problems_are_told_by_name(
    config: dict[str, Any], changes: dict[str, Tensor | None], path: str, message: str, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in (LLAMA_TENSORS | changes).items() if tensor is not None}
    write_folder(tmp_path, LLAMA | config, tensors, files=2)
    done = check(tmp_path, "--json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert report["ok"] is False
    (problem,) = report["problems"]
    assert problem["path"] == path
    assert message in problem["message"]
    assert (problem["line"] is not None) == path.startswith("$")  # config.json has lines
    told = check(tmp_path)
    assert f"{path}: " in str(told.exception)


def test_torch_is_not_imported(tmp_path: Path) -> None:
    write_folder(tmp_path, LLAMA, LLAMA_TENSORS, files=1)
    code = (
        "import sys; from bridge.config.cli.entry import bridge\n"
        f"bridge(['check-hf', {str(tmp_path)!r}], standalone_mode=False)\n"
        "print({'torch', 'megatron', 'transformers'} & {name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
