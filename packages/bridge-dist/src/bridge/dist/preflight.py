"""What is known to fail late, to hang or to train silently wrong, refused before anything is built.

One table: a rule looks at a configuration, a layout and the build options, and says what conflicts and what to set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import cleandoc

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from bridge.config import ModelConfig
from bridge.dist.documents import CONFIG_FIELDS
from bridge.dist.environment import Environment
from bridge.dist.errors import PreflightError
from bridge.dist.layout import Layout, says_how_to_split
from bridge.dist.options import BuildOptions, Wrapper

MEGATRON = "megatron-core 0.19.2"
"""The version that the rules about Megatron were seen in."""

_STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a rule looks at: a model, how it is split, how its stages are wrapped, and where that is done."""

    transformer: TransformerConfig
    layout: Layout
    options: BuildOptions
    model: ModelConfig | None = None
    """The whole configuration of the model, where there is one."""
    groups: ProcessGroupCollection | None = None
    """The process groups; None where they are still to be made, by ``create_process_groups``."""
    environment: Environment = field(default_factory=Environment.here)

    @property
    def ddp(self) -> DistributedDataParallelConfig:
        """The configuration of the wrapper; without a wrapper, the default one."""
        return self.options.ddp_config or DistributedDataParallelConfig()

    @property
    def shards_optimizer(self) -> bool:
        """Whether DDP reduces to each rank only the gradients of the parameters that it updates."""
        return self.ddp.use_distributed_optimizer or self.options.has_layer_wise_layout

    @property
    def expert_dp(self) -> int:
        """Number of ranks that hold copies of the same experts."""
        assert self.layout.etp is not None
        ranks = self.layout.tp * self.layout.cp * self.layout.dp
        return ranks // (self.layout.etp * self.layout.ep)

    @property
    def has_virtual_pipeline(self) -> bool:
        """Whether a rank holds several stages; a pipeline of one rank is not divided further."""
        return self.layout.pp > 1 and self.layout.vp > 1

    @property
    def is_fsdp(self) -> bool:
        """Whether stages get a wrapper that shards them."""
        return self.options.wrapper in (Wrapper.MEGATRON_FSDP, Wrapper.TORCH_FSDP2)

    def is_wrapped_with(self, wrapper: Wrapper) -> bool:
        """Whether stages get this wrapper."""
        return self.options.wrapper is wrapper


