"""A parameter of Megatron-Core as rows of tensors of transformers, and the basic kinds of parameters.

One entry serves both directions: reading copies rows of the tensors into the parameter, writing copies them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from bridge.models.huggingface.weights.sizes import Sizes

Shape = tuple[int, ...]


@dataclass(slots=True)  # not frozen: that takes four times as long, and the table of DeepSeek-V3 has 75,000
class Part:
    """Consecutive rows of a parameter: which rows of which tensor they are."""

    tensor: str
    """The name of the tensor."""

    shape: Shape
    """The shape of the whole tensor."""

    rows: range
    """The rows of the tensor; they may have a step."""

    index: int | None = None
    """The matrix or vector within a tensor that stacks those of all experts."""

    transposed: bool = False
    """Whether the tensor is stored as [input, output], so that its columns are the rows."""


@dataclass(slots=True)  # not frozen: see Part
class Weight:
    """A parameter of the whole, unsharded model."""

    name: str
    """Its name in Megatron-Core, in the spelling of ``transfer.names``."""

    shape: Shape
    """Its shape without the rows that pad the vocabulary."""

    forms: tuple[tuple[Part, ...], ...]
    """The ways in which folders store it. The first one is written. A form without parts stands for zeros."""

    per_token: bool = False
    """Whether it has a row for each token: folders may have more rows than vocab_size."""

    factor: float = 1.0
    """What the tensors are multiplied by when they are read."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether a whole parameter of this shape is this weight, with or without padding of the vocabulary."""
        return tuple(shape) == self.shape or (
            self.per_token and tuple(shape[1:]) == self.shape[1:] and shape[0] > self.shape[0]
        )


@dataclass(frozen=True, slots=True)
class Repetition:
    """A tensor that a folder may have although it repeats another one, such as a tied output layer."""

    tensor: str
    of: str
    is_written: bool = False
    """Whether published folders have it, so that a saved one has it too."""


Entry = Weight | Repetition
Block = Callable[[Sizes, str, str], Iterator[Entry]]
"""Yields the weights of one module, given the model's sizes and the prefixes of both sides' names."""


def same(name: str, tensor: str, shape: Shape, *, transposed: bool = False, factor: float = 1.0) -> Weight:
    """Return the weight that is one whole tensor."""
    return Weight(name, shape, (whole(tensor, shape, transposed=transposed),), factor=factor)


def per_token(name: str, tensors: Sequence[str], shape: Shape) -> Weight:
    """Return a weight with a row for each token; folders have it as one of these tensors."""
    return Weight(name, shape, tuple(whole(tensor, shape) for tensor in tensors), per_token=True)


def zeros(name: str, shape: Shape) -> Weight:
    """Return a weight for each token that transformers does not have."""
    return Weight(name, shape, ((),), per_token=True)


def whole(tensor: str, shape: Shape, *, transposed: bool = False) -> tuple[Part, ...]:
    """Return all rows of a tensor."""
    stored = shape[::-1] if transposed else shape
    return (Part(tensor, stored, range(shape[0]), transposed=transposed),)


def stack(tensors: Sequence[str], shape: Shape) -> tuple[Part, ...]:
    """Return the rows of tensors of equal shape, one tensor after the other."""
    return tuple(part for tensor in tensors for part in whole(tensor, shape))


def interleave(parts: Sequence[Part], groups: int) -> tuple[Part, ...]:
    """Return a share of each part for the first group, then for the second, and so on."""
    return tuple(_take_share(part, group, groups) for group in range(groups) for part in parts)


def _take_share(part: Part, group: int, groups: int) -> Part:
    share = len(part.rows) // groups
    return replace(part, rows=part.rows[group * share : (group + 1) * share])


def linear(
    name: str, tensor: str, rows: int, columns: int, *, bias: bool, transposed: bool = False
) -> Iterator[Weight]:
    """Yield the weight and the bias of a linear layer that both sides have."""
    yield same(f"{name}.weight", f"{tensor}.weight", (rows, columns), transposed=transposed)
    if bias:
        yield same(f"{name}.bias", f"{tensor}.bias", (rows,))


def norm(sizes: Sizes, name: str, tensor: str, width: int | None = None) -> Iterator[Weight]:
    """Yield the weight of a norm, and the bias of a LayerNorm."""
    shape = (width or sizes.hidden,)
    yield same(f"{name}.weight", f"{tensor}.weight", shape)
    if sizes.norms_have_biases:
        yield same(f"{name}.bias", f"{tensor}.bias", shape)


def list_written_tensors(
    weights: Iterable[Weight], repetitions: Sequence[Repetition]
) -> Iterator[tuple[str, Part, Weight]]:
    """Yield the tensors of a saved folder once each: the name, a part that has the shape, and a weight of it."""
    seen: set[str] = set()
    for weight in weights:
        for part in weight.forms[0]:
            if part.tensor not in seen:
                seen.add(part.tensor)
                for tensor in (part.tensor, *(one.tensor for one in repetitions if one.of == part.tensor)):
                    yield tensor, part, weight
