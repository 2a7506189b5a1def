"""What `bridge build` does on each rank: join the world, build, train, report."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig

from bridge.config import ModelConfig
from bridge.dist import cpu
from bridge.dist.build import DistributedModelBuilder
from bridge.dist.errors import BuilderContractError, TrainingError
from bridge.dist.layout import Layout, create_process_groups, destroy_process_groups
from bridge.dist.options import BuildOptions, Wrapper
from bridge.dist.preflight import check
from bridge.dist.report import BuildReport, ChunkReport, RankReport
from bridge.dist.text import Text
from bridge.dist.train import Step, TrainOptions, mask_vocabulary_padding, switch_off_dropout, train
from bridge.dist.weights import draw_weights, layer_indices, named_parameters

_SEED = 1234
_TIMEOUT = timedelta(minutes=10)

Track = Callable[[Iterable[Step], int], Iterable[Step]]


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """One build, as plain data that every rank gets."""

    document: dict[str, Any]
    wrapper: Wrapper
    dp: int | None
    training: TrainOptions | None
    text: Path

    def builder(self, config: ModelConfig) -> DistributedModelBuilder[MegatronModule, ModelConfig]:
        """Make the builder that a configuration names.

        Raises:
            BuilderContractError: This engine cannot drive it.
        """
        builder = config.get_builder_cls()(config)
        if not isinstance(builder, DistributedModelBuilder):
            name = type(builder).__name__
            raise BuilderContractError(f"{name} is no DistributedModelBuilder: derive it from bridge.dist's")
        return builder

    def config(self) -> ModelConfig:
        """Decode the document.

        Raises:
            DocumentError: It is not a valid configuration.
        """
        return ModelConfig.from_dict(self.document)

    def check(self, config: TransformerConfig, world_size: int) -> Layout:
        """Check everything that can be checked before a rank starts, and return the layout.

        Raises:
            LayoutError: The world does not fit the layout.
            PreflightError: A known conflict of configuration, layout and wrapper.
            TrainingError: The batch sizes do not fit the layout, or the text the model.
        """
        layout = Layout.of(config, world_size, dp=self.dp)
        check(config, layout, self.options(config))
        if self.training is not None:
            self.training.microbatches(layout)
        return layout

    def options(self, config: TransformerConfig) -> BuildOptions:
        """Return the options of the build: the wrapper's usual ones."""
        if self.wrapper is Wrapper.NONE:
            return BuildOptions(wrap_with_ddp=False)
        fsdp = self.wrapper is Wrapper.MEGATRON_FSDP
        return BuildOptions(
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=config.bf16 or config.fp16,
                check_for_nan_in_grad=True,
                use_distributed_optimizer=fsdp,
                use_megatron_fsdp=fsdp,
                data_parallel_sharding_strategy="optim_grads_params" if fsdp else "no_shard",
                # gloo has no fused division.
                gradient_reduce_div_fusion=torch.cuda.is_available(),
            ),
            use_megatron_fsdp=fsdp,
            use_torch_fsdp2=self.wrapper is Wrapper.TORCH_FSDP2,
        )


def run(job: BuildJob, *, track: Track, say: Callable[[str], None]) -> BuildReport:
    """Run a job as one rank of the world that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Collective. Megatron prints to standard output; that goes to standard error here.

    Args:
        job: The same on every rank.
        track: Passes training steps through, to show progress; called on rank 0 only.
        say: Tells the user something; called on rank 0 only.
    """
    with contextlib.redirect_stdout(sys.stderr), _world():
        config = job.config()
        builder = job.builder(config)
        layout = job.check(builder.transformer_config, torch.distributed.get_world_size())
        groups = create_process_groups(layout)
        try:
            return _build(job, config, builder, layout=layout, groups=groups, track=track, say=say)
        finally:
            destroy_process_groups()


@contextlib.contextmanager
def _world() -> Iterator[None]:
    """Join the ranks that the environment describes, on this rank's GPU or, where there is none, on the CPU."""
    with contextlib.ExitStack() as stack:
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
            torch.distributed.init_process_group("nccl", timeout=_TIMEOUT, device_id=device)
        else:
            stack.enter_context(cpu.cpu_runtime())
            torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)
        stack.callback(torch.distributed.destroy_process_group)
        yield


