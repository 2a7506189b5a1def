"""The space of a search: layouts, micro-batch sizes, wrappers, recomputation and precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any, NamedTuple

from megatron.core.transformer import TransformerConfig

from bridge.config import Document
from bridge.dist.document_layout import find_transformer, replace_layout
from bridge.dist.errors import LayoutError, TrainingError
from bridge.dist.layout import Layout
from bridge.dist.plan.plan import PlanOptions
from bridge.dist.wrapper import ShardingStrategy, Wrapper

_LARGEST_TP = 8  # tensor parallelism between nodes is slow
_LARGEST_CP = 16
_SHORTEST_PART = 1024  # tokens of a sample on a rank: shorter parts mean many messages for little work
_MICRO_BATCH_SIZES = (1, 2, 4, 8)


class Recompute(NamedTuple):
    """What the backward pass computes again: values of the ``recompute_*`` fields of Megatron's TransformerConfig."""

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None
    modules: tuple[str, ...] | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Recompute:
        """Return the recomputation that fields of a TransformerConfig set."""
        granularity, method, num_layers, modules = map(fields.get, RECOMPUTE_FIELDS)
        if granularity == "selective" and not modules:
            modules = ("core_attn",)  # Megatron's default
        return cls(granularity, method, num_layers, tuple(modules) if modules else None)

    @property
    def layers_at_once(self) -> int:
        """The number of layers that keep one input together, because they are recomputed together."""
        return (self.num_layers or 1) if self.method == "uniform" else 1

    def __str__(self) -> str:
        if self.modules is not None:
            return f"recompute {'+'.join(self.modules)}"
        if self.method == "block":
            return f"recompute {self.num_layers} layer{'s' * (self.num_layers != 1)} of each chunk"
        return "recompute all layers" if self.granularity else ""


NO_RECOMPUTE = Recompute()
FULL_RECOMPUTE = Recompute("full", "uniform", 1)
SPLIT_FIELDS = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
RECOMPUTE_FIELDS = tuple(f"recompute_{name}" for name in Recompute._fields)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A point of the space: everything that a search decides about a job.

    ``counted`` has the names of the fields that count the embedding or the loss as a layer when layers are divided
    into stages. ``sharding_strategy`` is that of Megatron-FSDP, and None with other wrappers. ``fp8_recipe`` is None
    without FP8.
    """

    layout: Layout
    micro_batch_size: int
    wrapper: Wrapper
    distributed_optimizer: bool = False
    sharding_strategy: ShardingStrategy | None = None
    counted: tuple[str, ...] = ()
    recompute: Recompute = NO_RECOMPUTE
    fp8_recipe: str | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """Choices of a kind have layers of the same cost per microbatch."""
        one = self.layout
        return (one.tp, one.cp, one.ep, one.etp, self.micro_batch_size, self.recompute, self.fp8_recipe)

    @property
    def settings(self) -> str:
        """The choice without the layout, in words."""
        sharded = f" {self.sharding_strategy}" if self.sharding_strategy else ""
        sharded += ", distributed optimizer" if self.distributed_optimizer else ""
        words = [f"micro-batch {self.micro_batch_size}", f"{self.wrapper}{sharded}", str(self.recompute)]
        return ", ".join(filter(None, [*words, f"fp8 {self.fp8_recipe}" if self.fp8_recipe else ""]))

    def __str__(self) -> str:
        return f"{self.layout}, {self.settings}"

    def apply(self, document: Document, fixed: Fixed) -> Document:
        """Return a copy of a document with this choice; fields that the user has set stay."""
        changed = deepcopy(document)
        one = self.layout
        sizes = {"tp": one.tp, "pp": one.pp, "vp": one.vp, "cp": one.cp, "ep": one.ep}
        if one.etp is not None and one.etp != one.tp:
            sizes["etp"] = one.etp
        replace_layout(changed, sizes, sequence_parallel=one.tp > 1)
        prefix, fields = find_transformer(changed)
        for name in RECOMPUTE_FIELDS:
            if name in fields:
                changed.remove(prefix + name)
        for name, value in {**self._list_fields(), **fixed.fields}.items():
            changed.set(prefix + name, value)
        return changed

    def _list_fields(self) -> dict[str, Any]:
        recompute = dict(zip(RECOMPUTE_FIELDS, self.recompute, strict=True))
        values: dict[str, Any] = {name: value for name, value in recompute.items() if value is not None}
        if self.recompute.modules is not None:
            values["recompute_modules"] = list(self.recompute.modules)
        if self.fp8_recipe is not None:
            values |= {"fp8": "hybrid", "fp8_recipe": self.fp8_recipe}
        return values | dict.fromkeys(self.counted, True)

    def change_options(self, options: PlanOptions) -> PlanOptions:
        """Return the options of a plan with this choice."""
        return replace(
            options,
            batch=replace(options.batch, micro_batch_size=self.micro_batch_size),
            wrapper=self.wrapper,
            distributed_optimizer=self.distributed_optimizer,
            sharding_strategy=self.sharding_strategy,
        )

    def spread(self, options: PlanOptions, *, stages: int) -> tuple[Choice, PlanOptions]:
        """Return a choice of the same kind with a pipeline of ``stages`` ranks, and options of a plan of it.

        It has the distributed optimizer, without which DDP refuses 8-bit weights.
        """
        one = self.layout
        dp = lcm(one.tp * one.cp, one.ep * (one.etp or 1)) // (one.tp * one.cp)
        layout = replace(one, pp=stages, vp=1, dp=dp)
        choice = replace(
            self, layout=layout, wrapper=Wrapper.DDP, distributed_optimizer=True, sharding_strategy=None, counted=()
        )
        size = self.micro_batch_size
        batch = replace(options.batch, micro_batch_size=size, global_batch_size=size * dp)
        return choice, replace(choice.change_options(options), batch=batch, world_size=layout.world_size)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """What the user has set; None for what the search decides.

    ``fields`` are other values of the TransformerConfig that no choice may change.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    micro_batch_size: int | None = None
    wrapper: Wrapper | None = None
    distributed_optimizer: bool | None = None
    sharding_strategy: ShardingStrategy | None = None
    recompute: Recompute | None = None
    fp8_recipes: tuple[str | None, ...] = (None,)
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fixes_split(self) -> bool:
        """Whether the user has set how layers are divided into pipeline stages."""
        return not self.fields.keys().isdisjoint(SPLIT_FIELDS)


