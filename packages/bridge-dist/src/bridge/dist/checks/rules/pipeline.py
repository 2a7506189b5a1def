"""Rules about pipelines, with and without virtual stages."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.config.schema.pipeline_layout import parse_stages
from bridge.dist.checks.preflight import CONSTRUCTOR, MEGATRON, Rule, Setup, rule
from bridge.dist.layout import find_embedding_ranks, find_mtp_rank


@rule(observed_in=MEGATRON)
def interleaving_on_two_ranks(setup: Setup) -> Iterator[str]:
    """With two pipeline ranks, the previous and the next rank are the same. Batched sends and receives of different
    virtual stages are matched with each other: gradients are wrong, without an error.
    """
    config = setup.transformer
    if setup.has_virtual_pipeline and setup.layout.pp == 2 and config.batch_p2p_comm and not config.overlap_p2p_comm:
        yield (
            "a virtual pipeline on pp = 2 computes wrong gradients with batch_p2p_comm: "
            "set batch_p2p_comm = False and overlap_p2p_comm = True, or use pp > 2"
        )


@rule(observed_in=MEGATRON)
def interleaving_group_size(setup: Setup) -> Iterator[str]:
    """The interleaved schedule raises a ValueError in the first step."""
    size, pp = setup.transformer.microbatch_group_size_per_vp_stage, setup.layout.pp
    if setup.has_virtual_pipeline and size is not None and size < pp:
        yield (
            f"microbatch_group_size_per_vp_stage must be at least pp = {pp} in a virtual pipeline, got {size}: "
            f"set it to {pp} or more"
        )


@rule(observed_in=MEGATRON)
def overlapped_and_batched_messages(setup: Setup) -> Iterator[str]:
    """The interleaved schedule raises a ValueError in the first step."""
    config = setup.transformer
    if setup.has_virtual_pipeline and config.overlap_p2p_comm and config.batch_p2p_comm:
        yield "a virtual pipeline cannot use both overlap_p2p_comm and batch_p2p_comm: set batch_p2p_comm = False"


@rule(observed_in=MEGATRON)
def overlapped_messages_without_interleaving(setup: Setup) -> Iterator[str]:
    """The non-interleaved schedule raises a ValueError in the first step."""
    if setup.layout.pp > 1 and not setup.has_virtual_pipeline and setup.transformer.overlap_p2p_comm:
        yield "a pipeline without virtual stages cannot use overlap_p2p_comm: set it to False, or vp > 1"


@rule(observed_in=MEGATRON)
def pipeline_dtype(setup: Setup) -> Iterator[str]:
    """The receiving stage allocates a buffer of ``pipeline_dtype``. If the sending stage sends another dtype, the run
    hangs or crashes.
    """
    config = setup.transformer
    if config.fp32_residual_connection:
        sent = "torch.float32"
    else:
        sent = "torch.bfloat16" if config.bf16 else "torch.float16" if config.fp16 else str(config.params_dtype)
    if setup.layout.pp > 1 and str(config.pipeline_dtype) != sent:
        yield (
            f"pipeline_dtype is {config.pipeline_dtype}, but the stages of this model send {sent}: "
            f"set pipeline_dtype to {sent}"
        )


@rule(observed_in=MEGATRON, no_reproduction=CONSTRUCTOR)
def uneven_pipeline(setup: Setup) -> Iterator[str]:
    """Layers beyond those assigned to the first and the last stage are divided equally over the other ranks, and each
    rank's layers over its virtual stages.
    """
    config, pp, vp = setup.transformer, setup.layout.pp, setup.layout.vp
    first, last = config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage
    if config.pipeline_model_parallel_layout is not None or (first is None and last is None):
        return
    given = {
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
    }
    ends = {name: layers for name, layers in given.items() if layers is not None}
    for name, layers in ends.items():
        if layers % vp:
            yield f"{name} = {layers} is not a multiple of vp = {vp}: choose a multiple"
    fixed = " and ".join(f"{name} = {layers}" for name, layers in ends.items())
    between, ranks = config.num_layers - sum(ends.values()), pp - len(ends)
    if ranks < 0 or (ranks == 0 and between) or between < 0:
        yield (
            f"with {fixed}, {between} of num_layers = {config.num_layers} remain for {ranks} of pp = {pp} ranks: "
            "change one of them"
        )
    elif ranks and between % (ranks * vp):
        yield (
            f"with {fixed}, {between} of num_layers = {config.num_layers} remain, which do not divide into "
            f"{ranks} ranks x vp = {vp}: change one of them"
        )


@rule(observed_in=MEGATRON, no_reproduction=CONSTRUCTOR)
def pipeline_layout(setup: Setup) -> Iterator[str]:
    """The layout must list every layer, begin with the embedding, end with the loss, and give each rank the same number
    of stages.
    """
    config, pp, vp = setup.transformer, setup.layout.pp, setup.layout.vp
    stages = parse_stages(config.pipeline_model_parallel_layout)
    if stages is None:  # none, or Megatron's own class, whose constructor has checked it
        return
    layers = [layer for stage in stages for layer in stage]
    if len(stages) % pp:
        yield f"pipeline_model_parallel_layout has {len(stages)} stages, not a multiple of pp = {pp}: choose another pp"
    elif len(stages) // pp != vp:
        fitting = f"vp = {len(stages) // pp}" if pp > 1 else f"pp = {len(stages)}"
        yield (
            f"pipeline_model_parallel_layout has {len(stages)} stages for pp = {pp} ranks, but vp = {vp}: set {fitting}"
        )
    if layers[:1] != ["embedding"] or layers[-1:] != ["loss"]:
        yield "pipeline_model_parallel_layout must begin with the embedding (E) and end with the loss (L)"
    if "mtp" in layers and "decoder" in layers[layers.index("mtp") :]:
        yield "pipeline_model_parallel_layout has decoder layers (t) after multi-token prediction (m): put m after them"
    expected = {"decoder": config.num_layers, "mtp": config.mtp_num_layers or 0, "embedding": 1, "loss": 1}
    for layer, number in expected.items():
        if layers.count(layer) != number:
            yield (
                f"pipeline_model_parallel_layout has {layers.count(layer)} {layer} layer(s), but the model has "
                f"{number}: change one of them"
            )


@rule(observed_in=MEGATRON, no_reproduction="the ranks deadlock")
def predictions_beside_the_embedding(setup: Setup) -> Iterator[str]:
    """The first and a later stage of one rank both hold a copy of the embedding. The gradients of one copy are left
    out, or the ranks deadlock.
    """
    if setup.has_virtual_pipeline and find_mtp_rank(setup.transformer) == 0:
        yield (
            "multi-token prediction on a later virtual stage of the first pipeline rank trains incorrectly: move m to "
            "a stage of another rank in pipeline_model_parallel_layout"
        )


@rule(observed_in=MEGATRON)
def embedding_group(setup: Setup) -> Iterator[str]:
    """A copy of the embedding is trained independently if its rank is not in the group. A rank of the group without a
    copy adds the gradients of the embedding to its output layer.
    """
    tied = getattr(setup.model, "share_embeddings_and_output_weights", False)
    holders, members = find_embedding_ranks(setup.transformer, tied=tied), setup.embedding_ranks
    if setup.layout.pp > 1 and None not in (holders, members) and members != holders:
        yield (
            f"pipeline ranks {holders} hold the word embedding or a copy, but the embedding group has {members}: pass "
            f"embedding_ranks={holders} to create_process_groups"
        )


RULES: tuple[Rule, ...] = (
    interleaving_on_two_ranks,
    interleaving_group_size,
    overlapped_and_batched_messages,
    overlapped_messages_without_interleaving,
    pipeline_dtype,
    uneven_pipeline,
    pipeline_layout,
    predictions_beside_the_embedding,
    embedding_group,
)
