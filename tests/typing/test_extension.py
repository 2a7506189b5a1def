"""A model family outside the workspace type-checks with the built wheels and is trained by `bridge build`."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from environments import PACKAGES, Environment, uv

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension's sources, away from the workspace."""
    return Path(shutil.copytree(HERE / "extension", tmp_path_factory.mktemp("author") / "extension"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path], extension: Path) -> Environment:
    """All four packages and the extension, installed from wheels."""
    folder = tmp_path_factory.mktemp("environment")
    uv("build", "--wheel", "--out-dir", folder, extension)
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


def test_wrong_programs_fail_as_expected(environment: Environment, extension: Path, tmp_path: Path) -> None:
    shutil.copytree(HERE / "wrong", tmp_path, dirs_exist_ok=True)
    configuration = extension / "pyproject.toml"
    programs = sorted(tmp_path.glob("*.py"))
    checked = mypy(environment, "--config-file", configuration, *programs, cwd=tmp_path)
    found = re.findall(r"^(\S+\.py):(\d+): error: (.*)$", checked.stdout, re.MULTILINE)
    expected = [
        (program.name, str(number), message)
        for program in programs
        for number, line in enumerate(program.read_text().splitlines(), start=1)
        for message in re.findall(r"# E: (.*)$", line)
    ]
    assert expected
    assert sorted(found) == sorted(expected), checked.stdout + checked.stderr


def build(environment: Environment, *args: str, cwd: Path) -> dict[str, Any]:
    built = environment.run("bridge", "build", "bigram.yaml", *args, "--steps", "3", "--json", cwd=cwd)
    assert built.returncode == 0, built.stderr
    report: dict[str, Any] = json.loads(built.stdout)
    return report


def test_extension_is_built_and_trained(environment: Environment, extension: Path) -> None:
    report = build(environment, "--nproc", "2", "--tp", "2", cwd=extension)
    assert report["parameters"] == 2 * 256 * 32
    assert [chunk["wrappers"][-1] for rank in report["ranks"] for chunk in rank["chunks"]] == ["BigramModel"] * 2
    assert report["losses"][0] == pytest.approx(
        math.log(256), abs=1e-3
    )  # an untrained model: all bytes are equally likely

    # One rank gives the same loss. Without the hook in the document the embedding has a gradient, too.
    without_hook = build(environment, "pre_wrap_hooks=[]", cwd=extension)
    assert without_hook["losses"][0] == pytest.approx(report["losses"][0], abs=1e-5)
    assert without_hook["grad_norms"][0] > report["grad_norms"][0] * 1.01
