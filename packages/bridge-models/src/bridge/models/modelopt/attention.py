"""Quantisation of TorchAttention by ModelOpt, which supports only Transformer Engine's. It imports ModelOpt."""

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

_KEY = "bridge.models.backend.TorchAttention"  # stored in ModelOpt states: do not change


@contextlib.contextmanager
def convert_attention_as_saved(names: Iterable[str]) -> Iterator[None]:
    """Let ModelOpt convert TorchAttention within a context only if it had done so when the state was saved.

    A model that was quantised before this module was imported has no quantizers in its attention.

    Args:
        names: The names of quantizers or parameters in the saved state.
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
class _QuantizedAttention(QuantModule):  # type: ignore[misc]  # ModelOpt has no types
    """TorchAttention with quantised queries, keys and values, as in ModelOpt's version of Transformer Engine's."""

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
        """Quantise the inputs and compute attention, see ``TorchAttention``."""
        query, key, value = self.q_bmm_quantizer(query), self.k_bmm_quantizer(key), self.v_bmm_quantizer(value)
        return super().forward(query, key, value, *args, **kwargs)

    def modelopt_post_restore(self, prefix: str = "") -> None:
        """Move the restored quantizers to the device of the layer."""
        self.to(self.device)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the layer's own entries and those of the quantizers, which are equal on tensor-parallel ranks."""
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

    # ModelOpt adds its own methods to each instance. torch calls them only if the class has them too.
    def get_extra_state(self) -> None:
        """Return the state of the quantizers."""

    def set_extra_state(self, state: object) -> None:
        """Restore the state of the quantizers."""
