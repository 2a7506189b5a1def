"""The CPU runtime is installed and removed without traces, or refused."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.autograd.graph
from torch.distributed import device_mesh
from torch.overrides import _get_current_function_mode_stack

from bridge.dist import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runtime refuses beside a real GPU")


@pytest.fixture
def runtime() -> Iterator[None]:
    with cpu.cpu_runtime():
        yield


def _patched_owners() -> list[type | ModuleType]:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from torch._dynamo import eval_frame  # its variables hold the stance of the compiler

    return [
        *(torch, torch.Tensor, torch.autograd, torch.autograd.graph, torch.random),
        *(torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.cuda.memory, torch.cuda.streams),
        *(torch.distributed, device_mesh, device_mesh.DeviceMesh, moe_utils, token_dispatcher),
        eval_frame,
    ]


def _patched_names() -> dict[tuple[str, str], object]:
    return {(owner.__name__, name): value for owner in _patched_owners() for name, value in vars(owner).items()}


def test_uninstall_restores_every_name() -> None:
    before, modes = _patched_names(), _get_current_function_mode_stack()
    cpu.install()
    during = _patched_names()
    cpu.uninstall()
    after = _patched_names()
    assert sum(before.get(key) is not value for key, value in during.items()) > 20
    assert list(after) == list(before)
    assert [key for key, value in after.items() if value is not before[key]] == []
    assert _get_current_function_mode_stack() == modes


def test_a_second_installation_changes_nothing() -> None:
    with cpu.cpu_runtime():
        during = _patched_names()
        cpu.install()
        assert len(_get_current_function_mode_stack()) == 1
        with cpu.cpu_runtime():
            pass
        assert cpu.is_installed()
        assert _patched_names() == during
    assert not cpu.is_installed()
    cpu.uninstall()
    assert not cpu.is_installed()


def test_uninstall_leaves_a_mode_that_was_entered_later() -> None:
    try:
        with cpu.cpu_runtime():
            torch.set_default_device("meta")
            assert torch.ones(1).is_meta
        assert torch.ones(1).is_meta
    finally:
        torch.set_default_device(None)
    assert _get_current_function_mode_stack() == []


def test_the_runtime_is_removed_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), cpu.cpu_runtime():
        _ = 1 / 0
    assert not cpu.is_installed()


def test_importing_has_no_effect() -> None:
    program = (
        "import sys, torch; before = dict(vars(torch.cuda)); from bridge.dist import cpu; "
        "assert not cpu.is_installed(); assert vars(torch.cuda) == before; assert 'megatron' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_another_thread_cannot_uninstall(runtime: None) -> None:
    errors: list[Exception] = []

    def uninstall() -> None:
        try:
            cpu.uninstall()
        except cpu.CpuRuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=uninstall)
    thread.start()
    thread.join()
    assert "thread" in str(errors)
    assert cpu.is_installed()


def test_a_real_gpu_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # only without a real GPU: see `pytestmark`
    before = _patched_names()
    with pytest.raises(cpu.CpuRuntimeError, match="CUDA_VISIBLE_DEVICES"):
        cpu.install()
    assert _patched_names() == before


def test_a_torch_version_without_the_private_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # No such version is known, so the name is removed from the installed one.
    monkeypatch.delattr(torch.autograd.graph, "_engine_run_backward")
    before = _patched_names()
    with pytest.raises(cpu.CpuRuntimeError, match=rf"torch {re.escape(torch.__version__)}.*_engine_run_backward"):
        cpu.install()
    assert _patched_names() == before
    assert not cpu.is_installed()
