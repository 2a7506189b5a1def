"""The modules that a command loads at start, and how a signal ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from process_starts import Folder
from rank_functions import fsdp2_loads_the_compiler

BRIDGE = str(Path(sysconfig.get_path("scripts")) / "bridge")

LOADED = """\
import json, sys
from bridge.config.cli.entry import main
from rank_functions import compiler_modules
try:
    main(json.loads(sys.argv[1]))
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(compiler_modules()))
"""


def loaded_compiler_modules(*command: str) -> list[str]:
    """Run a command; return the modules of torch's compiler that it has loaded."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, json.dumps(command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    modules: list[str] = json.loads(done.stdout.splitlines()[-1])
    return modules


@pytest.mark.parametrize(
    "command",
    [
        ("plan", "tiny", "--wrap", "ddp" if fsdp2_loads_the_compiler() else "torch-fsdp2"),
        ("validate", "tiny", "--layout", "tp=2"),
    ],
    ids=lambda command: " ".join(command),
)
def test_commands_that_compile_nothing_do_not_load_the_compiler(command: tuple[str, ...]) -> None:
    assert loaded_compiler_modules(*command) == []


REFUSED: dict[tuple[str, ...], str] = {
    ("plan", "llama-3.1-405b", "--tp", "8", "--pp", "16", "--vp", "8"): (
        "set account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split to True"
    ),
    ("plan", "llama-3.1-8b", "--tp", "2", "--cp", "2", "transformer.sequence_parallel=true", "--seq-length", "4100"): (
        "choose a multiple of 8, such as 4096 or 4104"
    ),
    ("plan", "llama-3.1-8b", "--pp", "4", "--vp", "2", "--dp", "2", "--global-batch-size", "20"): (
        "choose a global batch of 16 or 24 samples"
    ),
    ("build", "tiny", "--nproc", "2", "--tp", "3"): "2 ranks do not fit tp x pp x cp = 3 x 1 x 1 = 3: start 3 ranks",
    ("build", "moe-tiny", "transformer.moe_router_topk=9"): "must be at most num_moe_experts",
    ("build", "tiny", "--nproc", "3", "--steps", "1"): "choose a multiple of 3, such as 6 or 9",
    ("verify", "tiny", "--micro-batch-size", "3"): "choose a multiple of 3, such as 6 or 9",
    ("verify", "moe-tiny", "transformer.moe_router_topk=9"): "must be at most num_moe_experts",
    ("search", "llama-3.1-8b", "--gpus", "64", "--tp", "3"): "64 ranks do not fit tp x pp x cp = 3",
    ("search", "llama-3.1-8b", "--gpus", "96", "--tp", "12"): "num_attention_heads = 32 is not a multiple of tp = 12",
}
REFUSING = """\
import contextlib, io, json, sys
from bridge.config.cli.entry import main
found = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.suppress(SystemExit):
        main(command)
    found.append((err.getvalue(), sorted({"torch", "megatron"} & sys.modules.keys())))
print(json.dumps(found))
"""


def test_impossible_sizes_are_refused_before_torch_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSING, json.dumps(list(REFUSED))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for (err, imported), (command, expected) in zip(json.loads(done.stdout), REFUSED.items(), strict=True):
        assert expected in err, command
        assert imported == [], command


COMPILING = """\
from bridge.dist.process.imports import import_megatron, is_compiler_left_out
import_megatron(with_compiler=False)
import torch
assert is_compiler_left_out()
torch._dynamo.graph_break()  # called by optimizers
assert torch.compile(len) is len and torch.compile(fullgraph=True)(len) is len
assert is_compiler_left_out()
assert torch._dynamo.list_backends()  # this needs the compiler
assert not is_compiler_left_out()
assert "torch._dynamo.trace_rules" in __import__("sys").modules
torch._dynamo.reset()
"""


def test_the_compiler_is_loaded_on_request() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


LIMIT_S = 30  # generous, for a busy machine
SIGNALLED = {
    "build, Ctrl-C": (("build", "tiny", "--nproc", "2", "--steps", "1000000"), signal.SIGINT, 4),
    "verify, SIGTERM": (("verify", "tiny", "--nproc", "2", "--steps", "1000000"), signal.SIGTERM, 3),
    "plan, SIGTERM": (("plan", "llama-3.1-405b", "--gpus", "64", "--wrap", "torch-fsdp2"), signal.SIGTERM, 1),
    "search, Ctrl-C": (("search", "llama-3.1-8b", "--gpus", "64"), signal.SIGINT, 4),
}


@pytest.mark.parametrize("name", SIGNALLED)
def test_a_signal_ends_a_command_and_its_processes(name: str, folder: Folder) -> None:
    command, number, processes = SIGNALLED[name]
    process = folder.start(*command)
    wait_for_work(folder, processes)
    begin = time.monotonic()
    process.send_signal(number)
    _, written = process.communicate(timeout=60)
    assert process.returncode == 128 + number, written
    while folder.processes() and time.monotonic() - begin < LIMIT_S:  # killed processes disappear with a delay
        time.sleep(0.1)
    assert time.monotonic() - begin < LIMIT_S
    assert folder.processes() == []
    assert "Traceback" not in written
    assert "failed" not in written
    left = [entry.name for entry in folder.temporary.iterdir() if not entry.name.startswith("torchinductor_")]
    assert left == []


def wait_for_work(folder: Folder, processes: int) -> None:
    """Wait until a command and its processes run, and one of the last two has used a second of CPU time."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        there = folder.processes()
        if len(there) >= processes and max(map(processor_seconds, there[-2:])) > 1:
            return
        time.sleep(0.2)
    raise TimeoutError(f"{len(folder.processes())} processes, {processes} expected")


def processor_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


ONE_GPU = """
import importlib, os, sys

if os.environ.get("CUDA_VISIBLE_DEVICES") == "0":
    del os.environ["CUDA_VISIBLE_DEVICES"]  # a workstation does not set the variable

def visible():
    return 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else 1

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "bridge.dist.run.pool":
            importlib.import_module("bridge.dist.run.devices")._DRIVER_FILES = ("/dev/null",)
            import torch
            torch.cuda.device_count = visible
            torch.cuda.is_available = lambda: bool(visible())
            sys.meta_path.remove(Finder)
        return None

sys.meta_path.insert(0, Finder)
"""


def test_two_ranks_with_one_gpu_use_the_cpu(folder: Folder) -> None:
    """The first command in the README must work on a workstation."""
    (folder.path / "sitecustomize.py").write_text(ONE_GPU)
    process = folder.start(
        "build", "tiny", "--nproc", "2", "--tp", "2", "--steps", "1", "--json", CUDA_VISIBLE_DEVICES="0"
    )
    output, written = process.communicate(timeout=240)
    assert process.returncode == 0, written
    assert written.count("2 ranks, 1 GPU(s): computing on the CPU") == 1
    assert json.loads(output)["device"] == "cpu"
