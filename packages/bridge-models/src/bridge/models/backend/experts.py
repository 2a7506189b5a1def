"""Experts in PyTorch: one module per expert, or one module per rank with a matrix per expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch.nn.functional import linear

from bridge.models.backend.extra_state import HasExtraState


class SequentialExperts(SequentialMLP):
    """Megatron's ungrouped experts, whose initial weights on the CPU do not depend on expert parallelism.

    On the CPU, all ranks have the same random state, so in megatron-core 0.19.2 every expert-parallel rank draws the
    same experts. Here, each rank draws all experts and keeps its own.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        on_cpu = config.use_cpu_initialization and config.perform_initialization
        ranks, rank = (pg_collection.ep.size(), pg_collection.ep.rank()) if on_cpu else (1, 0)
        super().__init__(num_local_experts * ranks, config, submodules, pg_collection, name)
        self.num_local_experts = num_local_experts
        self.local_experts = self.local_experts[rank * num_local_experts :][:num_local_experts]


class _GroupedLinear(HasExtraState):
    """One matrix for each expert of a rank, named as Transformer Engine names them: ``weight0``, ``weight1``, ...

    The token dispatcher exchanges tokens between ranks, including those of expert-tensor parallelism.
    """

    split: int
    """The dimension of a weight, [output, input], that expert-tensor parallelism splits."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], object],
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.num_gemms = num_gemms
        self.skip_bias_add = skip_bias_add
        self.groups = pg_collection
        self.has_bias = bias
        self.shape = [output_size, input_size]
        self.init_method = init_method
        self.on_cpu = config.use_cpu_initialization
        # A gated fc1 consists of the gate and the gated values; a rank holds a slice of each, so the stride is 2.
        gated = self.split == 0 and config.gated_linear_unit and config.moe_mlp_glu_interleave_size is None
        self.stride = 2 if gated else 1
        # As in Megatron's other expert layers: DDP reduces gradients with `allreduce` False over the experts' group.
        own_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        shape = list(self.shape)
        shape[self.split] = divide(shape[self.split], pg_collection.expt_tp.size())
        placed = {} if self.on_cpu else {"device": torch.cuda.current_device()}
        make = partial(torch.empty, dtype=config.params_dtype, **placed)
        for expert in range(num_gemms):
            parts = {"weight": (make(*shape), True)} | ({"bias": (make(shape[0]), self.split == 0)} if bias else {})
            for kind, (empty, is_split) in parts.items():
                parameter = torch.nn.Parameter(empty)
                if is_split:
                    set_tensor_model_parallel_attributes(
                        parameter, is_parallel=True, dim=self.split, stride=self.stride
                    )
                parameter.allreduce = not own_groups  # type: ignore[attr-defined]
                self.register_parameter(f"{kind}{expert}", parameter)
        if config.perform_initialization:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights with the configuration's initialiser, and set biases to zero."""
        for name, parameter in self.named_parameters():
            if name.startswith("bias"):
                parameter.zero_()
            elif not self.on_cpu:
                with tensor_parallel.get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    self.init_method(parameter)
        if self.on_cpu:
            self._draw_on_cpu()

    def _draw_on_cpu(self) -> None:
        """Draw the whole weights of all experts, and keep this rank's slices of its own experts.

        On the CPU, all ranks have the same random state; without this, they would draw the same experts.
        """
        ranks, rank = self.groups.expt_tp.size(), self.groups.expt_tp.rank()
        own = {self.groups.ep.rank() * self.num_gemms + index: index for index in range(self.num_gemms)}
        for expert in range(self.groups.ep.size() * self.num_gemms):
            whole = torch.empty(self.shape, device=self.get_parameter("weight0").device)
            self.init_method(whole)
            if expert in own:
                pieces = whole.chunk(ranks * self.stride, dim=self.split)
                self.get_parameter(f"weight{own[expert]}").copy_(torch.cat(pieces[rank::ranks], dim=self.split))

    def forward(self, tokens: torch.Tensor, tokens_per_expert: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply each expert's matrix to its tokens.

        Args:
            tokens: [tokens, input], ordered by expert.
            tokens_per_expert: Number of tokens of each expert.

        Returns:
            [tokens, output]; and the biases, [experts, output], if the caller adds them.
        """
        weights: list[torch.Tensor] = [getattr(self, f"weight{expert}") for expert in range(self.num_gemms)]
        parts = tokens.split(tokens_per_expert)
        if not self.has_bias:
            return torch.cat([linear(part, weight) for part, weight in zip(parts, weights, strict=True)]), None
        biases: list[torch.Tensor] = [getattr(self, f"bias{expert}") for expert in range(self.num_gemms)]
        added = [None if self.skip_bias_add else bias for bias in biases]
        outputs = [linear(part, weight, bias) for part, weight, bias in zip(parts, weights, added, strict=True)]
        return torch.cat(outputs), torch.stack(biases) if self.skip_bias_add else None

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are not delayed."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return each expert's parameters as shards of those of all experts, as Megatron's other experts do.

        With ``singleton_local_shards`` in the metadata, each expert is a tensor of its own.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        experts = self.groups.ep.size() * self.num_gemms
        described = {}
        for index in range(self.num_gemms):
            expert = self.groups.ep.rank() * self.num_gemms + index
            alone = metadata.get("singleton_local_shards", False)
            offsets = sharded_offsets if alone else (*sharded_offsets, (len(sharded_offsets), expert, experts))
            kinds = ("weight", "bias") if self.has_bias else ("weight",)
            parts = make_sharded_tensors_for_checkpoint(
                {kind: getattr(self, f"{kind}{index}") for kind in kinds} | {"_extra_state": None},
                "",
                {"weight": self.split} | ({"bias": 0} if self.split == 0 else {}),
                offsets,
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(parts, "", f"{expert}.{prefix}" if alone else prefix)
            for kind, part in parts.items():
                part.replica_id = (*part.replica_id[:2], self.groups.expt_dp.rank())
                # The extra state of the first expert has torch's name, that of the others a number, as in
                # Transformer Engine.
                number = "" if kind == "_extra_state" and index == 0 else index
                described[f"{prefix}{kind}{number}"] = part
        return described

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for index in range(1, self.num_gemms):
            state_dict.pop(f"{prefix}_extra_state{index}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ColumnParallelGroupedLinear(_GroupedLinear):
    """The first linear layers of the experts: expert-tensor parallelism splits their output."""

    split = 0


class RowParallelGroupedLinear(_GroupedLinear):
    """The second linear layers of the experts: expert-tensor parallelism splits their input."""

    split = 1
