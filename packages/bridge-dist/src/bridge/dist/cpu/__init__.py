"""Run megatron-core, and code written for it, on a machine without a GPU.

megatron-core 0.19.2 requests a CUDA device in a few dozen places. While this runtime is installed there is one emulated
device, `cuda:0`, backed by the CPU. Tensors requested on CUDA are allocated in host memory. Streams and events do
nothing, because work on a CPU runs in program order; to keep it so, collectives finish before they return. The CUDA
random generator is the CPU's. `torch.cuda.is_available()` stays False, so that code with a CPU path takes it. Use the
gloo backend for the process groups.

`runtime` lists every replaced attribute, `redirect` the torch functions that take a device other than by the keyword
`device`, `device` the replacement of `torch.cuda`, and `collectives` the differences between gloo and NCCL.
Imports nothing of this package but the modules beside its subpackages.

Not covered:

- Threads other than the one that called `install`: the redirection of torch functions is thread-local. Autograd runs
  the backward pass of CPU tensors in the calling thread, so it is covered.
- Features that exist only on a GPU: Transformer Engine, Triton kernels, CUDA graphs, memory pools, FP8.
- `torch.compile`: compiled functions run as they are written.
- Names that another module imported (`from torch.cuda import Stream`) before `install`, and those that it imported
  while the runtime was installed and keeps after `uninstall`.
- The bodies of torch functions written in Python: torch disables the redirection while one runs. The backward pass is
  one of them, and is covered.
"""

from bridge.dist.cpu.runtime import cpu_runtime, install, is_installed, on_meta, uninstall
from bridge.dist.errors import CpuRuntimeError

__all__ = ["CpuRuntimeError", "cpu_runtime", "install", "is_installed", "on_meta", "uninstall"]
