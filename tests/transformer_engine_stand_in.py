"""A stand-in for Transformer Engine 2.10 on machines without a GPU, where the real one cannot be imported.

It computes nothing. Its layers have the parameters and the extra state of the real ones (see their constructors in
``transformer_engine/pytorch/module``, and ``BasicOperation`` in ``ops/op.py``). What megatron-core makes of them, such
as the keys of a checkpoint, can then be seen. Call ``install()`` before megatron-core is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any
from unittest.mock import MagicMock

import torch


class _Layer(torch.nn.Module):
    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        pass

    def add(self, *shape: int, **named: bool) -> None:
        for name, is_there in named.items():
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape)) if is_there else None)


class Linear(_Layer):
    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, parallel_mode: str | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.parallel_mode, self.use_bias = parallel_mode, bias
        self.add(out_features, in_features, weight=True)
        self.add(out_features, bias=bias)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, normalization: str, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self.add(in_features, layer_norm_weight=True, layer_norm_bias=normalization == "LayerNorm")


class GroupedLinear(_Layer):
    def __init__(self, num_gemms: int, in_features: int, out_features: int, *, bias: bool, **_: Any) -> None:
        super().__init__()
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        for index in range(num_gemms):
            self.add(out_features, in_features, **{f"weight{index}": True})
            self.add(out_features, **{f"bias{index}": bias})


class RMSNorm(_Layer):
    def __init__(self, normalized_shape: int, **_: Any) -> None:
        super().__init__()
        self.add(normalized_shape, weight=True)


class LayerNorm(RMSNorm):
    def __init__(self, normalized_shape: int, **options: Any) -> None:
        super().__init__(normalized_shape, **options)
        self.add(normalized_shape, bias=True)


class DotProductAttention(_Layer):
    def __init__(self, num_attention_heads: int, *, softmax_type: str = "vanilla", **_: Any) -> None:
        super().__init__()
        self.add(num_attention_heads, softmax_offset=softmax_type == "learnable")


_CONTENTS: dict[str, dict[str, Any]] = {
    "transformer_engine": {"__version__": "2.10.0"},
    "transformer_engine.pytorch": {
        layer.__name__: layer
        for layer in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, LayerNorm, DotProductAttention)
    },
    "transformer_engine.pytorch.cpu_offload": {"get_cpu_offload_context": lambda *_, **__: (None, None)},
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of Transformer Engine; what is not in ``_CONTENTS`` is a mock, as in megatron-core itself."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        is_ours = name.partition(".")[0] == "transformer_engine"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(_CONTENTS.get(module.__name__, {}))


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


def install() -> None:
    """Make imports find the stand-in. Use a separate process for it."""
    sys.modules.pop("transformer_engine", None)
    sys.meta_path.insert(0, _Finder())
    for name in ("common", "pytorch"):  # megatron-core takes them for attributes of the package
        importlib.import_module(f"transformer_engine.{name}")
