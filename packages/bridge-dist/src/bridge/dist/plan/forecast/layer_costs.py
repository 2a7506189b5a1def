"""Costs of a model's layers on a rank: lower bounds from the shapes of their parameters, or measured.

The bounds count what every layer does at least: its matrix products, attention, and the collectives of split matrices.
They leave out what depends on the implementation, which measuring one layer of each kind adds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from bridge.config import Document
from bridge.dist.job import make_builder
from bridge.dist.layout import Layout
from bridge.dist.plan.count.parameters import ModelParameter, list_parameters
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.forecast.space import Choice
from bridge.dist.plan.forecast.step_time import list_chunk_times, time_activations, time_product
from bridge.dist.plan.results import MatrixProduct, Plan, StagePlan, Traffic
from bridge.dist.train.flops import compute_width_ratio, count_uses

_ROUTED = re.compile(r".*\.experts\.")
_FIRST = re.compile(r"embedding\.")
_AFTER_ATTENTION = re.compile(r".*attention\.linear_proj\.weight")
_WITHOUT_BUFFERS = 0.99  # a stage has few buffers, such as frequencies, beside its weights and their copies


class _Shape(NamedTuple):
    """Parameters of one shape in a layer, without their number in the name."""

    name: str
    shape: tuple[int, ...]
    split_dim: int | None
    uses: float

    @property
    def is_routed(self) -> bool:
        return _ROUTED.match(self.name) is not None


Part = tuple[tuple[_Shape, int], ...]
"""The parameters of a layer, or of what is outside the layers, and their numbers."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Seconds of both passes of a microbatch in a layer on a rank, bytes that it keeps, and of 8-bit weight copies.

    Bounds from shapes have the time of both passes in ``backward``. The backward pass takes ``temporary`` bytes beside
    those kept; a sum of costs does not have them.
    """

    forward: float = 0.0
    backward: float = 0.0
    kept: float = 0.0
    workspaces: float = 0.0
    temporary: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of both passes."""
        return self.forward + self.backward

    def plus(self, other: LayerCost, times: float = 1) -> LayerCost:
        """Return the sum of this cost and a multiple of another."""
        return LayerCost(
            self.forward + times * other.forward,
            self.backward + times * other.backward,
            self.kept + times * other.kept,
            self.workspaces + times * other.workspaces,
        )


class Held(NamedTuple):
    """Elements of parameters on a rank: those that all data-parallel ranks hold, and those of routed experts."""

    dense: float = 0.0
    routed: float = 0.0

    def plus(self, other: Held, times: int = 1) -> Held:
        """Return the sum of these elements and a multiple of others."""
        return Held(self.dense + times * other.dense, self.routed + times * other.routed)


class Ends(NamedTuple):
    """Measured costs of what is before the layers and after them, and bytes that a pipeline stage passes on.

    The ``temporary`` bytes of ``last`` are those of the gradients of the logits, or 0 if they are not known.
    """

    first: LayerCost
    last: LayerCost
    message: int


