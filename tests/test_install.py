"""Each package installs from its wheel and works with only the packages it depends on."""

import json
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from environments import PACKAGES, Environment, workspace_versions

ROOT = Path(__file__).parents[1]
TINY = ROOT / "packages/bridge-models/src/bridge/models/presets/tiny.yaml"
FIVE_ERRORS = """\
_target_: bridge.models.gpt.GPTModelConfig
vocab_size: many
position_embedding_type: ropes
transformer:
  num_layer: 4
  hidden_size: 64
  num_attention_heads: 4
  params_dtype: torch.bfloat61
  activation_func: os.system
"""
FIVE_LINES = [2, 3, 5, 8, 9]
COMMANDS = [
    ["validate", "five.yaml", "tiny.yaml"],
    ["validate", "--json", "five.yaml"],
    ["show", "tiny.yaml", "transformer.num_layers=8"],
    ["diff", "tiny.yaml", "other.json"],
    ["diff", "--json", "--as-written", "tiny.yaml", "other.json"],
    ["fingerprint", "tiny.yaml"],
    ["fingerprint", "five.yaml"],
    ["schema"],
    ["schema", "bridge.models.gpt.GPTModelConfig"],
    ["schema", "bridge.models.gpt.GPTModelConfi"],
    ["migrate", "other.json"],
    ["migrate", "tiny.yaml", "--to", "run-config"],
    ["migrate", "run_config.yaml"],
    ["to-megatron-lm", "tiny.yaml"],
]
RUN_CONFIG = """\
model:
  _target_: megatron.training.models.gpt.GPTModelConfig
  _builder_: megatron.training.models.gpt.GPTModelBuilder
  vocab_size: 256
  transformer:
    _target_: megatron.core.transformer.transformer_config.TransformerConfig
    num_layers: 2
    hidden_size: 64
    num_attention_heads: 4
    params_dtype: {_target_: torch.bfloat16, _call_: false}
train: {micro_batch_size: 1}
"""

BAD_DOCUMENTS = {
    "not YAML": "a: [1,\n",
    "a list": "- 1\n- 2\n",
    "a key twice": "seq_length: 8\nseq_length: 16\n",
    "a target nobody declared": "_target_: os.system\n",
}


def module(package: str) -> str:
    return package.replace("-", ".")


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    """Install bridge-config and its requirements, which do not include torch."""
    folder = tmp_path_factory.mktemp("light")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(workspace_versions()))
    environment = Environment.create(folder / "venv")
    environment.install("--constraint", constraints, wheels["bridge-config"])
    return environment


@pytest.mark.parametrize("package", PACKAGES)
def test_a_wheel_contains_only_its_package(package: str, wheels: dict[str, Path]) -> None:
    folder = module(package).replace(".", "/")
    with zipfile.ZipFile(wheels[package]) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
        information = next(name.split("/")[0] for name in files if ".dist-info/" in name)
        metadata = message_from_bytes(archive.read(f"{information}/METADATA"))
        licence = archive.read(f"{information}/licenses/LICENSE").decode()
    assert f"{folder}/py.typed" in files
    assert all(name.startswith((f"{folder}/", f"{information}/")) for name in files)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "END OF TERMS AND CONDITIONS" in licence


def test_config_installs_without_torch(light: Environment) -> None:
    heavy = "import importlib.util as u; print([n for n in ('torch', 'megatron', 'numpy') if u.find_spec(n)])"
    assert light.run("python", "-c", heavy).stdout == "[]\n"
    light.check()
    imported = light.run("python", "-W", "error", "-c", "from bridge.config import *")
    assert (imported.returncode, imported.stdout, imported.stderr) == (0, "", "")


def test_bridge_config_installs_the_command(light: Environment) -> None:
    helped = light.run("bridge", "--help")
    assert helped.returncode == 0, helped.stderr
    assert "validate" in helped.stdout


