"""Run megatron-core, and code written for it, on a machine without a GPU.

megatron-core 0.19.2 asks for a CUDA device in a few dozen places. While this runtime is installed there is one pretend
device, `cuda:0`, and it is the CPU: tensors asked for on CUDA are made in host memory, streams and events do nothing
because work on a CPU is in program order (collectives end before they return, to make it so), and the CUDA random
generator is the CPU's. `torch.cuda.is_available()` stays False, so that code which has a way for the CPU takes it. Use
the gloo backend for the process groups.

`runtime` lists every name that is replaced, `redirect` the torch functions that name a device elsewhere than in the
keyword `device`, `device` what stands in for `torch.cuda`, and `collectives` what gloo does otherwise than NCCL.
Imports nothing of this package but the modules beside its subpackages.

Not covered:

- Threads other than the one that called `install`: the redirection of torch functions is thread-local. Autograd runs
  the backward pass of CPU tensors in the calling thread, so it is covered.
- What exists only on a GPU: Transformer Engine, Triton kernels, CUDA graphs, memory pools, FP8.
- `torch.compile`: compiled functions run as they are written.
- Names that another module bound (`from torch.cuda import Stream`) before `install`, and those that it bound while
  the runtime was installed and keeps after `uninstall`.
- The insides of torch functions written in Python: torch switches the redirection off while one runs. The backward
  pass is one of them, and is covered.
"""

from bridge.dist.cpu.runtime import cpu_runtime, install, is_installed, on_meta, uninstall
from bridge.dist.errors import CpuRuntimeError

__all__ = ["CpuRuntimeError", "cpu_runtime", "install", "is_installed", "on_meta", "uninstall"]
