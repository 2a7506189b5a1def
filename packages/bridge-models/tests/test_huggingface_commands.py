"""`bridge from-hf` and `bridge to-hf`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.config import Document
from bridge.config.cli.entry import main
from bridge.models.huggingface import to_hf

Run = Callable[..., tuple[int, str, str]]
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


@pytest.fixture
def bridge(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command and returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(leaving.value.code or 0), captured.out, captured.err

    return run


def write_config(folder: Path, config: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(config, indent=1))
    return file


def test_from_hf_reads_files_and_folders_and_writes_yaml_or_json(
    bridge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_config(tmp_path, LLAMA | {"_name_or_path": "one/model", "quantization_config": {}})
    code, yaml, notes = bridge("from-hf", file)
    assert (code, notes) == (
        0,
        f"{file}: note: $.quantization_config is left out: it describes how the published weights are stored\n",
    )
    assert bridge("from-hf", tmp_path) == (code, yaml, notes)
    monkeypatch.setattr("sys.stdin", file.open())
    assert bridge("from-hf", "-") == (code, yaml, notes.replace(str(file), "-"))
    assert f"did you mean {str(file)!r}" in bridge("from-hf", tmp_path / "confg.json")[2]
    _, text, _ = bridge("from-hf", file, "--json", "--model-id", "another/model")
    assert json.loads(text)["hf_model_id"] == "another/model"
    for name in ("made.yaml", "made.json"):
        assert bridge("from-hf", file, "-o", tmp_path / name)[:2] == (0, "")
        assert Document.load(tmp_path / name).data == json.loads(text) | {"hf_model_id": "one/model"}
    code, back, _ = bridge("to-hf", tmp_path / "made.yaml")
    assert json.loads(back) == to_hf(json.loads(text)).data | {"_name_or_path": "one/model"}
    to_folder = ("to-hf", tmp_path / "made.yaml", "vocab_size=64", "-o", tmp_path)
    assert bridge(*to_folder)[::2] == (
        1,
        f"{file}: file exists: give --force to overwrite it, or another name\n",
    )
    assert bridge(*to_folder, "--force") == (0, "", f"{file}: written\n")
    assert json.loads(file.read_text()) == json.loads(back) | {"vocab_size": 64}


def test_files_are_overwritten_only_with_force_and_schemas_are_reported(bridge: Run, tmp_path: Path) -> None:
    file, made = write_config(tmp_path, LLAMA), tmp_path / "made.yaml"
    _, _, stderr = bridge("from-hf", file, "-o", made)
    schema = tmp_path / "GPTModelConfig.schema.json"
    assert stderr.startswith(f"{made}: written\n{schema}: JSON Schema of made.yaml, for editors")
    made.write_text("mine\n")
    code, _, stderr = bridge("from-hf", file, "-o", made)
    assert (code, made.read_text()) == (1, "mine\n")
    assert "give --force to overwrite it" in stderr
    assert bridge("from-hf", file, "-o", made, "--force") == (0, "", f"{made}: written\n")
    assert Document.load(made).data["vocab_size"] == 32000


def test_infinity_is_read_as_python_writes_it(bridge: Run, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity], "task_specific_params": "Infinity"}')
    assert bridge("from-hf", file)[0] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "llama",', "config.json:1:24: $: "),
        ('{"model_type": "' + 10**5 * '\\\\"', "config.json:1:"),
        ('{"model_type": "llama", "a.b": 1}', "config.json:1:25: $["),
        ("[]", "config.json: expected a JSON object at the top level"),
        ('{"num_hidden_layers": 2}', "config.json:1:1: $.model_type: missing"),
        ('{"model_type": 3}', "config.json:1:2: $.model_type: expected a string, got 3"),
        ('{"model_type": "lama"}', "unknown architecture 'lama'; did you mean 'llama'?"),
        ('{"model_type": "llama",\n "rope_scaling": {"type": "dynamic"}}', "config.json:2:19: $.rope_scaling.type: "),
        ('{"model_type": "llama", "num_hiden_layers": 2}', "did you mean 'num_hidden_layers'?"),
        (
            '{"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, '
            '"num_experts_per_tok": null}',
            "$.topk_method: group_limited_greedy needs n_group, topk_group and num_experts_per_tok",
        ),
    ],
)
def test_errors_have_a_position(bridge: Run, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    code, out, stderr = bridge("from-hf", file)
    assert (code, out) == (1, "")
    assert message in stderr


def test_a_config_json_must_be_a_json_file(bridge: Run, tmp_path: Path) -> None:
    code, out, stderr = bridge("to-hf", "gpt2-124m", "-o", tmp_path / "config.yaml")
    assert (code, out) == (1, "")
    assert stderr.endswith("config.yaml: expected a .json file, or a folder for config.json\n")


def test_a_name_that_is_too_long_is_an_error(bridge: Run, tmp_path: Path) -> None:
    name = tmp_path / f"{'x' * 300}.json"
    assert bridge("from-hf", name) == (1, "", f"{name}: file not found: give a config.json, or a folder with one\n")
    assert bridge("to-hf", "gpt2-124m", "-o", name) == (1, "", f"{name} cannot be written: File name too long\n")


def test_missing_files_and_unsupported_models_are_errors(bridge: Run, tmp_path: Path) -> None:
    code, _, stderr = bridge("from-hf", tmp_path)
    assert code == 1
    assert stderr == f"{tmp_path / 'config.json'}: file not found: give a config.json, or a folder with one\n"
    code, out, stderr = bridge("to-hf", "mla-tiny")
    assert (code, out) == (1, "")
    assert "no architecture can express this model; the closest is deepseek_v2" in stderr
    assert "$.transformer.num_moe_experts" in stderr
    code, out, stderr = bridge("to-hf", "gemma-2b", "transformer.mup_embedding_mult=.inf")
    assert (code, out) == (1, "")
    assert "scales embeddings by sqrt(hidden_size): must be 45.2" in stderr


def test_every_command_reads_a_folder_as_the_document_of_its_model(bridge: Run, tmp_path: Path) -> None:
    folder, document = tmp_path / "model", tmp_path / "model.yaml"
    folder.mkdir()
    write_config(folder, LLAMA | {"quantization_config": {}})
    note = f"{folder}: note: $.quantization_config is left out: it describes how the published weights are stored\n"
    assert bridge("from-hf", folder, "-o", document)[0] == 0
    code, shown, stderr = bridge("show", folder, "vocab_size=64")
    assert (code, stderr) == (0, note)
    assert shown == bridge("show", document, "vocab_size=64")[1].partition("\n")[2]  # without the line for editors
    assert bridge("validate", folder, "--layout", "tp=2") == (0, f"{folder}: ok\n", note)
    assert bridge("diff", folder, document, "--exit-code") == (0, "", note)
    assert bridge("fingerprint", folder)[1] == bridge("fingerprint", document)[1]
    assert bridge("migrate", folder)[::2] == (0, note)
    assert bridge("to-hf", folder)[1] == bridge("to-hf", document)[1]
    assert Document.load(folder).migrate() == [note.removeprefix(f"{folder}: note: ").rstrip()]


def test_errors_about_folders_say_where_and_what_is_expected(
    bridge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bridge("validate", tmp_path)[::2] == (
        1,
        f"{tmp_path}: is a folder without config.json, latest_checkpointed_iteration.txt, "
        "latest_train_state.pt or metadata.json: "
        "give a document, or a folder that has one\n",
    )
    (tmp_path / "mine.yaml").touch()
    assert bridge("validate", tmp_path)[2].endswith(f"; to validate the documents in it, give {tmp_path}/*.yaml\n")
    file = write_config(tmp_path, LLAMA | {"num_hiden_layers": 2})
    assert bridge("validate", tmp_path)[2].startswith(f"{file}:6:2: $.num_hiden_layers: unknown to Bridge")
    write_config(tmp_path, LLAMA)
    code, _, stderr = bridge("migrate", "--write", tmp_path)
    assert code == 2
    assert f"--write changes a file, got '{tmp_path}': leave it out and redirect the output" in stderr
    assert (
        "override 'vocab_size=0': $.vocab_size: must be at least 1" in bridge("validate", tmp_path, "vocab_size=0")[2]
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert bridge("validate", "tiny")[0] == 0  # the preset
    assert bridge("validate", "./tiny")[0] == 1


def test_neither_command_needs_torch_megatron_or_transformers(tmp_path: Path) -> None:
    file = write_config(tmp_path, LLAMA)
    document = tmp_path / "a.yaml"
    code = (
        "import sys; from bridge.config.cli.entry import bridge\n"
        f"for line in (['from-hf', {str(file)!r}, '-o', {str(document)!r}], ['to-hf', {str(document)!r}],"
        f" ['validate', {str(tmp_path)!r}]):\n"
        "    bridge(line, standalone_mode=False)\n"
        "print({'torch', 'megatron', 'transformers', 'numpy'} & {name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
