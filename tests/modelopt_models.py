"""Models that ModelOpt changes: quantise, sparsify, save and rebuild them, as one rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.config import Document, ModelConfig
from bridge.dist import Layout
from bridge.models.errors import CheckpointError

VOCAB = 256
TOKENS = 16
SMALL = {"transformer.num_layers": 2, "transformer.hidden_size": 32}

Changes = dict[str, Any]


def build_changed(preset: str, changes: Changes, change: Callable[[Any], None]) -> tuple[Any, Any, Any]:
    """Build a model and change it by ModelOpt; return it, its configuration and its process groups."""
    config = make_config(preset, changes)
    groups = create_groups(config)
    model = config.get_builder_cls()(config).build_model(groups)
    change(model)
    return model, config, groups


def make_config(preset: str, changes: Changes, sizes: dict[str, int] | None = None) -> Any:
    from bridge.dist.document_layout import apply_layout

    document = Document.load(preset)
    for path, value in changes.items():
        document.set(path, value)
    apply_layout(document, sizes or {})
    return document.config()


def create_groups(config: Any) -> Any:
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.dist import create_process_groups, destroy_process_groups

    if parallel_state.model_parallel_is_initialized():
        destroy_process_groups()
    groups = create_process_groups(Layout.of(config.transformer, torch.distributed.get_world_size()))
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return groups


def compute_logits(model: Any, seed: int) -> Any:
    import torch

    tokens = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    return model(tokens, torch.arange(TOKENS).expand(2, -1), None).detach()


def quantise(model: Any, *, attention: bool = False) -> None:
    """Quantise and calibrate on a few batches, different ones on each data-parallel rank."""
    import modelopt.torch.quantization as mtq
    from megatron.core import parallel_state

    recipe: dict[str, Any] = dict(mtq.INT8_DEFAULT_CFG)
    if attention:
        recipe["quant_cfg"] = recipe["quant_cfg"] + mtq.FP8_KV_CFG["quant_cfg"]
    first = 10 * parallel_state.get_data_parallel_rank()
    mtq.quantize(model, recipe, lambda model: [compute_logits(model, seed) for seed in range(first, first + 3)])


def sparsify(model: Any) -> None:
    import modelopt.torch.sparsity as mts

    mts.sparsify(model, "sparse_magnitude")


def save_file(model: Any, folder: Path) -> Path:
    import modelopt.torch.opt as mto

    mto.save(model, folder / "whole.pt")
    return folder / "whole.pt"


def save_shards(model: Any, folder: Path) -> Path:
    """Save a sharded checkpoint of one iteration, like megatron.training."""
    import torch
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins import save_sharded_modelopt_state

    checkpoint = folder / "iter_0000012"
    if torch.distributed.get_rank() == 0:
        checkpoint.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("12")
    torch.distributed.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(checkpoint))
    save_sharded_modelopt_state([model], checkpoint)
    return folder


def save_ranks(model: Any, folder: Path) -> Path:
    """Save in Megatron's format `torch`: one file per rank, with the arguments and the weights."""
    from argparse import Namespace

    import torch
    from megatron.core import parallel_state
    from modelopt.torch.opt.plugins import save_modelopt_state

    state = {"args": Namespace(seq_length=TOKENS), "checkpoint_version": 3.0, "model": model.state_dict()}
    save_modelopt_state([model], state)
    file = folder / f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    torch.distributed.barrier()
    return folder


def rebuild(config: Any, groups: Any, checkpoint: Path, **options: Any) -> tuple[Any, Any]:
    """Build and wrap a new model from the document and a checkpoint; check that its configuration does not change."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig

    document = config.as_dict() | {"restore_modelopt_state": True}
    fresh: Any = ModelConfig.from_dict(document)
    torch.manual_seed(99)
    builder = fresh.get_builder_cls()(fresh, modelopt_checkpoint=checkpoint)
    ddp_config = DistributedDataParallelConfig(**options.pop("ddp", {}))
    (stage,) = builder.build_distributed_models(groups, ddp_config, **options)
    assert fresh.as_dict() == document
    return builder, stage


def enabled_quantizers(model: Any) -> dict[str, bool]:
    """Return whether each quantizer is enabled, by name."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    return {name: part.is_enabled for name, part in model.named_modules() if isinstance(part, TensorQuantizer)}


def are_equal(buffers: dict[str, Any], others: dict[str, Any]) -> bool:
    import torch

    return buffers.keys() == others.keys() and all(
        torch.equal(buffer, others[name]) for name, buffer in buffers.items()
    )


def train_two_steps(builder: Any, stage: Any, groups: Any) -> list[tuple[float, float]]:
    """Train two steps; return losses and gradient norms."""
    import torch

    from bridge.dist.train.step import TrainOptions, train
    from bridge.dist.train.text import Text, find_default_text

    options = TrainOptions(steps=2, text=find_default_text(), seq_length=TOKENS, global_batch_size=2)
    layout = Layout.of(builder.transformer_config, torch.distributed.get_world_size())
    text = Text.read(options.text, vocab_size=VOCAB)
    steps = train([stage], groups, layout, text=text, options=options, forward_step=builder.forward_step)
    return [(step.loss, step.grad_norm or math.nan) for step in steps]


def check_rebuilt(model: Any, config: Any, groups: Any, checkpoint: Path) -> list[tuple[float, float]]:
    """Rebuild a saved model and compare it bit by bit; then train two steps, which must change only weights."""
    import torch
    from megatron.core.utils import unwrap_model

    builder, stage = rebuild(config, groups, checkpoint)
    inner: Any = unwrap_model(stage)
    assert torch.equal(compute_logits(stage.eval(), 5), compute_logits(model.eval(), 5))
    assert are_equal(dict(inner.named_parameters()), dict(model.named_parameters()))
    assert are_equal(dict(inner.named_buffers()), dict(model.named_buffers()))
    assert enabled_quantizers(inner) == enabled_quantizers(model)
    steps = train_two_steps(builder, stage.train(), groups)
    assert all(math.isfinite(value) and value > 0 for step in steps for value in step)
    still = [
        name
        for (name, parameter), before in zip(inner.named_parameters(), model.parameters(), strict=True)
        if torch.equal(parameter, before)
    ]
    assert still == []
    assert are_equal(dict(inner.named_buffers()), dict(model.named_buffers()))
    assert enabled_quantizers(inner) == enabled_quantizers(model)
    return steps


def restore_error(config: Any, groups: Any, checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        rebuild(config, groups, checkpoint)
    return str(caught.value)
