"""Train the model of a document on a file of tokens, save checkpoints, and go on from the last one.

    torchrun --nproc-per-node 2 train.py tiny tokens.npy run --tp 2

The second argument is a numpy file of token ids, one dimension, of any integer type.
"""

# Bridge first: it keeps the warnings quiet with which megatron-core is imported.
# ruff: noqa: I001
from bridge.config import Document
from bridge.dist import (
    Layout,
    Progress,
    apply_layout,
    create_process_groups,
    destroy_process_groups,
    join_world,
    load_checkpoint,
    save_checkpoint,
    seed_random_states,
)

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a document, a preset, a Hugging Face folder or a Megatron checkpoint")
    parser.add_argument("tokens", type=Path, help="a .npy file of token ids")
    parser.add_argument("run", type=Path, help="the folder of checkpoints, from which training goes on")
    parser.add_argument("overrides", nargs="*", help="PATH=VALUE: changes to the document")
    for size in ("tp", "pp", "vp", "cp", "ep"):
        parser.add_argument(f"--{size}", type=int, help="a size of the layout; by default the document's")
    parser.add_argument("--steps", type=int, default=100, help="steps of the whole run")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--global-batch-size", type=int, default=8, help="samples in a step")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="samples in a forward pass")
    parser.add_argument("--lr", type=float, default=3e-4, help="the largest learning rate")
    return parser.parse_intermixed_args()  # options may stand before and after overrides


def main() -> None:
    """Train as one of the ranks that torchrun or srun started."""
    arguments = parse_arguments()
    document = Document.load(arguments.model, arguments.overrides)
    sizes = {name: getattr(arguments, name) for name in ("tp", "pp", "vp", "cp", "ep")}
    apply_layout(document, {name: size for name, size in sizes.items() if size is not None})
    config = document.config()
    transformer = config.transformer
    with join_world():  # NCCL and this rank's GPU, or gloo on a machine without GPUs
        layout = Layout.of(transformer, torch.distributed.get_world_size())
        groups = create_process_groups(layout)
        seed_random_states(transformer, groups)

        builder = config.get_builder_cls()(config)
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
        stages = builder.build_distributed_models(groups, ddp_config=ddp_config)

        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=arguments.lr,
                min_lr=arguments.lr / 10,
                weight_decay=0.1,
                clip_grad=1.0,
                bf16=transformer.bf16,
                fp16=transformer.fp16,
                params_dtype=transformer.params_dtype,
                use_distributed_optimizer=True,
            ),
            stages,
        )
        schedule = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=arguments.lr,
            min_lr=arguments.lr / 10,
            lr_warmup_steps=arguments.steps // 10,
            lr_decay_steps=arguments.steps,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=arguments.steps,
            wd_incr_style="constant",
        )
        # Megatron's pipeline schedule takes these functions from the configuration.
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.grad_scale_func = optimizer.scale_loss
        no_sync = [stage.no_sync for stage in stages]
        transformer.no_sync_func = no_sync if len(stages) > 1 else no_sync[0]

        progress = Progress()
        if (arguments.run / "latest_checkpointed_iteration.txt").exists():
            progress = load_checkpoint(stages, arguments.run, groups, optimizer=optimizer)
        schedule.step(progress.step)

        def forward(
            samples: Iterator[torch.Tensor], stage: MegatronModule
        ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]]:
            """Run a stage on the next microbatch; Megatron calls the loss function on the last stage."""

            def compute_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                loss = losses.float().mean()
                # megatron-core 0.19 multiplies a loss of this form by the context-parallel size.
                return loss / layout.cp, {"loss": loss.detach().clone()}

            return builder.forward_step(stage, next(samples).cuda(), groups), compute_loss

        tokens = numpy.load(arguments.tokens, mmap_mode="r")
        microbatches = arguments.global_batch_size // (arguments.micro_batch_size * layout.dp)
        run_schedule = get_forward_backward_func(pp_size=layout.pp, vp_size=layout.vp if layout.vp > 1 else None)
        while progress.step < arguments.steps:
            batch = read_batch(tokens, progress.samples, arguments.global_batch_size, config.seq_length)
            mine = batch.view(layout.dp, microbatches, arguments.micro_batch_size, -1)[groups.dp.rank()]
            for stage in stages:
                stage.zero_grad_buffer()
            optimizer.zero_grad()
            outputs = run_schedule(
                forward_step_func=forward,
                data_iterator=[iter(mine) for _ in stages] if len(stages) > 1 else iter(mine),
                model=stages,
                num_microbatches=microbatches,
                seq_length=config.seq_length,
                micro_batch_size=arguments.micro_batch_size,
                forward_only=False,
            )
            _, grad_norm, _ = optimizer.step()
            schedule.step(1)
            progress = Progress(step=progress.step + 1, samples=progress.samples + arguments.global_batch_size)
            if outputs:  # on the last pipeline stage
                loss = torch.stack([output["loss"] for output in outputs]).mean()
                torch.distributed.all_reduce(loss, group=groups.dp_cp)
                if torch.distributed.get_rank() == layout.world_size - 1:
                    mean = loss.item() / groups.dp_cp.size()
                    print(f"step {progress.step}: loss {mean:.6f}, gradient norm {grad_norm:.6f}", flush=True)
            if progress.step % arguments.save_every == 0 or progress.step == arguments.steps:
                save_checkpoint(stages, arguments.run, groups, model=config, progress=progress, optimizer=optimizer)
        destroy_process_groups()


def read_batch(tokens: numpy.ndarray, first: int, size: int, seq_length: int) -> torch.Tensor:
    """Read samples, shape [size, seq_length + 1], from sample ``first`` on; the file is read in a circle."""
    starts = numpy.arange(first, first + size)[:, None] * seq_length
    positions = (starts + numpy.arange(seq_length + 1)) % len(tokens)
    return torch.from_numpy(tokens[positions].astype(numpy.int64))


if __name__ == "__main__":
    main()
