"""Megatron checkpoints of live stages: training goes on from them under any layout, and megatron.training reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ranks import run_ranks

from bridge.config import Document

SMALL = {
    "_target_": "bridge.models.gpt.GPTModelConfig",
    "vocab_size": 256,
    "seq_length": 32,
    "transformer": {
        "_target_": "megatron.core.transformer.transformer_config.TransformerConfig",
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
    },
}
EXPERTS = {"num_moe_experts": 4, "add_bias_linear": False, "moe_grouped_gemm": True}


class Run(NamedTuple):
    """One training run: layout, wrapper, settings of the transformer, and folders to load and save."""

    sizes: dict[str, int]
    steps: int
    wrapper: str = "ddp"
    distributed_optimizer: bool = False
    settings: dict[str, Any] = {}
    load: str | None = None
    save: str | None = None


def train(run: Run) -> list[float]:
    """Train as one rank; return the losses."""
    import torch

    from bridge.config import ModelConfig
    from bridge.dist.document_layout import apply_layout
    from bridge.dist.engine.groups import create_process_groups, destroy_process_groups
    from bridge.dist.job import BuildJob
    from bridge.dist.run.execute import build_and_train
    from bridge.dist.train.step import TrainOptions
    from bridge.dist.train.text import find_default_text
    from bridge.dist.wrapper import Wrapper

    document = Document(SMALL | {"transformer": SMALL["transformer"] | run.settings})  # type: ignore[operator]
    apply_layout(document, dict(run.sizes))
    job = BuildJob(
        document=document.data,
        wrapper=Wrapper(run.wrapper),
        distributed_optimizer=run.distributed_optimizer,
        training=TrainOptions(steps=run.steps, text=find_default_text(), seq_length=32, global_batch_size=4),
        checkpoint=None if run.load is None else Path(run.load),
        save=None if run.save is None else Path(run.save),
    )
    config: Any = ModelConfig.from_dict(job.document)
    layout = job.finalize(config, torch.distributed.get_world_size())
    groups = create_process_groups(layout, embedding_ranks=job.find_embedding_ranks(config))
    losses = [step.loss for step in build_and_train(job, config, layout, groups).steps]
    destroy_process_groups()
    return losses


def resume(folder: Path, first: Run, second: Run) -> tuple[list[float], list[float]]:
    """Train four steps, and two steps twice with a checkpoint between them; return the losses of both."""
    ranks = 2
    whole = run_ranks(train, ranks, first._replace(steps=4))[0]
    before = run_ranks(train, ranks, first._replace(save=str(folder)))[0]
    after = run_ranks(train, ranks, second._replace(load=str(folder)))[0]
    return whole, before + after


SAME = {
    "ddp": Run({}, 2),
    "distributed optimizer": Run({}, 2, distributed_optimizer=True),
    "bf16": Run({"tp": 2}, 2, distributed_optimizer=True, settings={"bf16": True}),
    "bf16, ddp": Run({"tp": 2}, 2, settings={"bf16": True}),
    "experts": Run({"ep": 2}, 2, distributed_optimizer=True, settings=EXPERTS),
    "experts, ddp": Run({"ep": 2}, 2, settings=EXPERTS),
    "pp2 vp2": Run({"pp": 2, "vp": 2}, 2),
}


@pytest.mark.parametrize("case", SAME)
def test_two_and_two_steps_equal_four(case: str, tmp_path: Path) -> None:
    whole, halves = resume(tmp_path, SAME[case], SAME[case])
    assert halves == whole


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Run({"tp": 2}, 2), Run({"pp": 2, "vp": 2}, 2)),
        (Run({"pp": 2}, 2, distributed_optimizer=True), Run({"tp": 2}, 2, distributed_optimizer=True)),
    ],
)
def test_training_goes_on_under_another_layout(first: Run, second: Run, tmp_path: Path) -> None:
    whole, halves = resume(tmp_path, first, second)
    assert halves == pytest.approx(whole, rel=1e-5)
