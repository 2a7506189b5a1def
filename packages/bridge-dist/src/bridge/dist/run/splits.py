"""The layouts and wrappers that `bridge verify` compares with one process."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from bridge.config import Document
from bridge.dist.document_layout import replace_layout
from bridge.dist.errors import LayoutError
from bridge.dist.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class Wrapping:
    """A data-parallel wrapper, and whether it shards the optimizer state."""

    wrapper: Wrapper
    distributed_optimizer: bool = False

    def __str__(self) -> str:
        return f"{self.wrapper}, dist. optimizer" if self.distributed_optimizer else str(self.wrapper)


WRAPPINGS = (
    Wrapping(wrapper=Wrapper.DDP),
    Wrapping(wrapper=Wrapper.DDP, distributed_optimizer=True),
    Wrapping(wrapper=Wrapper.MEGATRON_FSDP),
    Wrapping(wrapper=Wrapper.TORCH_FSDP2),
)


_SHARDED_OPTIMIZER = WRAPPINGS[1]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Parallel sizes by axis; other axes have size 1, and data parallelism takes the remaining ranks."""

    sizes: tuple[tuple[str, int], ...] = ()
    sequence_parallel: bool = False

    def combine(self, other: Split) -> Split:
        """Return the split along the axes of both."""
        return Split(
            sizes=self.sizes + other.sizes, sequence_parallel=self.sequence_parallel or other.sequence_parallel
        )

    def apply_to(self, document: Document) -> Document:
        """Return a copy of a document with this layout instead of its own."""
        copy = deepcopy(document)
        replace_layout(copy, dict(self.sizes), sequence_parallel=self.sequence_parallel)
        return copy

    def format_name(self, world_size: int) -> str:
        """Return a short name, such as ``tp2 sp pp2 dp1``."""
        parts = [f"{name}{size}" for name, size in self.sizes]
        if self.sequence_parallel:
            parts.insert(1, "sp")
        ranks = 1
        for name, size in self.sizes:
            ranks *= size if name in ("tp", "pp", "cp") else 1
        return " ".join([*parts, f"dp{world_size // ranks}"])


def list_single_splits(world_size: int) -> list[Split]:
    """Return the splits along one axis: data, tensor, tensor and sequence, pipeline, virtual pipeline, context, expert.

    The size is the smallest prime factor of the world size; data parallelism takes the remaining ranks.
    """
    if world_size == 1:
        return [Split()]
    size = _find_smallest_factor(world_size)
    tp = Split(sizes=(("tp", size),))
    return [
        Split(),
        tp,
        replace(tp, sequence_parallel=True),
        Split(sizes=(("pp", size),)),
        Split(sizes=(("pp", size), ("vp", 2))),
        Split(sizes=(("cp", size),)),
        Split(sizes=(("ep", size),)),
    ]


def list_product_splits(world_size: int) -> list[Split]:
    """Return pairs of splits along different axes, both of the same size, if the world size allows it."""
    if world_size == 1 or world_size % _find_smallest_factor(world_size) ** 2:
        return []
    _, tp, tp_sp, pp, pp_vp, cp, ep = list_single_splits(world_size)
    pairs = [(tp, pp), (tp_sp, pp), (tp_sp, pp_vp), (tp_sp, cp), (tp_sp, ep), (cp, pp), (cp, ep), (pp, ep)]
    return [one.combine(other) for one, other in pairs]


def _find_smallest_factor(number: int) -> int:
    return next(factor for factor in range(2, number + 1) if number % factor == 0)


def list_cases(world_size: int) -> list[tuple[Split, Wrapping]]:
    """Return the layouts and wrappers that `bridge verify` tries on ``world_size`` ranks."""
    single = [(split, wrapping) for split in list_single_splits(world_size) for wrapping in WRAPPINGS]
    return single + [(split, _SHARDED_OPTIMIZER) for split in list_product_splits(world_size)]


def select_cases(world_size: int, names: Sequence[str]) -> list[tuple[Split, Wrapping]]:
    """Return the cases of some layouts, such as ``tp2 sp`` or ``tp2 sp dp2``, or ``tp2 with torch-fsdp2``.

    Raises:
        LayoutError: No case has one of the names.
    """
    cases = list_cases(world_size)
    known = [_list_names(split, wrapping, world_size) for split, wrapping in cases]
    for name in names:
        if not any(name in each for each in known):
            layouts = ", ".join(dict.fromkeys(split.format_name(world_size) for split, _ in cases))
            raise LayoutError(f"no layout {name!r} on {world_size} ranks; the layouts are {layouts}")
    return [case for case, each in zip(cases, known, strict=True) if each & set(names)]


def _list_names(split: Split, wrapping: Wrapping, world_size: int) -> set[str]:
    name = split.format_name(world_size)
    layouts = {name, name.rpartition(" ")[0]} - {""}
    return layouts | {f"{layout} with {wrapping.wrapper}" for layout in layouts}
