"""The emulated device `cuda:0`: its current backing device, its streams and events, and its `torch.cuda` functions."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch

CPU = torch.device("cpu")
META = torch.device("meta")

backing_device: torch.device = CPU
"""The device that currently backs `cuda:0`: the CPU, or within `back_with` another one."""


@contextlib.contextmanager
def back_with(device: torch.device) -> Iterator[None]:
    """Back `cuda:0` by another device than the CPU until the context is left."""
    global backing_device
    backing_device = device
    try:
        yield
    finally:
        backing_device = CPU


class _Stream:
    """A stream whose work is always complete."""

    device = torch.device("cpu")
    device_index = 0
    device_type = 1  # torch's number for CUDA
    stream_id = 0
    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Event:
    """A point in program order; `elapsed_time` is wall-clock milliseconds."""

    def __init__(self, *_: object, **__: object) -> None:
        self._recorded_at = time.perf_counter()

    def record(self, stream: object = None) -> None:
        self._recorded_at = time.perf_counter()

    def elapsed_time(self, end_event: Self) -> float:
        return (end_event._recorded_at - self._recorded_at) * 1e3

    def wait(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _NoContext(contextlib.nullcontext[None]):
    """No-op `torch.cuda.device` and `torch.cuda.stream`: there is one device and one stream."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()


def make_constant(value: object) -> Callable[..., Any]:
    """Return a function that ignores its arguments and returns the value."""

    def function(*_: object, **__: object) -> object:
        return value

    return function


STREAM = _Stream()
TORCH_CUDA: Mapping[str, object] = {
    # The CPU's generator, so that megatron-core's random state tracker works unchanged.
    "_initialized": True,
    "_is_in_bad_fork": make_constant(False),
    "default_generators": (torch.default_generator,),
    # An integer: megatron-core formats it into `cuda:{...}`.
    "current_device": make_constant(0),
    "device_count": make_constant(1),
    "device": _NoContext,
    "set_device": make_constant(None),
    "get_device_capability": make_constant((0, 0)),
    "Stream": _Stream,
    "ExternalStream": _Stream,
    "Event": _Event,
    "stream": _NoContext,
    "set_stream": make_constant(None),
    "current_stream": make_constant(STREAM),
    "default_stream": make_constant(STREAM),
    "synchronize": make_constant(None),
    "is_current_stream_capturing": make_constant(False),
    "empty_cache": make_constant(None),
    "reset_peak_memory_stats": make_constant(None),
}
