"""Start commands in a folder that identifies their processes, and inject faults into one rank."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

BRIDGE = str(Path(sysconfig.get_path("scripts")) / "bridge")

# A sitecustomize.py, which Python runs at the start of every process: it replaces a function on rank 1.
FAULT = """
import functools, importlib, os, pathlib, signal, sys

def fail(*args, **options):
    if os.environ.get("RANK") == "1":
        pathlib.Path(__file__).with_name("mark").touch()
        {action}
    return original(*args, **options)

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "bridge.dist.run.world":
            return None
        sys.meta_path.remove(Finder)
        module = importlib.import_module("{module}")
        *owners, function = "{function}".split(".")
        owner = functools.reduce(getattr, owners, module)
        global original
        original = getattr(owner, function)
        setattr(owner, function, functools.wraps(original)(fail))
        return None

sys.meta_path.insert(0, Finder)
"""
HOOK = """
import os, pathlib

def hook(stages):
    if os.environ["RANK"] == "1":
        pathlib.Path(__file__).with_name("mark").touch()
        raise ValueError("a mistake of rank 1")
    return stages
"""


class Folder:
    """A folder for the files of a run; its path identifies the processes of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path / "temporary"
        self.temporary.mkdir()

    def mark_at(self, place: str, action: str = "pass") -> None:
        """Make rank 1 create the file `mark` and run `action` when it calls the function ``module:function``."""
        module, _, function = place.partition(":")
        (self.path / "sitecustomize.py").write_text(FAULT.format(action=action, module=module, function=function))

    def add_hook(self) -> None:
        """Install a hook that documents may name and that raises on rank 1."""
        (self.path / "faulty.py").write_text(HOOK)
        installed = self.path / "faulty-1.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
        (installed / "entry_points.txt").write_text("[bridge.targets]\nfaulty.hook = faulty:hook\n")

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(self.path),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **variables,
        }
        return subprocess.Popen(
            [BRIDGE, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.path,
        )

    def processes(self) -> list[int]:
        """Return the live processes that ``start`` started, directly or not."""
        mark = f"TMPDIR={self.temporary}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # the process has ended or belongs to another user
                continue
        return found