def _build(
    job: BuildJob,
    config: ModelConfig,
    builder: DistributedModelBuilder[MegatronModule, ModelConfig],
    *,
    layout: Layout,
    groups: ProcessGroupCollection,
    track: Track,
    say: Callable[[str], None],
) -> BuildReport:
    model_parallel_cuda_manual_seed(_SEED)
    leader = torch.distributed.get_rank() == 0
    vocab_size: int | None = getattr(config, "vocab_size", None)
    sizes: list[dict[str, Size]] = []

    def draw(stages: list[MegatronModule]) -> list[MegatronModule]:
        draw_weights(stages, groups, vocab_size=vocab_size)
        return stages

    def count(stages: list[MegatronModule]) -> list[MegatronModule]:
        # FSDP shards parameters when it wraps; they are whole only now.
        sizes.extend(_sizes(stage, groups, vocab_size) for stage in stages)
        return stages

    # The configuration is this process's own: the drawn weights come first, so that a hook may still change them.
    if job.training is not None:
        if (dropout := switch_off_dropout(builder.transformer_config)) and leader:
            say(f"{' and '.join(dropout)} set to 0: with dropout, losses would depend on the layout")
        config.pre_wrap_hooks.insert(0, draw)
    config.pre_wrap_hooks.append(count)
    options = job.options(builder.transformer_config)
    stages = builder.build_distributed_models(
        groups,
        ddp_config=options.ddp_config,
        use_megatron_fsdp=options.use_megatron_fsdp,
        use_torch_fsdp2=options.use_torch_fsdp2,
        wrap_with_ddp=options.wrap_with_ddp,
    )
    chunks = [_chunk_report(index, stage, sizes[index]) for index, stage in enumerate(stages)]
    steps = _train(job, stages, vocab_size=vocab_size, layout=layout, groups=groups, track=track if leader else None)
    ranks, total = _gather(_rank_report(groups, chunks), sizes)
    return BuildReport(
        world_size=layout.world_size,
        layout=asdict(layout),
        wrap=str(job.wrapper),
        parameters=sum(size.logical for size in total.values()),
        padded_parameters=sum(size.padded for size in total.values()),
        ranks=ranks,
        losses=[step.loss for step in steps],
        grad_norms=[step.grad_norm for step in steps],
        tokens_per_second=_tokens_per_second(job.training, steps),
    )


class Size(NamedTuple):
    """Elements of a parameter: on this rank, and of the whole model's without and with vocabulary padding."""

    local: int
    logical: int
    padded: int


def _sizes(stage: MegatronModule, groups: ProcessGroupCollection, vocab_size: int | None) -> dict[str, Size]:
    return {
        named.full_name: Size(
            named.parameter.numel(), named.logical_shape(vocab_size).numel(), named.full_shape.numel()
        )
        for named in named_parameters(stage, groups)
    }


def _chunk_report(index: int, stage: MegatronModule, sizes: dict[str, Size]) -> ChunkReport:
    return ChunkReport(
        vp_stage=index,
        layers=layer_indices(stage),
        parameters=sum(size.local for size in sizes.values()),
        wrappers=list(_wrapper_names(stage)),
    )


def _wrapper_names(module: torch.nn.Module) -> Iterator[str]:
    """Name the wrappers of a stage and the model they hold, outermost first."""
    yield type(module).__name__
    inner = getattr(module, "module", None)
    if isinstance(inner, torch.nn.Module):
        yield from _wrapper_names(inner)


def _rank_report(groups: ProcessGroupCollection, chunks: list[ChunkReport]) -> RankReport:
    return RankReport(
        rank=torch.distributed.get_rank(),
        tp=groups.tp.rank(),
        pp=groups.pp.rank(),
        dp=groups.dp.rank(),
        cp=groups.cp.rank(),
        ep=groups.ep.rank(),
        chunks=chunks,
    )


def _gather(rank: RankReport, sizes: list[dict[str, Size]]) -> tuple[list[RankReport], dict[str, Size]]:
    """Collect the ranks' reports, and every parameter of the whole model once."""
    mine = (rank, {name: size for chunk in sizes for name, size in chunk.items()})
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    parameters: dict[str, Size] = {}
    for _, part in everyone:
        parameters.update(part)
    return [report for report, _ in everyone], parameters


def _train(
    job: BuildJob,
    stages: list[MegatronModule],
    *,
    vocab_size: int | None,
    layout: Layout,
    groups: ProcessGroupCollection,
    track: Track | None,
) -> list[Step]:
    if job.training is None:
        return []
    if vocab_size is None:
        raise TrainingError("training on a text needs a configuration with a vocab_size")
    mask_vocabulary_padding(stages, vocab_size=vocab_size)
    text = Text.read(job.text, vocab_size=vocab_size)
    steps: Iterable[Step] = train(stages, groups, layout, text=text, options=job.training)
    return list(track(steps, job.training.steps) if track else steps)


def _tokens_per_second(training: TrainOptions | None, steps: list[Step]) -> float | None:
    """Mean over the steps but the first, which warms up; None without steps."""
    timed = steps[1:] or steps
    if training is None or not timed:
        return None
    tokens = training.global_batch_size * training.seq_length * len(timed)
    return tokens / sum(step.seconds for step in timed)