class ModelLayers:
    """The layers of a model, and what is before and after them; their bounds from shapes.

    ``kinds`` holds the distinct layers, and ``order`` the place of each layer in it.
    """

    def __init__(self, document: Document, machine: Machine, *, seq_length: int) -> None:
        self.config = make_builder(document.config()).transformer_config
        self._machine, self._seq_length = machine, seq_length
        parameters = list_parameters(document)
        tied = not any(parameter.name.endswith("output_layer.weight") for parameter in parameters)
        parts: dict[str, list[ModelParameter]] = {}
        for parameter in parameters:
            parts.setdefault(parameter.layer, []).append(parameter)
        outside = parts.pop("", [])
        self.first = self._summarize([one for one in outside if _FIRST.match(one.name)], tied=tied)
        self.last = self._summarize([one for one in outside if not _FIRST.match(one.name)], tied=tied)
        layers = [self._summarize(part, tied=tied) for part in parts.values()]
        self.kinds = list(dict.fromkeys(layers))
        self.order = [self.kinds.index(layer) for layer in layers]
        # A pipeline divides the layers of one stack in their order; where it divides two, such as T5's, is not known.
        self.is_one_stack = len({name.partition(".")[0] for name in parts}) == 1

    def _summarize(self, parameters: Sequence[ModelParameter], *, tied: bool) -> Part:
        numbers: Counter[_Shape] = Counter()
        for name, shape, layer, split_dim in parameters:
            uses = count_uses(name, self.config, tied=tied) if len(shape) == 2 else 0
            short = re.sub(r"\d+", "", name.removeprefix(layer))
            numbers[_Shape(short, tuple(shape), split_dim, uses)] += 1
        return tuple(numbers.items())

    @property
    def is_half(self) -> bool:
        """Whether the model computes in half precision."""
        return bool(self.config.bf16 or self.config.fp16)

    def list_measurable(self, *, with_ends: bool) -> list[int]:
        """Return a layer of each kind, and the first and the last layer; empty if these do not tell all costs.

        Each is meant to be measured in a pipeline stage of its own.

        Args:
            with_ends: Whether to measure the first and the last layer even if there are others of their kind.
        """
        last = len(self.order) - 1
        places = {self.order[index]: index for index in reversed(range(1, last))}
        ends = {self.order[0], self.order[-1]}
        is_told = self.order[0] in places or self.order[0] != self.order[-1]
        if not self.is_one_stack or not is_told or places.keys() | ends != set(self.order):
            return []
        between = sorted(places.values())
        return [0, *between, last] if with_ends or ends - places.keys() else between

    def read_costs(self, plan: Plan, choice: Choice) -> tuple[dict[int, LayerCost], Ends | None]:
        """Return the cost of a layer of each kind, and the ends if they were measured, from a plan of such stages."""
        costs = {
            stage.pp: LayerCost(
                *seconds[0],
                stage.chunks[0].activation_bytes / choice.recompute.layers_at_once,
                self._count_workspaces(stage, choice),
                stage.chunks[0].temporary_bytes,
            )
            for stage, seconds in zip(plan.stages, list_chunk_times(plan, self._machine), strict=True)
        }
        last = len(self.order) - 1
        layers = {self.order[place]: cost for place, cost in costs.items() if 0 < place < last}
        if 0 not in costs:
            return layers, None
        # What is outside of the layers counts as part of a layer that is the only one of its kind.
        before, after = (
            costs[place].plus(layers.setdefault(self.order[place], costs[place]), -1) for place in (0, last)
        )
        # The plan has the larger of two: the gradients of the logits, and what recomputing the layer takes.
        if costs[last].temporary > layers[self.order[last]].temporary:
            after = replace(after, temporary=costs[last].temporary)
        return layers, Ends(before, after, plan.stages[0].chunks[0].sent_bytes)

    def _count_workspaces(self, stage: StagePlan, choice: Choice) -> float:
        """Return the bytes of 8-bit copies of weights."""
        copies = stage.weight_bytes - (2 if self.is_half else 4) * stage.parameters
        return copies * _WITHOUT_BUFFERS if self._is_fp8(choice) else 0.0

    def count_layer(self, part: Part, choice: Choice, *, is_layer: bool = True) -> LayerCost:
        """Return a lower bound of the cost of a layer, or of what is outside of them, from the shapes of matrices."""
        layout, config, machine = choice.layout, self.config, self._machine
        tokens = choice.micro_batch_size * self._seq_length / layout.cp
        again = 1 if choice.recompute.granularity == "full" else 0
        dtype = "bfloat16" if self.is_half else "float32"
        if is_layer and self._is_fp8(choice):
            dtype = "float8"
        size = 1 if dtype == "float8" else 2
        seconds = 0.0
        inputs = set[tuple[bool, int]]()
        for one, number in part:
            if not one.uses:
                continue
            (n, k), rows, uses = _split(one, layout), tokens, number * one.uses
            if one.is_routed:
                etp, experts = layout.etp or 1, config.num_moe_experts or 1
                rows = tokens / layout.tp * config.moe_router_topk * layout.ep * etp / experts
                uses = number / layout.ep
            elif one.split_dim is None:
                rows = tokens / layout.tp
            # Forward, gradient of the input, gradient of the weight.
            product = MatrixProduct(rows, n, k, 1, dtype)  # type: ignore[arg-type]  # a mean need not be whole
            seconds += uses * (3 + again) * time_product(product, machine)
            moved = 3 * rows * (n + k)  # the input and the output, or their gradients
            seconds += time_activations(uses * size * moved, machine)
            inputs.add((one.is_routed, one.shape[1]))
            if is_layer:
                seconds += self._time_communication(one, choice, rows=rows, again=again)
                if _AFTER_ATTENTION.fullmatch(one.name):
                    seconds += self._time_attention(choice, one.shape[1] / layout.tp, again=again)
        kept = self._count_kept(choice, inputs, tokens / layout.tp) if is_layer else 0.0
        return LayerCost(backward=seconds, kept=kept)

    def _is_fp8(self, choice: Choice) -> bool:
        return choice.fp8_recipe is not None or bool(self.config.fp8)

    def _count_kept(self, choice: Choice, inputs: set[tuple[bool, int]], tokens: float) -> float:
        """Return the bytes of the inputs of matrices, of which the backward pass needs each."""
        hidden = 2 * tokens * self.config.hidden_size
        if choice.recompute.granularity is not None:
            return hidden / choice.recompute.layers_at_once
        topk = self.config.moe_router_topk
        size = 1 if self._is_fp8(choice) else 2
        return max(hidden, size * tokens * sum(width * (topk if is_routed else 1) for is_routed, width in inputs))

    def _time_communication(self, one: _Shape, choice: Choice, *, rows: float, again: int) -> float:
        """Return the time of the collectives after a matrix whose input is split, or around experts."""
        layout, config = choice.layout, self.config
        if one.is_routed:
            if layout.ep == 1 or one.split_dim != 1:
                return 0.0
            # Tokens go to their experts and return, in the forward and in the backward pass.
            local = rows * (config.num_moe_experts or 1) / layout.ep / (layout.etp or 1)
            calls, group, ranks, operation = 4 + 2 * again, "ep", layout.ep, "alltoall"
            exposed = self._machine.exposed if config.overlap_moe_expert_parallel_comm else 1.0
        else:
            if layout.tp == 1 or one.split_dim != 1:
                return 0.0
            local, calls, group, ranks, operation = rows, 1 + again, "tp", layout.tp, "reduce_scatter"
            if not self._is_fp8(choice):
                calls += 1  # the gradient is gathered
            exposed = self._machine.exposed if config.tp_comm_overlap else 1.0
        size = int(calls * local * one.shape[0] * 2)
        traffic = Traffic(group=group, ranks=ranks, operation=operation, calls=calls, bytes=size)
        return exposed * self._machine.traffic_seconds(traffic, layout, pp=0)

    def _time_attention(self, choice: Choice, width: float, *, again: int) -> float:
        """Return the time of an attention kernel that skips half of the scores; ``width`` is that of all values."""
        ratio = compute_width_ratio(self.config)
        flops = choice.micro_batch_size * self._seq_length**2 / choice.layout.cp * width
        again = max(again, "core_attn" in (choice.recompute.modules or ()))
        passes = (1 + again) * (1 + ratio) + 3 * ratio + 2
        return flops * passes / (self._machine.bf16_flops * self._machine.attention_efficiency)


def count_elements(part: Part, layout: Layout) -> Held:
    """Return the elements of a part of the model on a rank."""
    dense = routed = 0.0
    for one, number in part:
        elements = number * prod(one.shape) / (_count_splits(one, layout) if one.split_dim is not None else 1)
        if one.is_routed:
            routed += elements / layout.ep
        else:
            dense += elements
    return Held(dense, routed)


def _count_splits(one: _Shape, layout: Layout) -> int:
    return (layout.etp or 1) if one.is_routed else layout.tp


def _split(one: _Shape, layout: Layout) -> tuple[float, float]:
    """Return the dimensions of a matrix on a rank: of its output and of its input."""
    n, k = one.shape
    ranks = _count_splits(one, layout)
    return (n / ranks, k) if one.split_dim == 0 else (n, k / ranks) if one.split_dim == 1 else (n, k)
