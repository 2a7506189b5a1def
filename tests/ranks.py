"""Run a function on real ranks: one process each, gloo between them, the CPU runtime installed.

The processes are those of Bridge's own pool. They come from a fork server that has imported torch and megatron-core
once, and stay up from one call to the next as long as the calls are those of one test file and end well.
"""

import contextlib
import faulthandler
import gc
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any, NamedTuple

from bridge.dist.errors import LaunchError
from bridge.dist.run.pool import RankPool, start_fork_server

MOST_THREADS = 80
"""Ranks with more threads are replaced: leaked process groups keep threads that wake often. Those that have loaded a
checkpoint by megatron.training have 68 and stay, because importing it takes seconds."""
SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class RankError(RuntimeError):
    """A rank died, hung, or raised an exception that cannot be pickled."""


class _Task(NamedTuple):
    """The function that a rank calls; the module is given by file, as test modules have no importable name."""

    module: str
    file: str
    function: str
    arguments: bytes


class _Pool:
    """The ranks of this process, and the test file that they have run functions for."""

    ranks = RankPool()
    test_file = ""


def run_ranks[T, *Ts](fn: Callable[[*Ts], T], world_size: int, *args: *Ts, timeout: float = 120) -> list[T]:
    """Call `fn(*args)` on `world_size` ranks and return the results by rank.

    `fn` is a top-level function of a file; arguments and results must pickle (tensors do, but to read one the caller
    imports megatron-core, which changes how they pickle: numbers are cheaper). Each rank has RANK, WORLD_SIZE,
    LOCAL_RANK and LOCAL_WORLD_SIZE in its environment, torch.distributed initialised and the CPU runtime installed.
    After a failure no process is left.

    Raises:
        RankError: a rank died, or `timeout` seconds passed (the stacks of the ranks are then on stderr).
        Exception: what the first failing rank raised, with that rank's traceback as a note.
    """
    if "<locals>" in fn.__qualname__ or "<lambda>" in fn.__qualname__:
        raise TypeError(f"{fn.__qualname__} must be a top-level function: every rank loads it from its file")
    file = sys.modules[fn.__module__].__file__
    assert file is not None
    test_file = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
    if _Pool.test_file != test_file:  # isolates test files from each other
        _Pool.ranks.close()
        _Pool.test_file = test_file
    with _environment(SERVER_ENVIRONMENT):
        start_fork_server(world_size, "pytest")
    task = _Task(fn.__module__, file, fn.__qualname__, pickle.dumps(args))
    try:
        results = _Pool.ranks.run(_call, task, timeout, ranks=world_size, timeout=timeout)
    except LaunchError as error:
        cause = error.__cause__
        details = "\n".join(getattr(error, "__notes__", ()))
        if not isinstance(cause, Exception):
            raise RankError(f"{error}\n{details}".strip()) from None
        cause.add_note(f"on {str(error).partition(':')[0]}:\n{details}")
        raise cause from None
    if max(threads for _, threads in results) > MOST_THREADS:
        _Pool.ranks.close()
    return [pickle.loads(result) for result, _ in results]


def _call(task: _Task, timeout: float) -> tuple[bytes, int]:
    """Call the function on a rank in a new world, then restore the process state.

    Returns the pickled result and the number of threads afterwards.
    """
    # Imported here: only the fork server and its children pay for torch.
    import torch

    from bridge.dist import cpu
    from bridge.dist.engine.groups import destroy_process_groups
    from bridge.dist.run.rank_environment import RankEnvironment
    from bridge.dist.run.store import open_store

    place = RankEnvironment.read(os.environ)
    assert place is not None
    environment, random_state = dict(os.environ), torch.get_rng_state()
    faulthandler.dump_traceback_later(timeout)
    torch.set_num_threads(1)
    module = _load(task)
    torch.distributed.init_process_group(
        "gloo",
        store=open_store(place, timeout=timedelta(seconds=timeout)),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout),
    )
    cpu.install()
    result = pickle.dumps(getattr(module, task.function)(*pickle.loads(task.arguments)))
    cpu.uninstall()
    torch.distributed.barrier()  # no rank closes its groups while another still uses them
    destroy_process_groups()
    if torch.distributed.is_initialized():  # the function may have created no other groups
        torch.distributed.destroy_process_group()
    gc.collect()  # a group's threads, which wake a hundred times a second, last as long as a model that holds it
    faulthandler.cancel_dump_traceback_later()
    torch.set_rng_state(random_state)
    os.environ.clear()
    os.environ.update(environment)
    return result, len(os.listdir("/proc/self/task"))


def _load(task: _Task) -> ModuleType:
    """Load the task's module under its name in the parent, so that its classes pickle both ways."""
    package = task.module.partition(".")[0]
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        sys.modules[package] = ModuleType(package)  # pickle imports the first part of a dotted name
    if task.module not in sys.modules:
        spec = importlib.util.spec_from_file_location(task.module, task.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[task.module] = module
        spec.loader.exec_module(module)
    return sys.modules[task.module]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before: dict[str, Any] = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