Problems = Callable[[Setup], Iterator[str]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that is known not to work.

    ``name`` is short and stays, ``why`` says what happens without the rule, ``seen`` in which version (None: it follows
    by arithmetic), and ``problems`` yields what conflicts in a setup, and what to set. ``not_shown`` says why no test
    shows what the rule prevents, if none does.
    """

    name: str
    why: str
    problems: Problems
    seen: str | None = None
    not_shown: str | None = None


def rule(*, seen: str | None = None, not_shown: str | None = None) -> Callable[[Problems], Rule]:
    """Make a rule of a function: its name with dashes is the rule's, its docstring says why."""

    def made(problems: Problems) -> Rule:
        return Rule(
            name=problems.__name__.replace("_", "-"),
            why=cleandoc(problems.__doc__ or ""),
            problems=problems,
            seen=seen,
            not_shown=not_shown,
        )

    return made


def check(setup: Setup, rules: Sequence[Rule] = ()) -> None:
    """Check a setup against the table, and against further rules, of its model's family.

    Raises:
        PreflightError: With every problem found, each with the name of its rule.
    """
    problems = [f"{problem} [{rule.name}]" for rule in (*RULES, *rules) for problem in rule.problems(setup)]
    if problems:
        raise PreflightError(problems)


def layout_of_groups(config: TransformerConfig, pg_collection: ProcessGroupCollection) -> Layout:
    """Return the layout of process groups; the virtual pipeline, which has no group, is the configuration's."""
    return Layout(
        tp=pg_collection.tp.size(),
        pp=pg_collection.pp.size(),
        vp=config.virtual_pipeline_model_parallel_size or 1,
        cp=pg_collection.cp.size(),
        ep=pg_collection.ep.size() if hasattr(pg_collection, "ep") else 1,
        etp=pg_collection.expt_tp.size() if hasattr(pg_collection, "expt_tp") else None,
        dp=pg_collection.dp.size(),
    )


# --- Sizes


@rule()
def groups_fit_configuration(setup: Setup) -> Iterator[str]:
    """Megatron cuts layers by the process groups in some places and by the configuration in others."""
    names = ["tp", "pp", "cp", "ep"]
    if setup.transformer.num_moe_experts:
        names.append("etp")
    for name in names:
        wanted, there = getattr(setup.transformer, CONFIG_FIELDS[name]), getattr(setup.layout, name)
        if wanted != there:
            yield (
                f"{CONFIG_FIELDS[name]} is {wanted} but the {name} process group has {there} rank(s): "
                f"set it to {there}, or create the groups for {wanted}"
            )


@rule()
def heads_divide(setup: Setup) -> Iterator[str]:
    """Each tensor-parallel rank holds whole attention heads, and whole query groups or a share of one."""
    tp, heads, groups = setup.layout.tp, setup.transformer.num_attention_heads, setup.transformer.num_query_groups
    if heads % tp:
        yield f"num_attention_heads = {heads} is not a multiple of tp = {tp}: choose a tp that divides it"
    if groups and groups % tp and tp % groups:
        yield f"num_query_groups = {groups} is neither a multiple nor a divisor of tp = {tp}: choose a tp that is"


@rule()
def feed_forward_divides(setup: Setup) -> Iterator[str]:
    """Each tensor-parallel rank holds an equal part of every feed-forward layer."""
    config = setup.transformer
    if hasattr(config, "per_block_parameters"):  # a heterogeneous model gives each layer its own sizes
        return
    is_moe = config.num_moe_experts is not None
    sizes = {
        ("ffn_hidden_size", "tp"): not is_moe or config.moe_layer_freq != 1,
        ("moe_ffn_hidden_size", "etp"): is_moe,
        ("moe_shared_expert_intermediate_size", "tp"): is_moe,
    }
    for (name, axis), applies in sizes.items():
        size, ranks = getattr(config, name), getattr(setup.layout, axis)
        if applies and size is not None and size % ranks:
            yield f"{name} = {size} is not a multiple of {axis} = {ranks}: choose a multiple, or another {axis}"


@rule()
def experts_divide(setup: Setup) -> Iterator[str]:
    """Each expert-parallel rank holds the same number of experts."""
    experts, ep = setup.transformer.num_moe_experts, setup.layout.ep
    if experts and experts % ep:
        yield f"num_moe_experts = {experts} is not a multiple of ep = {ep}: choose an ep that divides it"


@rule()
def layers_divide(setup: Setup) -> Iterator[str]:
    """Stages are equal unless the configuration says how to split."""
    pattern: str | None = getattr(setup.model, "hybrid_layer_pattern", None)
    if says_how_to_split(setup.transformer) or "|" in (pattern or ""):
        return
    pp, vp = setup.layout.pp, setup.layout.vp if setup.has_virtual_pipeline else 1
    if setup.transformer.num_layers % (pp * vp):
        yield (
            f"num_layers = {setup.transformer.num_layers} does not divide into pp x vp = {pp} x {vp} = {pp * vp} "
            "equal stages: change pp or vp, or say how to split in pipeline_model_parallel_layout"
        )


# --- Pipelines


@rule(seen=MEGATRON)
def interleaving_on_two_ranks(setup: Setup) -> Iterator[str]:
    """With two pipeline ranks the previous and the next one are the same, and batched sends and receives of different
    chunks are matched with each other: gradients are wrong, without an error.
    """
    config = setup.transformer
    if setup.has_virtual_pipeline and setup.layout.pp == 2 and config.batch_p2p_comm and not config.overlap_p2p_comm:
        yield (
            "a virtual pipeline on pp = 2 computes wrong gradients with batch_p2p_comm: "
            "set batch_p2p_comm = False and overlap_p2p_comm = True, or use pp > 2"
        )


@rule(seen=MEGATRON)
def interleaving_group_size(setup: Setup) -> Iterator[str]:
    """The interleaved schedule raises a ValueError in the first step."""
    size, pp = setup.transformer.microbatch_group_size_per_vp_stage, setup.layout.pp
    if setup.has_virtual_pipeline and size is not None and size < pp:
        yield (
            f"microbatch_group_size_per_vp_stage = {size} is smaller than pp = {pp}, which a virtual pipeline does not "
            f"take: set it to {pp} or more"
        )


@rule(seen=MEGATRON)
def overlapped_and_batched_messages(setup: Setup) -> Iterator[str]:
    """The interleaved schedule raises a ValueError in the first step."""
    config = setup.transformer
    if setup.has_virtual_pipeline and config.overlap_p2p_comm and config.batch_p2p_comm:
        yield "a virtual pipeline does not take both overlap_p2p_comm and batch_p2p_comm: set batch_p2p_comm = False"


@rule(seen=MEGATRON)
def overlapped_messages_without_interleaving(setup: Setup) -> Iterator[str]:
    """The schedule of a pipeline without virtual stages raises a ValueError in the first step."""
    if setup.layout.pp > 1 and not setup.has_virtual_pipeline and setup.transformer.overlap_p2p_comm:
        yield "a pipeline without virtual stages does not take overlap_p2p_comm: set it to False, or vp > 1"


@rule(seen=MEGATRON)
def pipeline_dtype(setup: Setup) -> Iterator[str]:
    """The receiving stage allocates ``pipeline_dtype``, whatever the sending one sends: it hangs or crashes."""
    config = setup.transformer
    if config.fp32_residual_connection:
        sent = torch.float32
    else:
        sent = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else config.params_dtype
    if setup.layout.pp > 1 and config.pipeline_dtype != sent:
        yield (
            f"pipeline_dtype is {config.pipeline_dtype}, but the stages of this model send {sent}: "
            f"set pipeline_dtype to {sent}"
        )


# --- Layers


@rule(seen=MEGATRON)
def experts_without_sequence_parallelism(setup: Setup) -> Iterator[str]:
    """Layers with experts raise a ValueError in the first forward pass of training."""
    config, wrapper = setup.transformer, setup.options.wrapper
    if config.num_moe_experts and setup.layout.tp > 1 and not config.sequence_parallel and wrapper is not Wrapper.NONE:
        yield "a model with experts does not train with tp > 1 alone: set sequence_parallel = True, or tp = 1"


@rule(seen=MEGATRON)
def meta_device_and_cpu_initialization(setup: Setup) -> Iterator[str]:
    """Parallel layers end on the meta device without an initialiser, and losses are NaN."""
    if setup.transformer.init_model_with_meta_device and setup.transformer.use_cpu_initialization:
        yield "init_model_with_meta_device and use_cpu_initialization leave weights uninitialised: set one to False"


# --- What somebody must make first


@rule(seen=MEGATRON)
def weight_shards(setup: Setup) -> Iterator[str]:
    """Without process groups of their own, weights are not split further than tensor parallelism splits them: training
    goes on as if it had not been asked for.
    """
    config = setup.transformer
    splits = [("tensor_parallel_num_weight_shards", config.gtp_weight_remat_size, "tensor_model_parallel_size")]
    if config.num_moe_experts:
        experts = ("expert_tensor_parallel_num_weight_shards", config.expert_gtp_weight_remat_size)
        splits.append((*experts, "expert_tensor_parallel_size"))
    for name, parts, usual in splits:
        if parts > 1:
            yield (
                f"weights in {parts} shards a tensor-parallel rank need process groups and optimizers that Bridge does "
                f"not make: set {name} to None, or raise {usual}"
            )


@rule(seen=MEGATRON)
def context_parallelism_in_two_levels(setup: Setup) -> Iterator[str]:
    """Transformer Engine's attention gets None for its groups; attention in PyTorch communicates otherwise and does not
    say so.
    """
    config = setup.transformer
    kinds = config.cp_comm_type if isinstance(config.cp_comm_type, list) else [config.cp_comm_type]
    asked = config.hierarchical_context_parallel_sizes or "a2a+p2p" in kinds
    made = setup.groups is not None and setup.groups.hcp is not None
    if setup.layout.cp > 1 and asked and not made:
        yield (
            "context parallelism in two levels needs process groups that Bridge does not make: set "
            "hierarchical_context_parallel_sizes to None, and cp_comm_type to p2p, all_gather or a2a"
        )


@rule(seen=MEGATRON)
def hybrid_context_parallelism(setup: Setup) -> Iterator[str]:
    """It takes groups of every size, and samples that say how many ranks share them: an IndexError in the first
    step.
    """
    if setup.transformer.hybrid_context_parallel:
        yield (
            "hybrid_context_parallel needs process groups and samples that Bridge does not make: set it to False, "
            "and context_parallel_size for all samples alike"
        )


@rule(seen=MEGATRON)
def pipeline_backend(setup: Setup) -> Iterator[str]:
    """Process groups are of the world's backend, and messages go by it, whatever the configuration says."""
    backend, groups = setup.transformer.pipeline_model_parallel_comm_backend, setup.groups
    made = groups is not None and torch.distributed.get_backend(groups.pp) == backend
    if setup.layout.pp > 1 and backend not in (None, "nccl") and not made:
        yield (
            f"pipeline_model_parallel_comm_backend is {backend}, but the pipeline's process group is of the world's "
            "backend: set it to None, or make the group so"
        )


@rule(seen=MEGATRON)
def ring_exchange(setup: Setup) -> Iterator[str]:
    """An AttributeError in the first step: it needs a custom build of torch."""
    missing = not hasattr(torch.distributed, "ring_exchange")
    if setup.layout.pp > 1 and setup.transformer.use_ring_exchange_p2p and missing:
        yield "this torch has no ring_exchange: set use_ring_exchange_p2p = False"


@rule(seen=MEGATRON)
def tensor_parallel_overlap(setup: Setup) -> Iterator[str]:
    """Transformer Engine asserts in the first forward pass that its buffers were made; layers in PyTorch overlap
    nothing, and do not say so.
    """
    if setup.layout.tp > 1 and setup.transformer.tp_comm_overlap and not setup.environment.has_user_buffers:
        yield (
            "tp_comm_overlap communicates through buffers of Transformer Engine that nobody has made: set it to False, "
            "or call transformer_engine.pytorch.module.base.initialize_ub before the build"
        )


@rule(seen=MEGATRON)
def batch_invariant_kernels(setup: Setup) -> Iterator[str]:
    """Layers say that they are batch-invariant, but the kernels that they call are the usual ones."""
    if setup.transformer.batch_invariant_mode and not setup.environment.is_batch_invariant:
        yield (
            "batch_invariant_mode needs Megatron's own kernels switched on: set it to False, or call "
            "enable_batch_invariant_mode of megatron.core.transformer.custom_layers.batch_invariant_kernels first"
        )


# --- GPUs

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = (10, 0)
_OFFLOAD = "NVTE_CPU_OFFLOAD_V1"


@rule(seen=MEGATRON, not_shown="it is about how GPUs order kernels")
def connections_of_split_layers(setup: Setup) -> Iterator[str]:
    """Before Blackwell, a GPU that takes work by several connections may start a computation before the communication
    that it shall overlap: Megatron's layers rely on one connection. Where it is not set, a warning says so.
    """
    connections = setup.environment.variables.get(_CONNECTIONS)
    if _takes_one_connection(setup) and connections not in (None, "1"):
        yield (
            f"tensor and context parallelism on this GPU take {_CONNECTIONS} = 1, not {connections}: "
            "set it so in the environment of every rank"
        )


def warning(setup: Setup) -> str | None:
    """Return what costs a setup that passes some of its speed."""
    if _takes_one_connection(setup) and _CONNECTIONS not in setup.environment.variables:
        return (
            f"{_CONNECTIONS} is not set: with tensor or context parallelism on this GPU, set it to 1 in the "
            "environment of every rank, or communication may wait for the computation that it shall overlap"
        )
    return None


def _takes_one_connection(setup: Setup) -> bool:
    capability = setup.environment.compute_capability
    before_blackwell = capability is not None and capability < _BLACKWELL
    overlaps_otherwise = setup.is_fsdp or setup.transformer.overlap_moe_expert_parallel_comm
    return before_blackwell and (setup.layout.tp > 1 or setup.layout.cp > 1) and not overlaps_otherwise


@rule(seen=MEGATRON, not_shown="it is about how GPUs order kernels")
def connections_of_fsdp(setup: Setup) -> Iterator[str]:
    """By a single connection, what FSDP gathers ahead waits for the computation that it shall overlap."""
    has_gpu = setup.environment.compute_capability is not None
    if has_gpu and setup.is_fsdp and setup.environment.variables.get(_CONNECTIONS) == "1":
        yield (
            f"{setup.options.wrapper} overlaps nothing with {_CONNECTIONS} = 1: take that out of the environment of "
            "every rank, or wrap with ddp"
        )


_DETERMINISTIC = {
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
}
"""What makes NCCL, Transformer Engine and cuBLAS add up in one order, by Megatron's own start-up; NCCL takes a list."""


@rule(seen=MEGATRON, not_shown="a CPU adds up in one order anyway")
def deterministic_libraries(setup: Setup) -> Iterator[str]:
    """Layers choose deterministic algorithms, but the libraries that they call go on with the faster ones."""
    if not setup.transformer.deterministic_mode or setup.environment.compute_capability is None:
        return
    for name in ("cross_entropy_loss_fusion", "tp_comm_overlap"):
        if getattr(setup.transformer, name):
            yield f"deterministic_mode does not go with {name}: set one of them to False"
    for name, allowed in _DETERMINISTIC.items():
        values = setup.environment.variables.get(name, "").split(",")
        if not {value.strip() for value in values} <= set(allowed):
            yield (
                f"deterministic_mode takes {name} = {allowed[0]} in the environment of every rank: set it, or "
                "deterministic_mode = False"
            )


@rule(seen=MEGATRON, not_shown="it needs Transformer Engine")
def offloaded_weights(setup: Setup) -> Iterator[str]:
    """From version 2.10 on, Transformer Engine offloads weights too, unless it is told to work as before."""
    asked = setup.transformer.fine_grained_activation_offloading and setup.environment.compute_capability is not None
    if asked and setup.environment.variables.get(_OFFLOAD) != "1":
        yield (
            f"fine_grained_activation_offloading takes {_OFFLOAD} = 1 in the environment of every rank: set it, or "
            "fine_grained_activation_offloading = False"
        )


@rule(seen=MEGATRON)
def cuda_graphs(setup: Setup) -> Iterator[str]:
    """An AssertionError about random states while layers are built, or no graphs and no word of it."""
    implementation = setup.transformer.cuda_graph_impl
    if implementation != "none" and setup.environment.compute_capability is None:
        yield f"cuda_graph_impl is {implementation}, but there is no GPU: set it to none"


@rule(seen=MEGATRON)
def nccl_buffers(setup: Setup) -> Iterator[str]:
    """A ValueError about an unknown GPU while wrapping, after the whole model was built."""
    wrapped = setup.is_wrapped_with(Wrapper.DDP) or setup.is_wrapped_with(Wrapper.MEGATRON_FSDP)
    if wrapped and setup.ddp.nccl_ub and setup.environment.compute_capability is None:
        yield "nccl_ub registers buffers with NCCL, but there is no GPU: set it to False"


# --- DDP


@rule(seen=MEGATRON)
def parameter_gather_without_distributed_optimizer(setup: Setup) -> Iterator[str]:
    """There is nothing to gather: a TypeError in the first forward pass."""
    gathers = setup.is_wrapped_with(Wrapper.DDP) and setup.ddp.overlap_param_gather
    if gathers and not (setup.shards_optimizer or setup.options.use_layer_wise_distributed_optimizer):
        yield (
            "DDP fails with overlap_param_gather but without a distributed optimizer: "
            "set use_distributed_optimizer = True, or overlap_param_gather = False"
        )


@rule(seen=MEGATRON)
def instances_without_distributed_optimizer(setup: Setup) -> Iterator[str]:
    """A bare AssertionError while wrapping, after the whole model was built."""
    several = setup.is_wrapped_with(Wrapper.DDP) and setup.ddp.num_distributed_optimizer_instances > 1
    if several and not setup.shards_optimizer:
        yield (
            "num_distributed_optimizer_instances > 1 needs a distributed optimizer: "
            "set use_distributed_optimizer = True, or the number of instances to 1"
        )


@rule(seen=MEGATRON)
def average_of_per_token_loss(setup: Setup) -> Iterator[str]:
    """An AssertionError while wrapping, after the whole model was built."""
    wrapped = setup.is_wrapped_with(Wrapper.DDP)
    if wrapped and setup.ddp.average_in_collective and setup.transformer.calculate_per_token_loss:
        yield "DDP does not average gradients of a per-token loss: set average_in_collective = False"


@rule(seen=MEGATRON)
def fp32_reduce_scatter(setup: Setup) -> Iterator[str]:
    """A bare AssertionError while wrapping, or in the first step."""
    wrapped = setup.is_wrapped_with(Wrapper.DDP) and setup.shards_optimizer
    if not (wrapped and setup.ddp.reduce_scatter_with_fp32_accumulation):
        return
    if setup.ddp.average_in_collective:
        yield "reduce_scatter_with_fp32_accumulation only sums: set average_in_collective = False"
    if setup.ddp.num_distributed_optimizer_instances > 1:
        yield (
            "reduce_scatter_with_fp32_accumulation takes one optimizer instance: "
            "set it to False, or num_distributed_optimizer_instances = 1"
        )


@rule(seen=MEGATRON)
def custom_fsdp(setup: Setup) -> Iterator[str]:
    """Nothing reads this older name of ``use_megatron_fsdp``: stages are wrapped with DDP."""
    if setup.ddp.use_custom_fsdp and not setup.is_wrapped_with(Wrapper.MEGATRON_FSDP):
        yield "use_custom_fsdp is an older name that nothing reads: set use_megatron_fsdp in its place"


# --- torch FSDP2


@rule(seen=MEGATRON)
def torch_fsdp2_experts(setup: Setup) -> Iterator[str]:
    """Experts are sharded over ranks that hold other experts: losses are wrong, or the optimizer fails."""
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and setup.layout.ep > 1:
        yield "torch FSDP2 computes wrong losses with expert parallelism: set ep = 1, or wrap with ddp"


@rule(seen=MEGATRON)
def torch_fsdp2_tied_embeddings(setup: Setup) -> Iterator[str]:
    """The tied weight is sharded in one of its uses only: an error about mixed tensors in the first forward pass."""
    tied = getattr(setup.model, "share_embeddings_and_output_weights", False)
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and tied:
        yield (
            "torch FSDP2 fails with tied embeddings: set share_embeddings_and_output_weights = False, "
            "or wrap with ddp or megatron-fsdp"
        )


@rule(seen=MEGATRON)
def torch_fsdp2_distributed_optimizer(setup: Setup) -> Iterator[str]:
    """Megatron's distributed optimizer looks for DDP's buffers: a TypeError when it is made. FSDP2 shards by itself."""
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and setup.ddp.use_distributed_optimizer:
        yield "torch FSDP2 does not take Megatron's distributed optimizer: set use_distributed_optimizer = False"


@rule(seen=MEGATRON, not_shown="the kernel runs on a GPU only")
def torch_fsdp2_fused_gradients(setup: Setup) -> Iterator[str]:
    """The kernel adds to a buffer of Megatron's (``main_grad``) that FSDP2's parameters do not have."""
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and setup.transformer.gradient_accumulation_fusion:
        yield "torch FSDP2 has no buffers to accumulate gradients in: set gradient_accumulation_fusion = False"


@rule(seen=MEGATRON, not_shown="it needs Transformer Engine")
def torch_fsdp2_quantized_parameters(setup: Setup) -> Iterator[str]:
    """Transformer Engine 2 has no way for FSDP2 to gather them: Megatron's start-up turns them off."""
    quantized = [name for name in ("fp8_param", "fp4_param") if getattr(setup.transformer, name)]
    if setup.is_wrapped_with(Wrapper.TORCH_FSDP2) and quantized:
        yield f"torch FSDP2 does not take parameters of 8 or 4 bits: set {' and '.join(quantized)} to False"


# --- Megatron-FSDP


@rule(seen=MEGATRON)
def megatron_fsdp_pipeline(setup: Setup) -> Iterator[str]:
    """An EinopsError while wrapping: its device mesh takes the whole world for one pipeline stage."""
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and setup.layout.pp > 1:
        yield "Megatron-FSDP fails in a pipeline: set pp = 1, or wrap with ddp"


@rule(seen=MEGATRON)
def megatron_fsdp_distributed_optimizer(setup: Setup) -> Iterator[str]:
    """The weights that the model reads are never updated, and each rank clips by its own norm, without an error."""
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and not setup.ddp.use_distributed_optimizer:
        yield (
            "Megatron-FSDP trains wrong without the distributed optimizer: set use_distributed_optimizer = True, "
            "in the optimizer's configuration too"
        )


@rule(seen=MEGATRON)
def megatron_fsdp_fp16(setup: Setup) -> Iterator[str]:
    """The optimizer unscales gradients that a rank's shard may not have: an AttributeError in the first step."""
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and setup.transformer.fp16:
        yield "Megatron-FSDP fails with fp16: set bf16 = True and fp16 = False, or wrap with ddp"


@rule(seen=MEGATRON, not_shown="it needs Transformer Engine")
def megatron_fsdp_grouped_parameters(setup: Setup) -> Iterator[str]:
    """Megatron-FSDP cannot put the storage of Transformer Engine's grouped parameters into its own buffers."""
    names = ("moe_single_grouped_weight", "moe_single_grouped_bias")
    grouped = [name for name in names if getattr(setup.transformer, name)]
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and grouped:
        yield f"Megatron-FSDP does not take grouped parameters: set {' and '.join(grouped)} to False, or wrap with ddp"


@rule(seen=MEGATRON)
def megatron_fsdp_average(setup: Setup) -> Iterator[str]:
    """An AttributeError about expert groups while wrapping."""
    wrapped = setup.is_wrapped_with(Wrapper.MEGATRON_FSDP)
    if wrapped and setup.ddp.average_in_collective and setup.transformer.num_moe_experts is None:
        yield "Megatron-FSDP fails with average_in_collective in a model without experts: set it to False"


@rule(seen=MEGATRON)
def megatron_fsdp_fused_division(setup: Setup) -> Iterator[str]:
    """Only NCCL can multiply while it reduces: a RuntimeError in the first step."""
    ddp, config = setup.ddp, setup.transformer
    divides = not (ddp.average_in_collective or config.calculate_per_token_loss or config.bf16)
    on_cpu = not torch.cuda.is_available()
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and ddp.gradient_reduce_div_fusion and divides and on_cpu:
        yield "Megatron-FSDP cannot fuse reduction and division without NCCL: set gradient_reduce_div_fusion = False"


@rule(seen=MEGATRON)
def megatron_fsdp_single_experts(setup: Setup) -> Iterator[str]:
    """With several microbatches the gradients of experts that live on one rank only are wrong, without an error."""
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and setup.layout.ep > 1 and setup.expert_dp == 1:
        yield (
            "Megatron-FSDP computes wrong gradients when each expert lives on one rank only (expert data parallelism "
            "of 1): raise dp, lower ep, or wrap with ddp"
        )


@rule(seen=MEGATRON)
def megatron_fsdp_strategy(setup: Setup) -> Iterator[str]:
    """A bare AssertionError while wrapping."""
    strategy = setup.ddp.data_parallel_sharding_strategy
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and strategy not in _STRATEGIES:
        yield f"data_parallel_sharding_strategy {strategy!r} is unknown: set one of {', '.join(_STRATEGIES)}"


@rule(seen=MEGATRON)
def megatron_fsdp_instances(setup: Setup) -> Iterator[str]:
    """Gradients are reduced within one instance only: they are wrong, without an error."""
    several = setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and setup.ddp.num_distributed_optimizer_instances > 1
    strategy = setup.ddp.data_parallel_sharding_strategy
    if several and strategy in ("no_shard", "optim"):
        yield (
            f"Megatron-FSDP computes wrong gradients with num_distributed_optimizer_instances > 1 and "
            f"data_parallel_sharding_strategy {strategy}: set 1, or optim_grads or optim_grads_params"
        )


@rule(seen=MEGATRON)
def megatron_fsdp_outer_sharding(setup: Setup) -> Iterator[str]:
    """Gradient norms are wrong, and so is clipping, without an error; fails outright with one instance."""
    strategy = setup.ddp.outer_dp_sharding_strategy
    if setup.is_wrapped_with(Wrapper.MEGATRON_FSDP) and strategy != "no_shard":
        yield f"Megatron-FSDP computes wrong norms with outer_dp_sharding_strategy {strategy}: set it to no_shard"


RULES: tuple[Rule, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Rule))
"""The table, in the order of this file."""
