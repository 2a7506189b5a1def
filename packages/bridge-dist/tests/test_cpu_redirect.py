"""The CPU runtime redirects tensors, streams, generators and the backward pass to the CPU."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.autograd.graph
from hypothesis import given
from hypothesis import strategies as st

from bridge.dist import cpu

CUDA = torch.device("cuda", 0)  # created before the runtime is installed, like megatron-core's default arguments
SPELLINGS = ["cuda", "cuda:0", 0, CUDA, torch.device("cuda")]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runtime refuses beside a real GPU")


@pytest.fixture
def runtime() -> Iterator[None]:
    with cpu.cpu_runtime():
        yield


X = torch.arange(6.0).reshape(2, 3)
REDIRECTED: dict[str, Callable[[], torch.Tensor]] = {
    "factory, text": lambda: torch.ones(2, device="cuda"),
    "factory, index": lambda: torch.ones(2, device=torch.cuda.current_device()),
    "factory, formatted": lambda: torch.ones(2, device=f"cuda:{torch.cuda.current_device()}"),
    "factory, device": lambda: torch.empty(2, device=CUDA, pin_memory=True),
    "from data": lambda: torch.tensor([1, 2], device="cuda"),
    "as another": lambda: torch.randn_like(X, device="cuda"),
    "new": lambda: X.new_zeros(2, device=CUDA),
    "cuda": lambda: X.cuda(),
    "cuda, index": lambda: X.cuda(0, non_blocking=True),
    "to, text": lambda: X.to("cuda"),
    "to, index and dtype": lambda: X.to(0, torch.float64),
    "to, device": lambda: X.to(device=CUDA, dtype=torch.float64),
    "to, other": lambda: X.to(X.cuda()),
    "pinned": lambda: X.pin_memory(),
    "type": lambda: X.type("torch.cuda.DoubleTensor"),
    "module": lambda: torch.nn.Linear(2, 2, device="cuda").weight,
    "module.cuda": lambda: torch.nn.Linear(2, 2).cuda().weight,
    "module.to": lambda: torch.nn.Linear(2, 2).to("cuda").weight,
}


@pytest.mark.parametrize("make", REDIRECTED.values(), ids=REDIRECTED)
def test_cuda_calls_use_the_cpu(make: Callable[[], torch.Tensor], runtime: None) -> None:
    assert make().device.type == "cpu"


@pytest.mark.parametrize("make", REDIRECTED.values(), ids=REDIRECTED)
def test_without_the_runtime_cuda_is_missing(make: Callable[[], torch.Tensor]) -> None:
    with pytest.raises((RuntimeError, AssertionError, TypeError)):
        make()


def test_device_attributes_name_the_cpu(runtime: None) -> None:
    named = [torch.device("cuda"), torch.device("cuda", 0), torch.device("cuda:0"), torch.device(0), torch.device(CUDA)]
    assert {device.type for device in named} == {"cpu"}
    assert torch.device("meta").type == "meta"
    assert not torch.cuda.is_available()


@given(
    spelling=st.sampled_from(SPELLINGS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    shape=st.lists(st.integers(0, 3), max_size=3),
    value=st.integers(-100, 100),
)
def test_redirected_tensors_equal_cpu_tensors(
    spelling: str | int | torch.device, dtype: torch.dtype, shape: list[int], value: int
) -> None:
    expected = torch.full(shape, value, dtype=dtype)
    with cpu.cpu_runtime():
        made = torch.full(shape, value, dtype=dtype, device=spelling)
        moved = torch.full(shape, value).to(spelling, dtype)
    for tensor in (made, moved):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_tensor_types_compare_equal_in_both_spellings(runtime: None) -> None:
    half = X.bfloat16()
    assert X.type() == "torch.cuda.FloatTensor"
    assert X.type() == "torch.FloatTensor"
    assert X.type() != "torch.cuda.HalfTensor"
    assert half.type() in ["torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]


def test_streams_and_events_keep_program_order(runtime: None) -> None:
    stream, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.cuda.device(0):
        start.record()
        y = X.cuda() + 1
        y.record_stream(stream)
        end.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.current_stream().wait_event(stream.record_event())
    torch.cuda.synchronize()
    assert end.query()
    assert start.elapsed_time(end) > 0
    torch.testing.assert_close(y, X + 1)


def test_there_is_one_device_with_no_memory_in_use(runtime: None) -> None:
    torch.cuda.set_device(0)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.empty_cache()
    torch.ones(1000, device="cuda")
    assert torch.cuda.device_count() == 1
    assert torch.cuda.current_device() == 0
    figures = (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated, torch.cuda.memory_reserved)
    assert [figure() for figure in figures] == [0, 0, 0]
    assert torch.cuda.memory_stats() == {}


class _OnCuda(torch.autograd.Function):
    """A function whose backward pass creates tensors on the CUDA device, like megatron-core's parallel mappings."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        return torch.full_like(grad, 3.0, device="cuda") + torch.zeros(1, device=torch.cuda.current_device())


def _tensor_backward(x: torch.Tensor) -> torch.Tensor | None:
    _OnCuda.apply(x).sum().backward()
    return x.grad


def _autograd_backward(x: torch.Tensor) -> torch.Tensor | None:
    torch.autograd.backward([_OnCuda.apply(x).sum()])
    return x.grad


def _autograd_grad(x: torch.Tensor) -> torch.Tensor | None:
    (grad,) = torch.autograd.grad(_OnCuda.apply(x).sum(), x)
    return grad


def _engine_backward(x: torch.Tensor) -> torch.Tensor | None:
    """Call the engine as megatron-core's schedules do after they deallocate pipeline outputs."""
    from megatron.core.pipeline_parallel.schedules import custom_backward

    custom_backward(_OnCuda.apply(x).sum(), None)
    return x.grad


@pytest.mark.parametrize("backward", [_tensor_backward, _autograd_backward, _autograd_grad, _engine_backward])
def test_the_backward_pass_is_redirected(
    backward: Callable[[torch.Tensor], torch.Tensor | None], runtime: None
) -> None:
    x = torch.ones(2, device="cuda", requires_grad=True)
    assert backward(x).tolist() == [3.0, 3.0]  # type: ignore[union-attr]


def test_compiled_functions_run_uncompiled(runtime: None) -> None:
    ran: list[int] = []

    @torch.compile
    def double(x: torch.Tensor) -> torch.Tensor:
        ran.append(1)
        return 2 * x

    for _ in range(2):
        torch.testing.assert_close(double(X), X + X)
    assert len(ran) == 2


def test_the_random_state_tracker_forks(runtime: None, caplog: pytest.LogCaptureFixture) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("shard", 7)

    def draw() -> torch.Tensor:
        with tracker.fork("shard"):
            return torch.rand(4, device="cuda")

    torch.manual_seed(1)
    outside = [torch.rand(4), torch.rand(4)]
    torch.manual_seed(1)
    first, inside, second = torch.rand(4), draw(), torch.rand(4)
    torch.testing.assert_close([first, second], outside, rtol=0, atol=0)
    assert not torch.equal(inside, draw())
    torch.manual_seed(7)
    torch.testing.assert_close(inside, torch.rand(4), rtol=0, atol=0)
    assert caplog.messages == []


def test_cuda_seed_and_state_are_those_of_the_cpu(runtime: None) -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    torch.testing.assert_close(torch.rand(3), drawn, rtol=0, atol=0)


def test_megatron_still_does_not_move_redirected_tensors_to_the_cpu() -> None:
    """A fault of megatron-core 0.19.2: when this test fails, remove `_maybe_move_tensor_to_cpu`."""
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    assert isinstance(maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True), torch.Tensor)
