"""Operations of a pass: matrix products by shape, attention by size, and the activations around them."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.dist.plan.results import AttentionCall, MatrixProduct, Operations


class OperationCounter(TorchDispatchMode):
    """Counts matrix products, attention calls, and the activations that matrix products read and write.

    The kernels between matrix products read what one of them wrote and write what the next one reads, so these
    activations measure the work that memory bandwidth limits. Counting the element-wise operations instead would
    depend on how far they are fused, which the meta device does not show.
    """

    def __init__(self, model: torch.nn.Module, *, is_fp8: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._products: Counter[MatrixProduct] = Counter()
        self._attention: Counter[AttentionCall] = Counter()
        self._activation_bytes = 0
        self._is_fp8 = is_fp8
        # Megatron's output layer multiplies in the data type of its weight, also under FP8.
        self._vocabulary = {
            parameter.shape[0] for name, parameter in model.named_parameters() if name.endswith(_VOCABULARY)
        }

    def take(self) -> Operations:
        """Return the operations since the last call."""
        taken = Operations(dict(self._products), dict(self._attention), self._activation_bytes)
        self._products, self._attention, self._activation_bytes = Counter(), Counter(), 0
        return taken

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        packet = func.overloadpacket
        if packet in _FIRST_FACTOR:
            first = _FIRST_FACTOR[packet]
            self._count_product(args[first], args[first + 1])
        elif packet in _ATTENTION:
            self._count_attention(_ATTENTION[packet], args, kwargs or {})
        return result

    def _count_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        *batch, m, k = left.shape
        n = right.shape[-1]
        dtype = str(left.dtype).removeprefix("torch.")
        if self._is_fp8 and not batch and dtype == "bfloat16" and not self._vocabulary & {m, n, k}:
            dtype = "float8"
        product = MatrixProduct(m, n, k, batch[0] if batch else 1, dtype)
        self._products[product] += 1
        elements = left.numel()
        # The first factor of a weight's gradient is transposed, and the second one is the input. In other products
        # without a batch, the second factor is a weight. Shapes do not tell: an input may have that of a weight.
        of_weight = not batch and left.stride(0) < left.stride(1)
        if batch or of_weight:
            elements += right.numel()
        if not of_weight:
            elements += product.batch * m * n
        self._activation_bytes += elements * left.element_size()

    def _count_attention(self, kernel: _Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        backward = kernel.query > 0
        query, key, value = args[kernel.query : kernel.query + 3]
        mask = kwargs.get("attn_mask") if kernel.mask is None else args[kernel.mask]
        call = AttentionCall(
            heads=query.shape[0] * query.shape[1],
            queries=query.shape[2],
            keys=key.shape[2],
            query_width=query.shape[3],
            value_width=value.shape[3],
            causal=mask is not None or (len(args) > kernel.causal and args[kernel.causal]),
            backward=backward,
        )
        self._attention[call] += 1


_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")
_FIRST_FACTOR = {
    torch.ops.aten.mm: 0,
    torch.ops.aten.bmm: 0,
    torch.ops.aten.addmm: 1,
    torch.ops.aten.baddbmm: 1,
}
"""Matrix products, and the position of their first factor."""


class _Kernel(NamedTuple):
    """The positions of the arguments of an attention kernel; a mask without one is named ``attn_mask``."""

    query: int
    causal: int
    mask: int | None = None


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _Kernel(0, 4),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _Kernel(1, 7),
    torch.ops.aten._scaled_dot_product_efficient_attention: _Kernel(0, 6, 3),
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: _Kernel(1, 11, 4),
}