def list_choices(config: TransformerConfig, options: PlanOptions, fixed: Fixed) -> Iterator[Choice | str]:
    """Yield the choices without recomputation that no one has set, and the reason of each that arithmetic refuses.

    Args:
        config: The model, without a layout.
        options: The batch and the number of GPUs.
        fixed: What the user has set.
    """
    for layout in _list_layouts(config, options.world_size, options.batch.seq_length, fixed.sizes):
        if isinstance(layout, str):
            yield layout
            continue
        counted = () if fixed.fixes_split else count_ends(config.num_layers, layout.pp * layout.vp)
        if counted is None:
            yield f"num_layers = {config.num_layers} does not divide into pp x vp equal stages"
            continue
        sizes = _MICRO_BATCH_SIZES if fixed.micro_batch_size is None else (fixed.micro_batch_size,)
        for size in sizes:
            try:
                replace(options.batch, micro_batch_size=size).count_microbatches(layout)
            except TrainingError as error:
                yield str(error)
                continue
            for wrapping in _list_wrappers(config, layout, fixed):
                for recipe in fixed.fp8_recipes:
                    yield Choice(
                        layout=layout,
                        micro_batch_size=size,
                        **wrapping,
                        counted=counted,
                        recompute=fixed.recompute or NO_RECOMPUTE,
                        fp8_recipe=recipe,
                    )


