"""Training runs that save and load Megatron checkpoints, as one rank, and the arguments of megatron.training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

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
_UNSET = [
    "async_save",
    "ckpt_assume_constant_structure",
    "ckpt_fully_parallel_save",
    "ckpt_fully_parallel_load",
    "auto_detect_ckpt_format",
    "finetune",
    "no_load_optim",
    "no_load_rng",
    "no_save_optim",
    "no_save_rng",
    "log_progress",
    "verify_integrity",
    "data_parallel_random_init",
    "exit_on_missing_checkpoint",
    "vocab_file",
    "phase_transition_iterations",
    "load_main_params_from_ckpt",
    "non_persistent_global_ckpt_dir",
    "enable_msc",
    "non_persistent_ckpt_type",
    "stream_ckpt_dequant",
    "distrib_optim_fully_reshardable_mem_efficient",
]
EXPERTS = {"num_moe_experts": 4, "add_bias_linear": False, "moe_grouped_gemm": True}


class Run(NamedTuple):
    """One training run: layout, wrapper, settings of the transformer, and folders to load and save."""

    sizes: dict[str, int]
    steps: int
    wrapper: str = "ddp"
    distributed_optimizer: bool = False
    settings: dict[str, Any] | None = None
    load: str | None = None
    save: str | None = None


def make_job(run: Run) -> Any:
    from bridge.dist.document_layout import apply_layout
    from bridge.dist.job import BuildJob
    from bridge.dist.train.step import TrainOptions
    from bridge.dist.train.text import find_default_text
    from bridge.dist.wrapper import Wrapper

    options = TrainOptions(steps=run.steps, text=find_default_text(), seq_length=32, global_batch_size=4)
    document = Document(SMALL | {"transformer": SMALL["transformer"] | (run.settings or {})})  # type: ignore[operator]
    apply_layout(document, dict(run.sizes))
    return BuildJob(
        document=document.data,
        wrapper=Wrapper(run.wrapper),
        distributed_optimizer=run.distributed_optimizer,
        training=options if run.steps else None,
        checkpoint=None if run.load is None else Path(run.load),
        save=None if run.save is None else Path(run.save),
    )


def build(run: Run) -> tuple[list[Any], Any, list[float]]:
    """Build and train as one rank; return the stages, the process groups and the losses."""
    import torch

    from bridge.config import ModelConfig
    from bridge.dist.engine.groups import create_process_groups
    from bridge.dist.run.execute import build_and_train

    job = make_job(run)
    config: Any = ModelConfig.from_dict(job.document)
    layout = job.finalize(config, torch.distributed.get_world_size())
    groups = create_process_groups(layout, embedding_ranks=job.find_embedding_ranks(config))
    built = build_and_train(job, config, layout, groups)
    return built.stages, groups, [step.loss for step in built.steps]


def train(run: Run) -> list[float]:
    from bridge.dist.engine.groups import destroy_process_groups

    losses = build(run)[2]
    destroy_process_groups()
    return losses


def set_megatron_arguments(run: Run, folder: Path) -> None:
    """Set the arguments of megatron.training that its functions for checkpoints read."""
    from argparse import Namespace

    import torch
    from megatron.core import num_microbatches_calculator
    from megatron.training.global_vars import set_args

    num_microbatches_calculator.unset_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, 4, 1, 1)
    unset = dict.fromkeys(_UNSET)
    transformer = SMALL["transformer"] | (run.settings or {})  # type: ignore[operator]
    set_args(
        Namespace(
            **unset | {"load": str(folder), "save": str(folder)},
            add_position_embedding=True,
            async_strategy="mcore",
            bf16=transformer.get("bf16", False),
            ckpt_format="torch_dist",
            ckpt_load_validate_sharding_integrity=True,
            consumed_train_samples=28,
            dist_ckpt_optim_fully_reshardable=True,
            dist_ckpt_strictness="assume_ok_unexpected",  # its default; the strict ones of 0.19.2 fail with torch 2.15
            fp16=False,
            hidden_size=transformer["hidden_size"],
            num_attention_heads=transformer["num_attention_heads"],
            num_layers=transformer["num_layers"],
            pipeline_model_parallel_size=run.sizes.get("pp", 1),
            tensor_model_parallel_size=run.sizes.get("tp", 1),
            use_dist_ckpt=True,
            use_distributed_optimizer=run.distributed_optimizer,
            world_size=torch.distributed.get_world_size(),
        )
    )
