"""A model family outside the workspace type-checks with the built wheels and is trained by `bridge build`."""

import json
import math
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from environments import PACKAGES, Environment, run_in_one_process, uv

HERE = Path(__file__).parent
AURORA = HERE / "aurora"


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension's sources, away from the workspace."""
    return Path(shutil.copytree(HERE / "extension", tmp_path_factory.mktemp("author") / "extension"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path], extension: Path) -> Environment:
    """All four packages and both extensions, installed from wheels."""
    folder = tmp_path_factory.mktemp("environment")
    uv("build", "--wheel", "--out-dir", folder, extension)
    uv("build", "--wheel", "--out-dir", folder, shutil.copytree(AURORA, folder / "aurora"))
    created = Environment.create(folder / "venv")
    created.borrow_third_party()
    created.install("--no-deps", "--no-index", *(wheels[name] for name in PACKAGES), *folder.glob("*.whl"))
    created.check()
    return created


def mypy(environment: Environment, *args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run mypy in the environment; one cache serves all runs, since most of the time goes into torch and Megatron."""
    return environment.run("python", "-m", "mypy", "--cache-dir", environment.path / "mypy", *args, cwd=cwd)


def test_extension_type_checks(environment: Environment, extension: Path) -> None:
    checked = mypy(environment, "--strict", "src", cwd=extension)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_an_outside_architecture_type_checks(environment: Environment, extension: Path) -> None:
    configuration = extension / "pyproject.toml"
    checked = mypy(environment, "--strict", "--config-file", configuration, "src", cwd=AURORA)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_commands_know_an_outside_architecture(environment: Environment, tmp_path: Path) -> None:
    config = {"model_type": "aurora", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    document = tmp_path / "document.yaml"
    converted = environment.run("bridge", "from-hf", tmp_path, "-o", document)
    assert converted.returncode == 0, converted.stderr
    written = environment.run("bridge", "to-hf", document)
    assert json.loads(written.stdout).items() >= config.items()
    shapes = {
        "model.tok_embeddings.weight": [32000, 64],
        "model.layers.0.attention_norm.weight": [64],
        **{f"model.layers.0.attention.{name}.weight": [64, 64] for name in ("wq", "wk", "wv", "wo")},
        "model.layers.0.ffn_norm.weight": [64],
        **{f"model.layers.0.feed_forward.{name}.weight": [5632, 64] for name in ("w1", "w3")},
        "model.layers.0.feed_forward.w2.weight": [64, 5632],
        "model.norm.weight": [64],
        "lm_head.weight": [32000, 64],
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    checked = environment.run("bridge", "check-hf", tmp_path, "--json")
    report = json.loads(checked.stdout)
    assert (report["ok"], report["model_type"], report["tensors"]) == (True, "aurora", len(shapes)), report


def list_expected_errors(programs: list[Path]) -> list[tuple[str, int, str]]:
    """Return file, line and message of each comment ``# E: message``."""
    expected = [
        (program.name, number, message)
        for program in programs
        for number, line in enumerate(program.read_text().splitlines(), start=1)
        for message in re.findall(r"# E: (.*)$", line)
    ]
    assert expected
    return sorted(expected)


def test_wrong_programs_fail_as_expected(environment: Environment, extension: Path, tmp_path: Path) -> None:
    shutil.copytree(HERE / "wrong", tmp_path, dirs_exist_ok=True)
    configuration = extension / "pyproject.toml"
    programs = sorted(tmp_path.glob("*.py"))
    checked = mypy(environment, "--config-file", configuration, *programs, cwd=tmp_path)
    found = re.findall(r"^(\S+\.py):(\d+): error: (.*)$", checked.stdout, re.MULTILINE)
    errors = sorted((name, int(line), message) for name, line, message in found)
    assert errors == list_expected_errors(programs), checked.stdout + checked.stderr


def test_pyright_reports_the_same_lines(environment: Environment, extension: Path, tmp_path: Path) -> None:
    """The extension has no error; a wrong program has one on each line on which mypy has one."""
    programs = sorted(shutil.copytree(HERE / "wrong", tmp_path / "wrong").glob("*.py"))
    options = {"include": ["wrong", str(extension / "src")], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(options))
    python = environment.path / "bin" / "python"
    program = Path(sysconfig.get_path("scripts")) / "basedpyright"
    command = [program, "--pythonpath", python, "--level", "error", "--outputjson"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    found = json.loads(checked.stdout)["generalDiagnostics"]
    lines = {(Path(one["file"]).name, one["range"]["start"]["line"] + 1) for one in found}
    assert lines == {(name, line) for name, line, _ in list_expected_errors(programs)}, found


def test_commands_know_the_extension(environment: Environment) -> None:
    presets = environment.run("bridge", "presets")
    assert re.search(r"^ *bigram-tiny +Bigram over bytes", presets.stdout, re.MULTILINE), presets
    shown = environment.run("python", "-X", "importtime", environment.path / "bin/bridge", "show", "bigram-tiny")
    assert "_target_: bigram.BigramConfig" in shown.stdout
    assert not re.search(r" (torch|bigram\.model)$", shown.stderr, re.MULTILINE)
    laid_out = environment.run("bridge", "validate", "bigram-tiny", "--layout", "pp=2")
    assert (laid_out.returncode, "set pp = 1 [in-one-piece]" in laid_out.stderr) == (1, True), laid_out
    misspelt = environment.run("bridge", "validate", "bigram-tiny", "loss.temprature=2")
    assert "did you mean 'temperature'?" in misspelt.stderr, misspelt


def test_extension_is_built_and_trained(environment: Environment, extension: Path) -> None:
    build = ["build", "bigram-tiny", "--steps", "3", "--json"]
    lines = [[*build, "--nproc", "2", "--tp", "2"], [*build, "pre_wrap_hooks=[]"]]
    built = run_in_one_process(lines, extension, python=environment.path / "bin/python")
    assert not any(code for code, _, _ in built), built
    report, without_hook = (json.loads(out) for _, out, _ in built)
    assert report["parameters"] == 2 * 256 * 32
    assert [chunk["wrappers"][-1] for rank in report["ranks"] for chunk in rank["chunks"]] == ["BigramModel"] * 2
    assert report["losses"][0] == pytest.approx(
        math.log(256), abs=1e-3
    )  # an untrained model: all bytes are equally likely

    # One rank gives the same loss. Without the hook in the document the embedding has a gradient, too.
    assert without_hook["losses"][0] == pytest.approx(report["losses"][0], abs=1e-5)
    assert without_hook["grad_norms"][0] > report["grad_norms"][0] * 1.01
