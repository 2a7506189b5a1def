"""Functions for ranks of a pool, importable in another process."""

import importlib.util
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def process_id() -> int:
    return os.getpid()


def rank_variables() -> tuple[str, ...]:
    return tuple(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))


def set_variable(name: str, value: str) -> None:
    os.environ[name] = value


def read_variable(name: str) -> str | None:
    return os.environ.get(name)


def fail_on(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        raise ValueError("a mistake")
    signal.pause()


def exit_on(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        os._exit(7)
    signal.pause()


def kill(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def return_a_function() -> Callable[[], None]:
    return lambda: None


def is_cuda_usable_after_imports() -> bool:
    """Return whether CUDA could be initialised here, given a GPU, after all imports of a build."""
    import torch

    from bridge.dist import job as job

    return not torch.cuda._is_in_bad_fork()


def compiler_modules_after_training() -> list[str]:
    """Train a step, and return which modules of torch's compiler were imported."""
    from bridge.config import Document
    from bridge.dist.job import BuildJob
    from bridge.dist.run.rank import run_rank
    from bridge.dist.train.step import TrainOptions
    from bridge.dist.train.text import find_default_text
    from bridge.dist.wrapper import Wrapper

    training = TrainOptions(steps=1, text=find_default_text(), seq_length=16, global_batch_size=1)
    fsdp2 = [] if fsdp2_loads_the_compiler() else [Wrapper.TORCH_FSDP2]
    for wrapper in (Wrapper.DDP, Wrapper.MEGATRON_FSDP, *fsdp2):
        run_rank(BuildJob(document=Document.load("tiny").data, wrapper=wrapper, training=training))
    return compiler_modules()


def fsdp2_loads_the_compiler() -> bool:
    """Return whether torch's FSDP2 imports the compiler in its first forward pass, as in torch 2.11."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    code = Path(torch.origin).parent / "distributed/fsdp/_fully_shard/_fsdp_common.py"
    return "torch._dynamo.compiled_autograd" in code.read_text()


def compiler_modules() -> list[str]:
    """Return the loaded modules of torch's compiler, without its configuration."""
    found = [name for name in sys.modules if name.startswith(("torch._dynamo.", "torch._inductor."))]
    return [name for name in found if not name.startswith("torch._dynamo.config")]


def log(message: str) -> str:
    logging.getLogger("bridge.dist.anything").warning(message)
    return message


def leave_world_after(seconds: Sequence[float], port: int) -> float:
    """Join a world whose store rank 0 serves, stay for the seconds of this rank, and return when it was left."""
    from bridge.dist import join_world

    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    with join_world():
        time.sleep(seconds[int(os.environ["RANK"])])
    return time.monotonic()


_executors: list[ProcessPoolExecutor] = []


def start_worker_of_a_search() -> int:
    """Start a worker that is not killed together with this rank, and return its process id."""
    from bridge.dist.plan.forecast.search import _start_worker

    executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"), initializer=_start_worker)
    _executors.append(executor)  # an executor that nothing refers to ends its workers
    executor.submit(os.setsid).result()
    return executor.submit(os.getpid).result()