@pytest.mark.parametrize("text", BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS)
def test_validate_reports_problems_without_torch(light: Environment, tmp_path: Path, text: str) -> None:
    document = tmp_path / "document.yaml"
    document.write_text(text)
    validated = light.run("bridge", "validate", document)
    said = validated.stdout + validated.stderr
    assert validated.returncode == 1, said
    assert "document.yaml" in said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "five.yaml").write_text(FIVE_ERRORS)
    (folder / "tiny.yaml").write_text(TINY.read_text())
    (folder / "run_config.yaml").write_text(RUN_CONFIG)
    other = yaml.safe_load(TINY.read_text())
    other["transformer"] |= {"num_layers": 8, "bf16": False}
    (folder / "other.json").write_text(json.dumps(other))
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_prints_the_same_without_torch(light: Environment, documents: Path, command: list[str]) -> None:
    alone = light.run("bridge", *command, cwd=documents)
    full = Environment(Path(sys.prefix)).run("bridge", *command, cwd=documents)
    assert (alone.returncode, alone.stdout, alone.stderr) == (full.returncode, full.stdout, full.stderr)
    assert "Traceback" not in alone.stderr
    assert alone.returncode == int("five.yaml" in command or command[-1].endswith("Confi"))


def test_the_sweep_in_the_documentation_runs_without_torch(light: Environment, documents: Path) -> None:
    program = ROOT / "docs/programs/sweep.py"
    settings = ("transformer.num_layers=4,8", "transformer.num_attention_heads=4,5", "transformer.bf16=false,False")
    swept = light.run("python", program, "tiny.yaml", "swept", *settings, "--", "sbatch", "train.sbatch", cwd=documents)
    commands = swept.stdout.splitlines()
    assert [command.split(" swept/")[0] for command in commands] == ["sbatch train.sbatch"] * 2, swept
    validated = light.run("bridge", "validate", *(command.split()[-1] for command in commands), cwd=documents)
    assert validated.returncode == 0, validated.stderr
    assert swept.returncode == 1
    assert swept.stderr.count("num_attention_heads: must divide hidden_size = 64") == 4
    assert swept.stderr.count("the same model as") == 2


def test_five_errors_give_five_lines_without_torch(light: Environment, documents: Path) -> None:
    done = light.run("bridge", "validate", "five.yaml", cwd=documents)
    assert done.returncode == 1
    assert [int(line.split(":")[1]) for line in done.stderr.splitlines()] == FIVE_LINES


def test_layouts_require_bridge_dist(light: Environment, documents: Path) -> None:
    done = light.run("bridge", "validate", "tiny.yaml", "--layout", "tp=2", cwd=documents)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--layout requires bridge-dist, which is not installed: pip install bridge-dist" in done.stderr


def test_a_missing_package_is_named(light: Environment, documents: Path) -> None:
    done = light.run("bridge", "build", "tiny.yaml", cwd=documents)
    assert (done.returncode, done.stdout) == (2, "")
    assert "'build' comes with bridge-dist, which is not installed: pip install bridge-dist" in done.stderr
    versions = light.run("bridge", "--version").stdout.splitlines()
    assert versions[1:] == [f"{name} is not installed" for name in (*PACKAGES[1:], "megatron-core", "torch")]


def test_what_is_missing_is_shown_without_torch(light: Environment) -> None:
    first = light.run("bridge")
    assert first.returncode == 0, first.stderr
    assert "bridge validate my-model.yaml" in first.stdout
    assert "bridge build" not in first.stdout
    assert "More commands come with bridge-dist and bridge-models: pip install" in first.stdout
    doctor = light.run("bridge", "doctor", "--json")
    assert doctor.returncode == 0, doctor.stderr
    found = {finding["name"]: finding for finding in json.loads(doctor.stdout)}
    assert found["torch"]["value"] == "not installed"
    assert "adds bridge build, verify, plan" in found["bridge-dist"]["meaning"]


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_a_package_requires_only_the_layers_below(package: str, wheels: dict[str, Path], tmp_path: Path) -> None:
    layers = PACKAGES.index(package) + 1
    environment = Environment.create(tmp_path / "venv")
    environment.borrow_third_party()
    environment.install("--no-deps", "--no-index", *(wheels[name] for name in PACKAGES[:layers]))
    environment.check()
    program = f"""
import pkgutil, {module(package)}, bridge
assert {module(package)}.__file__.startswith({str(environment.path)!r})
print(sorted(m.name for m in pkgutil.iter_modules(bridge.__path__)))
"""
    imported = environment.run("python", "-c", program)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout == f"{sorted(name.removeprefix('bridge-') for name in PACKAGES[:layers])}\n"
    helped = environment.run("bridge", "--help")
    assert helped.returncode == 0, helped.stderr
    assert ("\n  build " in helped.stdout) == (layers > PACKAGES.index("bridge-dist"))
    assert "cannot be loaded" not in helped.stdout
