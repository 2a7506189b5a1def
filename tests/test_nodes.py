"""Two torchrun agents on the loopback interface: a job ends when a rank or an agent is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(sysconfig.get_path("scripts"))
LIMIT_S = 60  # after the fault
STARTING_S = 180  # for imports on a busy machine


class Nodes:
    """Two agents with one rank each, which train until they are killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("localhost", 0))
            endpoint = f"localhost:{free.getsockname()[1]}"
        self.agents = [self._start(node, endpoint) for node in range(2)]

    def _start(self, node: int, endpoint: str) -> subprocess.Popen[bytes]:
        command: list[str | Path] = [
            SCRIPTS / "torchrun",
            *("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"),
            *("--rdzv-backend", "static", "--master-addr", "localhost", "--master-port", endpoint.rpartition(":")[2]),
            "--no-python",
            *(SCRIPTS / "bridge", "build", "tiny", "--tp", "2", "--steps", "1000000", "--seq-length", "16"),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "BRIDGE_TEST_FOLDER": str(self.folder)}
        with (self.folder / f"node{node}").open("wb") as output:
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    def output(self) -> str:
        return "".join((self.folder / f"node{node}").read_text() for node in range(2))

    def processes(self) -> dict[int, list[bytes]]:
        """Return the command line of each process of the job, by process id."""
        mark = f"BRIDGE_TEST_FOLDER={self.folder}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:  # the process has ended or belongs to another user
                continue
        return found

    def rank_of(self, node: int) -> int:
        """Wait until the rank of a node trains, which its number of connections shows; return its process id."""
        agent = self.agents[node].pid
        children = Path(f"/proc/{agent}/task/{agent}/children")
        deadline = time.monotonic() + STARTING_S
        while time.monotonic() < deadline:
            ranks = [int(child) for child in children.read_text().split()]
            if ranks and _connections(ranks[0]) >= _CONNECTIONS_OF_A_RANK_THAT_TRAINS:
                return ranks[0]
            time.sleep(0.2)
        raise TimeoutError(self.output())

    def wait_until_gone(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while self.processes() and time.monotonic() < deadline:
            for agent in self.agents:
                agent.poll()
            time.sleep(0.2)
        assert self.processes() == {}, self.output()


_CONNECTIONS_OF_A_RANK_THAT_TRAINS = 10


def _connections(pid: int) -> int:
    """Return the number of sockets of a process; a rank that trains has those of its process groups."""
    links = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links += os.readlink(entry).startswith("socket:")
        except OSError:
            continue
    return links


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    yield nodes
    for process in nodes.processes():
        os.kill(process, signal.SIGKILL)
    for agent in nodes.agents:
        agent.wait()


def test_a_killed_rank_is_named_with_its_node(nodes: Nodes) -> None:
    nodes.rank_of(0)
    os.kill(nodes.rank_of(1), signal.SIGKILL)
    nodes.wait_until_gone()
    assert f"lost rank 1 on node 1 ({socket.gethostname()}): killed" in nodes.output()


@pytest.mark.parametrize("node", [0, 1])
def test_a_killed_agent_is_named(node: int, nodes: Nodes) -> None:
    for each in range(2):
        nodes.rank_of(each)
    nodes.agents[node].kill()
    nodes.wait_until_gone()
    if node == 1:
        assert f"lost rank 1 on node 1 ({socket.gethostname()}): killed" in nodes.output()
    else:
        assert ": the launcher of node 0, which serves it, has ended" in nodes.output()


AGENT = "import subprocess, sys; subprocess.run(sys.argv[1:])"


def test_a_rank_dies_with_an_agent_that_is_killed_while_it_starts(tmp_path: Path) -> None:
    """The agent serves the store, which the rank would try to reach for ten minutes."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    torchrun = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, "-c", AGENT, SCRIPTS / "bridge", "build", "tiny"]
    with (tmp_path / "output").open("wb") as output:
        agent = subprocess.Popen(command, env=os.environ | place | torchrun, stdout=output, stderr=output)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    wait_until(lambda: children.read_text())
    rank = Path(f"/proc/{children.read_text().strip()}")
    wait_until(lambda: "libtorch" in (rank / "maps").read_text())  # it imports torch, for a second or more
    agent.kill()
    agent.wait()
    try:
        wait_until(lambda: not rank.exists())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(rank.name), signal.SIGKILL)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
