"""Private names of torch and megatron-core that bridge-dist relies on."""

from __future__ import annotations

import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

TESTED_THROUGHOUT = (2, 11)
"""The oldest torch that every feature is tested with; plans and torch FSDP2 require it.

torch 2.6 refuses collectives on meta tensors, which plans run, and its FSDP2 lacks a method of streams. With torch 2.8
on gloo, FSDP2's gradients are too large by a factor of the number of ranks.
"""


PRIVATE_NAMES = {
    "torch._C._distributed_c10d.PrefixStore": "run.store: separates the keys of jobs",
    "torch._C._distributed_c10d.TCPStore": "run.store, run.pool: rendezvous of ranks",
    "torch._dynamo": "process.imports: not loaded where nothing is compiled",
    "torch.distributed.checkpoint.filesystem._StorageInfo": "checkpoint.pickles: what .metadata may name",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": "checkpoint.pickles: the same",
    "torch.serialization._get_layout": "checkpoint.pickles: the same",
    "torch.autograd.graph._engine_run_backward": "cpu.redirect: redirects the backward pass",
    "torch.autograd._engine_run_backward": "cpu.redirect: the same function, bound by torch.autograd",
    "torch.distributed._coalescing_manager": "cpu.collectives: gloo mixes up tensors of different precision",
    "torch.distributed.distributed_c10d._CoalescingManager": "cpu.collectives: yielded by the replacement",
    "torch.distributed.distributed_c10d._get_default_store": "checks.agreement: ranks compare through it",
    "torch.distributed.distributed_c10d._world": "engine.groups: lists the process groups",
    "torch.distributed.tensor.DTensor._op_dispatcher": "engine.release: its caches are cleared",
    "torch.overrides._pop_mode": "cpu.runtime: removes its mode from below others",
    "torch.overrides._push_mode": "cpu.runtime: restores the others",
    "torch.utils._device.DeviceContext": "cpu.redirect: makes tensors on the meta device",
    "torch.utils._python_dispatch.TorchDispatchMode": "plan.count: counts operations",
}
"""Purpose of each private name of torch 2.6 to 2.15. A test reports names that no longer exist."""

PRIVATE_NAMES_OF_PLANS = {
    "torch._C._clear_DTensor_sharding_propagator_cache": "engine.release: clears a cache",
    "torch._C._distributed_c10d.FakeProcessGroup": "plan.virtual_rank.groups: groups of ranks that do not exist",
    "torch._C._distributed_c10d._register_process_group": "plan.virtual_rank.groups: registers them",
    "torch.UntypedStorage._new_with_weak_ptr": "plan.virtual_rank.sharding: tracks memory until it is freed",
    "torch.distributed.fsdp._fully_shard._fully_shard": "plan.virtual_rank.sharding: FSDP2 on the meta device",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup": "plan.virtual_rank.sharding: the same",
    "torch.distributed.tensor._redistribute.clear_redistribute_planner_cache": "engine.release: clears a cache",
    "torch.testing._internal.distributed.fake_pg.FakeStore": "plan.virtual_rank.groups: store of such groups",
}
"""Purpose of each private name that only plans use, in torch 2.11 to 2.15."""

MEGATRON_NAMES = {
    "megatron.core.distributed.param_and_grad_buffer.dist_reduce_scatter_func": "engine.wrap.ddp: restored",
    "megatron.core.models.common.language_module.language_module.LanguageModule._is_in_embd_group": "engine.meta",
    "megatron.core.dist_checkpointing.load_common_state_dict": "checkpoint.reader: replaced",
    "megatron.core.dist_checkpointing.serialization.load_common_state_dict": "checkpoint.reader: replaced",
    "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue": "checkpoint.save: replaced",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreLoadPlanner": "checkpoint.reader: replaced",
    "megatron.core.dist_checkpointing.strategies.torch._get_filesystem_reader": "checkpoint.reader: replaced",
    "megatron.core.optimizer.DistributedOptimizer._set_main_param_and_optimizer_states": "checkpoint.optimizer",
    "megatron.core.models.common.embeddings.RotaryEmbedding.forward.cache_clear": "engine.groups",
    "megatron.core.models.common.embeddings.YarnRotaryEmbedding.forward.cache_clear": "engine.groups",
    "megatron.core.parallel_state._set_global_memory_buffer": "plan.virtual_rank.groups: sets up the buffer",
    "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu": "cpu.runtime",
    "megatron.core.transformer.moe.router.TopKRouter._maintain_float32_expert_bias": "engine.precision",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": "cpu.runtime",
}
"""Purpose of each name in megatron-core 0.19.2. Most would fail silently if they disappeared."""

MEGATRON_ATTRIBUTES = {
    "allreduce": "engine.placement, engine.wrap: False for parameters of experts",
    "chained_optimizers": "plan.count.memory: the parts of a chained optimizer",
    "embd": "engine.groups: the embedding group of a collection",
    "ep": "engine.groups: the expert-parallel group of a collection",
    "expt_tp": "engine.placement: the tensor-parallel group of experts",
    "intra_dp_cp": "engine.wrap.ddp: the ranks of one optimizer instance",
    "intra_expt_dp": "engine.wrap.ddp: the same for experts",
    "layer_number": "engine.placement: the position of a layer in the whole model",
    "main_grad": "plan.virtual_rank.sharding, engine.replicas: where gradients accumulate",
    "mtp_process": "engine.meta, engine.replicas: whether a stage does multi-token prediction",
    "num_gemms": "engine.placement: how many experts a module holds",
    "output_layer": "train.invariance: its logits are masked",
    "partition_dim": "engine.placement: the dimension that is split",
    "partition_sizes": "engine.placement: the blocks of a Mamba layer's projection",
    "partition_stride": "engine.placement: how a parameter is split",
    "post_process": "plan.count: whether a stage is the last",
    "pre_process": "plan.count: whether a stage is the first",
    "share_embeddings_and_output_weights": "engine.placement: whether an embedding is tied",
    "tensor_model_parallel": "engine.placement, engine.replicas: whether a parameter is split",
    "zero_grad_buffer": "train.step: stages with gradient buffers",
}
"""Attributes read with a default because not every object has them; a rename in Megatron would go unnoticed.

Seen in megatron-core 0.19.2 on parameters, modules, optimizers and collections of process groups. A test finds each.
"""

MEGATRON_MESSAGE = "CPU RNG state changed within GPU RNG context"
"""Warning of ``megatron.core.tensor_parallel.random`` (megatron-core 0.19.2) that the CPU runtime filters out."""
