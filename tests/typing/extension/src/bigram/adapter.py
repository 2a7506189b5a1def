"""Low-rank adapters that a hook puts around the first layer of each MLP, split as that layer is."""

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.mlp import MLP


class Adapter(torch.nn.Module):
    """A frozen column-parallel layer, and what is learned on top of it: ``base(x) + up(down(x))``."""

    def __init__(self, base: ColumnParallelLinear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        assert base.weight is not None  # it could be another layer's, given to forward
        outputs, inputs = base.weight.shape  # of this rank: tensor parallelism splits the outputs
        self.down = torch.nn.Linear(inputs, rank, bias=False)  # every rank has a copy
        self.up = torch.nn.Linear(rank, outputs, bias=False)  # every rank has a part, and says so
        set_tensor_model_parallel_attributes(self.up.weight, is_parallel=True, dim=0, stride=1)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute this rank's part of the outputs; the bias is left to the caller, as Megatron's layers do."""
        output, bias = self.base(x)
        # Each rank's part of `up` gives a part of the gradient of `down`: the backward pass adds them up.
        return output + self.up(copy_to_tensor_model_parallel_region(self.down(x))), bias


def add_adapters(stages: list[MegatronModule]) -> list[MegatronModule]:
    """Add an adapter to each MLP; a hook for `pre_wrap_hooks`."""
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, MLP) and isinstance(module.linear_fc1, ColumnParallelLinear):
                module.add_module("linear_fc1", Adapter(module.linear_fc1, rank=4))
    return stages
