"""What bridge-dist uses of torch and megatron-core that they do not promise to keep."""

from __future__ import annotations

import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

TESTED_THROUGHOUT = (2, 11)
"""The oldest torch that everything is tested with; plans and torch FSDP2 want it.

With torch 2.6 collectives of tensors without memory are refused, which plans are made of, and FSDP2 misses a method of
streams; with 2.8 FSDP2 makes gradients on gloo as many times too large as there are ranks.
"""


PRIVATE_NAMES = {
    "torch._C._distributed_c10d.PrefixStore": "run.store: keeps the keys of jobs apart",
    "torch._C._distributed_c10d.TCPStore": "run.store, run.pool: where ranks meet",
    "torch._dynamo": "imports: is left unloaded where nothing is compiled",
    "torch.autograd.graph._engine_run_backward": "cpu: redirects the backward pass",
    "torch.autograd._engine_run_backward": "cpu: the same, as torch.autograd has bound it",
    "torch.distributed._coalescing_manager": "cpu: gloo mixes up tensors of different precision",
    "torch.distributed.distributed_c10d._CoalescingManager": "cpu: what stands in for it yields",
    "torch.distributed.distributed_c10d._get_default_store": "checks.agreement: ranks compare through it",
    "torch.distributed.distributed_c10d._world": "engine.groups: lists the process groups",
    "torch.distributed.tensor.DTensor._op_dispatcher": "engine.release",
    "torch.overrides._pop_mode": "cpu: takes its mode out from under others",
    "torch.overrides._push_mode": "cpu: the same",
    "torch.utils._device.DeviceContext": "cpu: makes tensors on the meta device",
    "torch.utils._python_dispatch.TorchDispatchMode": "plan: counts what is computed",
}
"""What each is for, by name; seen in torch 2.6 to 2.15. A test tells which of them is gone."""

PRIVATE_NAMES_OF_PLANS = {
    "torch._C._clear_DTensor_sharding_propagator_cache": "engine.release",
    "torch._C._distributed_c10d.FakeProcessGroup": "plan.groups: groups of ranks that do not exist",
    "torch._C._distributed_c10d._register_process_group": "plan.groups: the same",
    "torch.UntypedStorage._new_with_weak_ptr": "plan.sharded: follows memory until it is freed",
    "torch.distributed.fsdp._fully_shard._fully_shard": "plan.sharded: lets FSDP2 run on the meta device",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup": "plan.sharded: the same",
    "torch.distributed.tensor._redistribute.clear_redistribute_planner_cache": "engine.release",
    "torch.testing._internal.distributed.fake_pg.FakeStore": "plan.groups: groups of ranks that do not exist",
}
"""What plans need besides; seen in torch 2.11 to 2.15."""

MEGATRON_NAMES = {
    "megatron.core.distributed.param_and_grad_buffer.dist_reduce_scatter_func": "engine.wrap.ddp: is put back",
    "megatron.core.models.common.language_module.language_module.LanguageModule._is_in_embd_group": "engine.meta",
    "megatron.core.models.common.embeddings.RotaryEmbedding.forward.cache_clear": "engine.groups",
    "megatron.core.models.common.embeddings.YarnRotaryEmbedding.forward.cache_clear": "engine.groups",
    "megatron.core.parallel_state._set_global_memory_buffer": "plan.groups: stands in for its initialiser",
    "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu": "cpu: a tensor that is there already",
    "megatron.core.transformer.moe.router.TopKRouter._maintain_float32_expert_bias": "engine.precision: stay fp32",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": "cpu: the same",
}
"""What each is for, by name; seen in megatron-core 0.19.2. Most would be passed over in silence if they were gone."""

MEGATRON_ATTRIBUTES = {
    "allreduce": "engine.placement, engine.wrap: whether a parameter is no expert's",
    "chained_optimizers": "plan.measure: the optimizers of an optimizer",
    "embd": "engine.groups: the embedding group of a collection",
    "expt_tp": "engine.placement: the tensor-parallel group of experts",
    "intra_dp_cp": "engine.wrap.ddp: the ranks of one optimizer instance",
    "intra_expt_dp": "engine.wrap.ddp: the same, of experts",
    "layer_number": "engine.placement: the place of a layer in the whole model",
    "main_grad": "plan.sharded, engine.copies: where gradients are added up",
    "mtp_process": "engine.meta, engine.copies: whether a stage predicts further tokens",
    "num_gemms": "engine.placement: how many experts a module holds",
    "output_layer": "train: whose logits are masked",
    "partition_dim": "engine.placement: the dimension that is split",
    "partition_sizes": "engine.placement: the blocks of a Mamba layer's projection",
    "partition_stride": "engine.placement: how a parameter is split",
    "post_process": "plan.measure: whether a stage is the last",
    "pre_process": "plan.measure: whether it is the first",
    "share_embeddings_and_output_weights": "engine.placement: whether an embedding is tied",
    "tensor_model_parallel": "engine.placement, engine.copies: whether a parameter is split",
    "zero_grad_buffer": "train: of stages with buffers of gradients",
}
"""Attributes that are looked up where not every object has them, so that without them nothing would be said.

Seen in megatron-core 0.19.2 on parameters, modules, optimizers and collections of process groups. A test finds each.
"""

MEGATRON_MESSAGE = "CPU RNG state changed within GPU RNG context"
"""What the CPU runtime keeps out of the log of ``megatron.core.tensor_parallel.random`` (megatron-core 0.19.2)."""
