"""Our attention for ModelOpt, which of attention knows only that of Transformer Engine. It imports ModelOpt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from modelopt.torch.utils.distributed import ParallelState

from bridge.models.backend.attention import TorchAttention

_KEY = "bridge.models.backend.TorchAttention"  # in states that were saved


@contextlib.contextmanager
def known_attention(names: Iterable[str]) -> Iterator[None]:
    """Let ModelOpt convert our attention if it did when these names of quantizers and modules were saved.

    It did not in a model that was quantised before this module was imported.
    """
    if any("core_attention" in name for name in names):
        yield
        return
    QuantModuleRegistry.unregister(TorchAttention)
    try:
        yield
    finally:
        QuantModuleRegistry.register({TorchAttention: _KEY})(_QuantizedAttention)


@QuantModuleRegistry.register({TorchAttention: _KEY})
class _QuantizedAttention(QuantModule):  # type: ignore[misc]  # which has no types
    """Quantisation of queries, keys and values, as ModelOpt does it for Transformer Engine's attention."""

    device: torch.device  # ModelOpt sets it
    tp_group: torch.distributed.ProcessGroup

    def _setup(self) -> None:
        for name in ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer"):
            setattr(self, name, TensorQuantizer())
        self.parallel_state = ParallelState(
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend, see ``TorchAttention``."""
        query, key, value = self.q_bmm_quantizer(query), self.k_bmm_quantizer(key), self.v_bmm_quantizer(value)
        return super().forward(query, key, value, *args, **kwargs)

    def modelopt_post_restore(self, prefix: str = "") -> None:
        """Move what was restored to the device of the layer."""
        self.to(self.device)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe the quantizers, equal on tensor-parallel ranks, beside what the layer itself has."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        quantizers = {
            name: value
            for name, value in self.state_dict(keep_vars=True).items()
            if "_quantizer." in name or name == "_extra_state"
        }
        described: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        described |= make_sharded_tensors_for_checkpoint(
            quantizers, prefix, {}, sharded_offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )
        return described

    # ModelOpt puts methods of its own into each module, which torch calls only where the class has them.
    def get_extra_state(self) -> None:
        """Return the state of the quantizers."""

    def set_extra_state(self, state: object) -> None:
        """Restore the state of the quantizers."""
