"""Parameters in FP8 that behave as those of Transformer Engine, which needs a GPU to make any."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.utils._pytree import tree_map


class Quantized(torch.Tensor):
    """Values rounded to FP8. What torch computes with it, and takes from it, are copies in its nominal precision."""

    stored: torch.Tensor

    @staticmethod
    def __new__(cls: type[Quantized], values: torch.Tensor) -> Quantized:
        made: Quantized = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        made.stored = values.to(torch.float8_e4m3fn)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].stored.to(args[0].dtype))
        if func is torch.ops.aten.copy_.default:
            args[0].stored.copy_(_dequantize(args[1]))
            return args[0]
        return func(*tree_map(_dequantize, args), **(kwargs or {}))


def _dequantize(value: Any) -> Any:
    return value.stored.to(value.dtype) if isinstance(value, Quantized) else value


def quantize(owner: torch.nn.Module, name: str, *, keeps_exact: bool = True) -> torch.nn.Parameter:
    """Replace a parameter of a module as Transformer Engine does where gradients are enabled; return the new one."""
    before = owner.get_parameter(name)
    parameter = torch.nn.Parameter(Quantized(before.detach()))
    vars(parameter).update({key: value for key, value in vars(before).items() if key != "stored"})
    if keeps_exact:
        exact = before.detach().clone()
        setattr(parameter, "get_high_precision_init_val", MethodType(lambda self: exact, parameter))  # noqa: B010
    owner.register_parameter(name, parameter)
    return parameter