def _list_layouts(
    config: TransformerConfig, gpus: int, seq_length: int, fixed: Mapping[str, int]
) -> Iterator[Layout | str]:
    def sizes(axis: str, total: int, largest: int) -> list[int]:
        return [fixed[axis]] if axis in fixed else _list_divisors(total, largest)

    experts = config.num_moe_experts
    largest_cp = max(1, min(_LARGEST_CP, seq_length // _SHORTEST_PART))
    for tp in sizes("tp", gpus, _LARGEST_TP):
        for pp in sizes("pp", gpus, config.num_layers):
            for cp in sizes("cp", gpus, largest_cp):
                if gpus % (tp * pp * cp):
                    continue
                for vp in [fixed["vp"]] if "vp" in fixed else _list_vp(config, pp):
                    dense = {"tp": tp, "pp": pp, "vp": vp, "cp": cp, "dp": gpus // (tp * pp * cp)}
                    if not experts:
                        yield _try_layout(dense, fixed.get("ep", 1), fixed.get("etp"))
                        continue
                    for etp in [fixed["etp"]] if "etp" in fixed else sorted({1, tp}):
                        for ep in sizes("ep", experts, gpus // (pp * etp)):
                            yield _try_layout(dense, ep, etp)


def _try_layout(dense: Mapping[str, int], ep: int, etp: int | None) -> Layout | str:
    """Return a layout, or why there is none."""
    try:
        return Layout(**dense, ep=ep, etp=etp)
    except LayoutError as error:
        return str(error)


def _list_divisors(total: int, largest: int) -> list[int]:
    return [size for size in range(1, min(total, largest) + 1) if total % size == 0]


def _list_vp(config: TransformerConfig, pp: int) -> list[int]:
    """Return the numbers of virtual stages into which the layers of a rank divide."""
    most = 1 if pp == 1 else (config.num_layers + len(_COUNTED)) // pp
    return [vp for vp in range(1, most + 1) if vp == 1 or count_ends(config.num_layers, pp * vp) is not None]


_STRATEGIES = (ShardingStrategy.OPTIM_GRADS_PARAMS, ShardingStrategy.OPTIM_GRADS, ShardingStrategy.OPTIM)
"""Those that a search tries. With `no_shard`, every rank holds and updates everything. DDP does so in less memory:
Megatron-FSDP copies gradients to full precision for the update, and weights that have it already."""
_COUNTED = ("account_for_loss_in_pipeline_split", "account_for_embedding_in_pipeline_split")


def count_ends(layers: int, stages: int) -> tuple[str, ...] | None:
    """Return what to count as a layer, so that layers divide into equal stages; None if they do not in any case."""
    return next((_COUNTED[:more] for more in range(len(_COUNTED) + 1) if (layers + more) % stages == 0), None)


def _list_wrappers(config: TransformerConfig, layout: Layout, fixed: Fixed) -> Iterator[dict[str, Any]]:
    """Yield the wrappers of a layout and what they shard, as fields of a choice; equal ones once."""
    replicas = layout.dp * layout.cp
    wrappers = [fixed.wrapper] if fixed.wrapper is not None else [Wrapper.DDP]
    # Megatron-FSDP supports no pipeline. In one, FSDP2 would gather weights again for each microbatch. Plans of models
    # with experts take minutes with them.
    if fixed.wrapper is None and replicas > 1 and layout.pp == 1 and not config.num_moe_experts:
        wrappers += [Wrapper.MEGATRON_FSDP, Wrapper.TORCH_FSDP2]
    for wrapper in wrappers:
        if wrapper is Wrapper.MEGATRON_FSDP:
            strategies = _STRATEGIES if fixed.sharding_strategy is None else (fixed.sharding_strategy,)
            yield from ({"wrapper": wrapper, "sharding_strategy": strategy} for strategy in strategies)
        elif wrapper is Wrapper.DDP:
            tried = (True, False) if replicas > 1 else (False,)
            chosen = tried if fixed.distributed_optimizer is None else (fixed.distributed_optimizer,)
            yield from ({"wrapper": wrapper, "distributed_optimizer": distributed} for distributed in chosen)
        else:
            yield {"wrapper": wrapper}


def list_recomputations(choice: Choice, config: TransformerConfig) -> Iterator[Choice]:
    """Yield a choice with each kind of recomputation that may make it fit."""
    cheap = ("layernorm", *(("moe_act",) if config.num_moe_experts else ()))
    if config.multi_latent_attention:
        cheap += ("mla_up_proj",)
    modules = [cheap, ("core_attn",), ("moe",) if config.num_moe_experts else ("mlp",)]
    layers = (config.num_layers + len(choice.counted)) // (choice.layout.pp * choice.layout.vp)
    blocks = sorted({layers * part // 4 for part in (1, 2, 3)} - {0})
    for recompute in (
        *(Recompute("selective", modules=names) for names in modules),
        *(Recompute("full", "block", count) for count in blocks),
        FULL_RECOMPUTE,
    ):
        yield replace(choice, recompute=recompute)
