"""Layouts: how many ranks share each kind of parallelism. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bridge.config.schema.pipeline_layout import parse_stages
from bridge.dist.errors import LayoutError
from bridge.dist.nearest import suggest, suggest_multiple

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

CONFIG_FIELDS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
"""The field of Megatron's TransformerConfig for each size of a layout; dp follows from the world size."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of tensor, pipeline, virtual pipeline, context, expert, expert-tensor and data parallelism.

    A world has ``tp * cp * dp * pp`` ranks. Expert layers divide the same ranks into ``etp * ep * expert_dp * pp``;
    ``etp`` defaults to ``tp``.

    Raises:
        LayoutError: A size is not positive, there are virtual stages without a pipeline, or the expert sizes do not
            divide the ranks of a pipeline stage.
    """

    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        assert self.etp is not None
        for name, size in asdict(self).items():
            if size < 1:
                raise LayoutError(f"{name} must be at least 1, got {size}")
        if self.vp > 1 and self.pp == 1:
            raise LayoutError(
                f"vp = {self.vp} needs a pipeline, but pp = 1: set pp to 2 or more, or vp ({CONFIG_FIELDS['vp']}) to 1 "
                "and pipeline_model_parallel_layout to null"
            )
        stage, expert = self.tp * self.cp * self.dp, self.etp * self.ep
        if stage % expert:
            raise LayoutError(
                f"etp x ep = {self.etp} x {self.ep} = {expert} does not divide the {stage} ranks of a pipeline stage "
                f"(tp x cp x dp = {self.tp} x {self.cp} x {self.dp}): {self._suggest_experts(stage)}"
            )

    def _suggest_experts(self, stage: int) -> str:
        """Suggest the nearest ep, or, if no ep fits with this etp, to change etp."""
        etp = self.etp or self.tp
        if stage % etp:
            return suggest("choose etp", etp, lambda size: stage % size == 0, largest=stage)
        return suggest("choose ep", self.ep, lambda size: stage % (etp * size) == 0, largest=stage)

    @classmethod
    def of(cls, config: TransformerConfig, world_size: int | None, *, dp: int | None = None) -> Layout:
        """Return the layout of a configuration on ``world_size`` ranks.

        Args:
            config: Gives every size but dp.
            world_size: Number of ranks; None for as many as the layout needs, with dp = 1 unless it is given.
            dp: The expected data-parallel size, if any.

        Raises:
            LayoutError: ``world_size`` is not a multiple of tp x pp x cp, or gives another dp than the expected one.
        """
        tp, pp, cp = (getattr(config, CONFIG_FIELDS[name]) for name in ("tp", "pp", "cp"))
        model = tp * pp * cp
        if world_size is None:
            world_size = model * (1 if dp is None else dp)
        needed = f"tp x pp x cp = {tp} x {pp} x {cp} = {model}"
        if world_size % model:
            raise LayoutError(
                f"{world_size} ranks do not fit {needed}: start {suggest_multiple(world_size, model)} ranks, or lower "
                "tp, pp or cp"
            )
        if dp is not None and world_size != model * dp:
            raise LayoutError(
                f"{world_size} ranks do not fit {needed} with dp = {dp}: "
                f"that takes {model * dp} ranks (dp is {world_size // model} with {world_size})"
            )
        return cls(
            tp=tp,
            pp=pp,
            vp=config.virtual_pipeline_model_parallel_size or 1,
            cp=cp,
            ep=config.expert_model_parallel_size,
            etp=config.expert_tensor_parallel_size,
            dp=world_size // model,
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        """Number of ranks that hold copies of the same experts."""
        assert self.etp is not None
        return self.tp * self.cp * self.dp // (self.etp * self.ep)

    def __str__(self) -> str:
        """Format the sizes above 1, such as ``tp2 pp2``; ``one rank`` if there are none. etp only if not tp."""
        sizes = asdict(self)
        if self.etp == self.tp:
            del sizes["etp"]
        return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one rank"


def has_custom_split(config: TransformerConfig) -> bool:
    """Return whether stages of a configuration may have different numbers of layers."""
    return bool(
        assigns_layers(config)
        or config.account_for_embedding_in_pipeline_split
        or config.account_for_loss_in_pipeline_split
    )


def assigns_layers(config: TransformerConfig) -> bool:
    """Return whether a configuration assigns layers to pipeline stages, so that no number has to divide evenly."""
    return bool(
        config.pipeline_model_parallel_layout is not None
        or config.num_layers_in_first_pipeline_stage is not None
        or config.num_layers_in_last_pipeline_stage is not None
    )


def find_mtp_rank(config: TransformerConfig) -> int | None:
    """Return the pipeline rank of multi-token prediction (MTP) if the pipeline layout places it; None otherwise."""
    layout: Any = config.pipeline_model_parallel_layout
    pp = config.pipeline_model_parallel_size
    if hasattr(layout, "layout"):  # Megatron's own class, by rank and virtual stage
        stages = [[layer.name for chunk in chunks for layer in chunk] for chunks in layout.layout]
    else:
        stages = parse_stages(layout) or []
    return next((index % pp for index, layers in enumerate(stages) if "mtp" in layers), None)


def find_embedding_ranks(config: TransformerConfig, *, tied: bool) -> list[int] | None:
    """Return the pipeline ranks that hold the word embedding or a copy; None for the default, the first and the last.

    The last rank holds a copy if the output layer is tied to the embedding. The rank of multi-token prediction holds
    one too.

    Args:
        config: The configuration of the pipeline.
        tied: Whether the output layer uses the embedding's weight.
    """
    mtp_rank = find_mtp_rank(config)
    if mtp_rank is None:
        return None
    return sorted({0, mtp_rank, *([config.pipeline_model_parallel_size - 1] if tied else [])})
