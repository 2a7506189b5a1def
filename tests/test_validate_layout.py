"""`bridge validate --layout` checks a document with a layout."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from environments import run_in_one_process
from test_preflight import CASES, Setting, megatron_fsdp

from bridge.config import Document
from bridge.dist import check_document
from bridge.dist.checks.document import refuse_before_imports
from bridge.dist.checks.preflight import Environment
from bridge.dist.checks.rules import machine
from bridge.dist.errors import LayoutError, OptionsError
from bridge.dist.wrapper import Wrapper

DOCUMENT = """\
_target_: bridge.models.gpt.GPTModelConfig
vocab_size: 256
share_embeddings_and_output_weights: true
transformer:
  num_layers: 4
  hidden_size: 32
  num_attention_heads: 4
  pipeline_model_parallel_size: 2
  pipeline_dtype: torch.float32
"""
WRONG_TYPE = DOCUMENT.replace("num_layers: 4", "num_layers: four")

# The command line, its exit code, and parts of its output on stdout or stderr, in order.
LINES: dict[str, tuple[list[str], int, list[str]]] = {
    "it fits": (["good.yaml", "tiny", "--layout", "tp=2,pp=2,dp=2"], 0, ["good.yaml: ok", "tiny: ok"]),
    "the document's sizes": (
        ["good.yaml", "--layout", "dp=2", "--wrap", "megatron-fsdp"],
        1,
        ["good.yaml: Megatron-FSDP does not support pipeline parallelism", "[megatron-fsdp-pipeline]"],
    ),
    "sizes in place of the document's": (
        ["good.yaml", "--layout", "dp=2,pp=1", "--wrap", "megatron-fsdp"],
        0,
        ["good.yaml: ok"],
    ),
    "all problems are reported": (
        [
            "good.yaml",
            "transformer.overlap_p2p_comm=true",
            "transformer.pipeline_dtype=torch.bfloat16",
            "--layout",
            "dp=2",
            "--wrap",
            "torch-fsdp2",
        ],
        1,
        ["[overlapped-messages-without-interleaving]", "[pipeline-dtype]", "[torch-fsdp2-tied-embeddings]"],
    ),
    "all sizes are checked": (
        ["tiny", "--layout", "tp=3"],
        1,
        ["num_attention_heads = 4 is not", "ffn_hidden_size = 256 is not", "vocab_size 256 is not divisible"],
    ),
    "derived fields": (
        ["good.yaml", "transformer.pipeline_dtype=null", "transformer.bf16=true", "--layout", "pp=2"],
        0,
        ["good.yaml: ok"],
    ),
    "a family's rules": (["t5-tiny", "--layout", "pp=2"], 1, ["[t5-pipeline]"]),
    "stages of a pattern": (
        ["hybrid-tiny", "hybrid_layer_pattern=M*|M*", "transformer.num_layers=4", "--layout", "pp=4"],
        1,
        ["has 2 stages, the pipeline has 4", "[hybrid-stages]"],
    ),
    "the ranks": (
        ["tiny", "transformer.num_moe_experts=4", "transformer.add_bias_linear=false", "--layout", "ep=4,dp=2"],
        1,
        ["tiny: etp x ep = 1 x 4 = 4 does not divide the 2 ranks"],
    ),
    "errors of reading come first": (["type.yaml", "--layout", "tp=3"], 1, ["type.yaml:5:3: $.transformer.num_layers"]),
    "unknown axis": (["tiny", "--layout", "tp=2,xp=2"], 2, ["unknown layout axes: xp; choose from tp, pp, vp"]),
    "invalid size": (["tiny", "--layout", "tp=two"], 2, ["sizes from 1 to 999,999,999), got 'tp=two'"]),
    "duplicate axis": (["tiny", "--layout", "tp=2,tp=4"], 2, ["each axis once"]),
    "unknown wrapper": (["tiny", "--layout", "tp=2", "--wrap", "fsdp"], 2, ["unknown wrapper 'fsdp'", "torch-fsdp2"]),
    "wrapper without a layout": (["tiny", "--wrap", "ddp"], 2, ["--wrap requires --layout"]),
    "values that were left out": (
        ["tiny", "_omitted_=[{path: $.transformer.init_method, reason: lost}]", "--layout", "tp=2"],
        0,
        ["tiny: ok", "tiny: note: the document was written without $.transformer.init_method (lost)"],
    ),
    "JSON": (["good.yaml", "--layout", "dp=2", "--wrap", "megatron-fsdp", "--json"], 1, ['"ok": false']),
}


def can_be_a_document(setting: Setting) -> bool:
    """Return whether a setting can be expressed by a document, a layout, and a wrapper with default options."""
    usual = not setting.ddp or setting.ddp == megatron_fsdp()["ddp"]
    return usual and not setting.assigned and setting.embedding_ranks is None and setting.environment == Environment()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "good.yaml").write_text(DOCUMENT)
    (folder / "type.yaml").write_text(WRONG_TYPE)
    lines = [["validate", *arguments] for arguments, *_ in LINES.values()]
    return dict(zip(LINES, run_in_one_process(lines, folder), strict=True))


@pytest.mark.parametrize("name", LINES)
def test_validate_layout(name: str, results: dict[str, tuple[int, str, str]]) -> None:
    _, expected_code, expected = LINES[name]
    code, out, err = results[name]
    output = out + err
    assert code == expected_code or (code is None and expected_code == 0), output
    positions = [output.find(part) for part in expected]
    assert -1 not in positions, output
    assert positions == sorted(positions)
    assert "Traceback" not in output
    assert "Warning" not in output


def test_validate_layout_prints_json(results: dict[str, tuple[int, str, str]]) -> None:
    (verdict,) = json.loads(results["JSON"][1])
    (problem,) = verdict["problems"]
    assert (verdict["source"], verdict["ok"], problem["path"]) == ("good.yaml", False, "$")
    assert problem["message"].endswith("[megatron-fsdp-pipeline]")


MACHINE_RULES = {rule.name for rule in machine.RULES}


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if can_be_a_document(case.refused) and name not in MACHINE_RULES]
)
def test_documents_and_live_configurations_give_the_same_problems(name: str) -> None:
    setting, world_size = CASES[name].refused, CASES[name].world_size
    document = Document.of(setting.make_config())
    layout = {axis: size for axis, size in asdict(setting.make_layout(world_size)).items() if size is not None}
    wrapper = setting.make_options().wrapper
    found = check_document(document, layout, wrapper=wrapper)
    assert [problem.message.rpartition(" ")[2] for problem in found] == [f"[{name}]"]
    assert spell_out(document)
    assert check_document(document, layout, wrapper=wrapper) == found


def spell_out(document: Document) -> set[str]:
    """Give dtypes and functions of the transformer in the long form; return their fields."""
    transformer = document.data["transformer"]
    named = {
        field: value for field, value in transformer.items() if isinstance(value, str) and value.startswith("torch.")
    }
    for field, value in named.items():
        transformer[field] = {"_target_": value, "_call_": False}
    return set(named)


def test_a_dtype_in_the_long_form_is_accepted() -> None:
    overrides = ["transformer.bf16=true", "transformer.pipeline_dtype={_target_: torch.bfloat16, _call_: false}"]
    document = Document.load("tiny", [*overrides, "transformer.pipeline_model_parallel_size=2"])
    assert check_document(document, {}) == []
    refuse_before_imports(document, wrapper=Wrapper.DDP)


def test_validate_layout_needs_no_torch() -> None:
    code = "from bridge.config import Document; from bridge.dist import check_document; import sys;"
    code += "check_document(Document.load('tiny'), {'tp': 3}); assert not {'torch', 'megatron'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_check_document_returns_problems(tmp_path: Path) -> None:
    document = Document.load("tiny")
    before = document.to_yaml()
    assert check_document(document, {"pp": 2, "vp": 2, "dp": 2}) == []
    (problem,) = check_document(document, {"pp": 2}, wrapper="megatron-fsdp")
    assert problem.message.endswith("[megatron-fsdp-pipeline]")
    assert document.to_yaml() == before
    with pytest.raises(LayoutError, match="xp"):
        check_document(document, {"xp": 2})
    with pytest.raises(OptionsError, match="fsdp3"):
        check_document(document, {}, wrapper="fsdp3")
