"""Sharded checkpoints of megatron-core do not depend on the layout of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ranks import run_ranks

VOCAB = 256  # needs no padding on one or two tensor-parallel ranks


def build(preset: str, sizes: dict[str, int], *, train_steps: int) -> tuple[list[Any], Any]:
    """Build a small preset under a layout; if it is trained, its weights are initialised by name."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import Document
    from bridge.dist import Layout, create_process_groups
    from bridge.dist.document_layout import apply_layout
    from bridge.dist.engine.weights import draw_weights
    from bridge.dist.train.step import TrainOptions, train
    from bridge.dist.train.text import Text, find_default_text

    document = Document.load(preset)
    document.set("vocab_size", VOCAB)
    apply_layout(document, sizes)
    config = document.config()
    layout = Layout.of(config.transformer, torch.distributed.get_world_size())
    groups = create_process_groups(layout)
    model_parallel_cuda_manual_seed(1)

    def draw(stages: list[Any]) -> list[Any]:
        draw_weights(stages, groups, vocab_size=VOCAB)
        return stages

    if train_steps:
        config.pre_wrap_hooks.append(draw)
    builder = config.get_builder_cls()(config)
    stages = builder.build_distributed_models(groups, DistributedDataParallelConfig())
    if train_steps:
        options = TrainOptions(steps=train_steps, text=find_default_text(), seq_length=16, global_batch_size=2)
        text = Text.read(options.text, vocab_size=VOCAB)
        list(train(stages, groups, layout, text=text, options=options, forward_step=builder.forward_step))
    return stages, groups


def save(folder: Path, preset: str) -> None:
    """Train under TP2 and save a checkpoint; also save this rank's weights by full name."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    from bridge.dist.engine.placement import named_parameters

    (stage,), groups = build(preset, {"tp": 2}, train_steps=2)
    mine = {
        named.placement.full_name: (named.parameter.detach(), named.placement)
        for named in named_parameters(stage, groups)
    }
    torch.save(mine, folder / f"{torch.distributed.get_rank()}.pt")
    checkpoint = folder / "checkpoint"
    if torch.distributed.get_rank() == 0:
        checkpoint.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save({"model": unwrap_model(stage).sharded_state_dict()}, str(checkpoint))


def join_parts(parts: list[tuple[Any, Any]]) -> Any:
    """Return the whole parameter from the parts of the ranks, or from a copy."""
    import torch

    first, placement = parts[0]
    if placement.shards == 1:
        return first
    whole = first.new_full(placement.full_shape, torch.nan)
    rows = torch.arange(placement.full_shape[placement.dim])
    for part, place in parts:
        whole.index_copy_(place.dim, replace(place, dim=0).take_shard(rows), part)
    return whole


def load(folder: Path, preset: str, sizes: dict[str, int]) -> set[str]:
    """Load under another layout and compare bit by bit; return the full names of the compared parameters."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    from bridge.dist.engine.placement import named_parameters

    stages, groups = build(preset, sizes, train_steps=0)
    saved = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    compared = set()
    for stage in stages:
        model = unwrap_model(stage)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "checkpoint"))
        model.load_state_dict(state["model"])
        for named in named_parameters(stage, groups):
            name = named.placement.full_name
            whole = join_parts([part[name] for part in saved])
            assert torch.equal(named.parameter, named.placement.take_shard(whole)), name
            compared.add(name)
    return compared


def test_a_tp2_checkpoint_loads_bit_by_bit_in_other_layouts(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path, "tiny")
    by_pipeline = run_ranks(load, 2, tmp_path, "tiny", {"pp": 2})
    by_tensor_and_pipeline = run_ranks(load, 4, tmp_path, "tiny", {"tp": 2, "pp": 2})
    whole = set().union(*by_pipeline)
    assert "decoder.layers.0.mlp.linear_fc1.weight" in whole
    assert set().union(*by_tensor_and_pipeline) == whole
    assert not by_pipeline[0] & by_pipeline[1]


def test_a_t5_checkpoint_loads_bit_by_bit(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path, "t5-tiny")
    (whole,) = run_ranks(load, 1, tmp_path, "t5-tiny", {})
    assert {"encoder_relative_pos_emb.relative_attention_bias.weight", "lm_head.output_layer.bias"} < whole


def test_a_hybrid_checkpoint_loads_bit_by_bit(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path, "hybrid-tiny")
    by_pipeline = run_ranks(load, 2, tmp_path, "hybrid-tiny", {"pp": 2})
    (whole,) = run_ranks(load, 1, tmp_path, "hybrid-tiny", {})
    assert by_pipeline[0] | by_pipeline[1] == whole
    assert {"decoder.layers.4.mixer.A_log", "decoder.layers.7.mlp.experts.linear_fc1.weight3"} < whole
