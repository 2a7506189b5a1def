"""Virtual environments with packages installed from built wheels, outside the workspace; runs of commands."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("bridge-config", "bridge-builders", "bridge-dist", "bridge-models")
"""From the lowest layer to the highest."""
SMALL_DOCUMENT = """\
_target_: bridge.models.gpt.GPTModelConfig
vocab_size: 256
seq_length: 64
transformer:
  num_layers: 4
  hidden_size: 32
  num_attention_heads: 4
"""


def uv(*args: str | Path) -> str:
    """Run the uv that runs these tests, or the one on PATH.

    Raises:
        FileNotFoundError: uv is not installed.
        RuntimeError: uv failed; the message contains its output.
    """
    executable = os.environ.get("UV") or shutil.which("uv")
    if executable is None:
        raise FileNotFoundError("these tests need uv: run them with `uv run pytest`, or put uv on PATH")
    result = subprocess.run([executable, *args], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"uv {' '.join(map(str, args))}\n{result.stdout}{result.stderr}")
    return result.stdout


def build_wheels(folder: Path) -> dict[str, Path]:
    """Build every package of the workspace into ``folder``; return the wheels by package."""
    uv("build", "--all-packages", "--wheel", "--out-dir", folder)
    return {name: next(folder.glob(f"{name.replace('-', '_')}-*.whl")) for name in PACKAGES}


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> "Environment":
        """Create an empty environment with the Python that runs the tests."""
        uv("venv", "--quiet", "--python", sys.executable, path)
        return cls(path)

    def install(self, *args: str | Path) -> None:
        """Run `uv pip install` in this environment, without the workspace's constraints: ``args`` has its own."""
        uv("pip", "install", "--quiet", "--no-config", "--python", self.path, *args)

    def check(self) -> None:
        """Run `uv pip check`.

        Raises:
            RuntimeError: a requirement of an installed package is missing.
        """
        uv("pip", "check", "--python", self.path)

    def borrow_third_party(self) -> None:
        """Link all third-party packages of the workspace's environment, to avoid a second copy of torch."""
        there = Path(sysconfig.get_path("purelib"))
        here = next(self.path.glob("lib/python*/site-packages"))
        for entry in there.iterdir():
            target = here / entry.name
            if entry.name.startswith(("bridge", "_virtualenv")) or target.exists():
                continue
            if entry.suffix == ".dist-info":  # uv does not see these through links
                shutil.copytree(entry, target)
            else:
                target.symlink_to(entry)

    def run(self, command: str, *args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment without the workspace's paths; do not check its exit code."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return subprocess.run(
            [self.path / "bin" / command, *args],
            cwd=cwd or self.path,
            env={**kept, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )


def workspace_versions() -> Sequence[str]:
    """Return the installed versions in the workspace as constraints: `name==version`."""
    return uv("pip", "freeze", "--exclude-editable", "--python", sys.executable).splitlines()


def run_process(
    *command: str, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command with additional environment variables; do not check its exit code."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | (environment or {}), **options
    )


def run_command(*arguments: str | Path) -> tuple[int, str, str]:
    """Run `bridge` in this process, which has already imported Megatron; ranks are separate processes.

    Returns the exit code, standard output and standard error, without the output of ranks.
    """
    from bridge.config.cli.entry import main  # here: other tests install environments without it

    out, err = io.StringIO(), io.StringIO()
    variables = dict(os.environ)
    code: object = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    finally:
        os.environ.clear()
        os.environ.update(variables)
    assert code is None or isinstance(code, int)
    return code or 0, out.getvalue(), err.getvalue()


_IN_ONE_PROCESS = """\
import contextlib, io, json, sys
from bridge.config.cli.entry import main
results = []
for arguments in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def run_in_one_process(
    lines: Sequence[Sequence[str]], folder: Path, *, python: str | Path = sys.executable
) -> list[tuple[int, str, str]]:
    """Run many command lines of `bridge` in one process, because importing Megatron takes seconds.

    Returns the exit code, standard output and standard error of each.
    """
    done = subprocess.run(
        [python, "-c", _IN_ONE_PROCESS],
        input=json.dumps(lines),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    results: list[tuple[int, str, str]] = json.loads(done.stdout)
    return results
