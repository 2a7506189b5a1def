"""Joining the ranks that the environment describes, and leaving them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from bridge.dist import cpu
from bridge.dist.agreement import LONGEST_WAIT, Facts, agree


@contextlib.contextmanager
def world(mine: Facts) -> Iterator[None]:
    """Join the ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, if they are about to do the same.

    On this rank's GPU with NCCL or, where there is none, on the CPU with gloo. They are left after a success only: who
    fails ends its process, and reports its error before its peers lose the connection.

    Args:
        mine: What this rank is about to do; see ``bridge.dist.agreement``.

    Raises:
        AgreementError: On every rank, when one is about to do something else, sees a world of another size, or does not
            come.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store(rank)
    agree({**mine, "world size": str(world_size)}, store=store, rank=rank, world_size=world_size)
    with contextlib.ExitStack() as stack:
        device = None
        if torch.cuda.is_available():
            # Slurm may show each task its own GPU alone.
            index = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.device_count() > 1 else 0
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        else:
            stack.enter_context(cpu.cpu_runtime())
        torch.distributed.init_process_group(
            "gloo" if device is None else "nccl",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=LONGEST_WAIT,
            device_id=device,
        )
        yield
        torch.distributed.destroy_process_group()


def _store(rank: int) -> Store:
    """The store that rank 0 serves, or the launcher's agent.

    It does not wait for a number of ranks, which is what they may disagree on.
    """
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not has_agent,
        timeout=LONGEST_WAIT,
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(f"bridge/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
