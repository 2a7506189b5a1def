"""Lower bounds of the step time and the memory of choices of a search.

They come from the costs of layers, see ``layer_costs``, and from what follows from a layout alone: the pipeline's
schedule and messages, gradients that are reduced and weights that are gathered, and the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import accumulate
from typing import NamedTuple

from bridge.config import Document
from bridge.dist.document_layout import find_transformer
from bridge.dist.layout import Layout
from bridge.dist.plan.count.schedule import Pass, compute_peak, list_passes
from bridge.dist.plan.forecast.layer_costs import Ends, Held, LayerCost, ModelLayers, Part, count_elements
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.forecast.space import FULL_RECOMPUTE, NO_RECOMPUTE, Choice, Fixed
from bridge.dist.plan.forecast.step_time import compute_length, time_gradients
from bridge.dist.plan.plan import PlanOptions
from bridge.dist.plan.results import Plan, Traffic
from bridge.dist.wrapper import ShardingStrategy, Wrapper

_BELOW = 1 - 1e-9  # so that rounding raises no bound above the real value
_ABOVE = 1.001  # what may hide communication is not underestimated


class _Chunk(NamedTuple):
    """A virtual pipeline stage: the cost of a microbatch, the parameters that it holds, and those of its layers.

    ``temporary`` is a lower bound of the bytes that its backward pass takes beside those kept.
    """

    cost: LayerCost
    held: Held
    layers: Held
    temporary: float = 0.0


class Bounds:
    """Lower bounds for the choices of a search; they rise as layers are measured."""

    def __init__(self, document: Document, options: PlanOptions, machine: Machine, fixed: Fixed) -> None:
        self._options, self._machine, self._fixed = options, machine, fixed
        self._model = ModelLayers(document, machine, seq_length=options.batch.seq_length)
        self._group_size: int | None = find_transformer(document)[1].get("microbatch_group_size_per_vp_stage")
        self._measured: dict[object, dict[int, LayerCost]] = {}  # by kind of choice; empty if that failed
        self._ends: dict[object, Ends] = {}
        self._buffers = 1  # the most gradient buffers of a layer
        self._workspaces: dict[object, dict[int, float]] = {}
        self._by_shape: dict[object, LayerCost] = {}
        self._held: dict[object, list[Held]] = {}
        self._simulated: dict[Choice, float] = {}

    def list_unmeasured(self, choice: Choice) -> list[Choice]:
        """Return the choices whose layers must be measured for the best bounds of a choice."""
        if not self._model.list_measurable(with_ends=False):
            return []
        return [one for one in _list_pure(choice) if one.kind not in self._measured]

    def list_measurable(self, choice: Choice) -> list[int]:
        """Return the layers to measure for a choice, each in a pipeline stage of its own."""
        return self._model.list_measurable(with_ends=_get_ends_key(choice) not in self._ends)

    def learn_layers(self, choice: Choice, plan: Plan | None) -> None:
        """Take the costs of layers from a plan of the measurable ones; None if they cannot be measured."""
        layers, ends = ({}, None) if plan is None else self._model.read_costs(plan, choice)
        self._measured[choice.kind] = layers
        self._workspaces[_get_weights_key(choice)] = {kind: cost.workspaces for kind, cost in layers.items()}
        if ends is not None:
            self._ends[_get_ends_key(choice)] = ends
        if plan is not None:
            self._buffers = max(self._buffers, *(len(stage.buckets) for stage in plan.stages))

    def count_seconds(self, choice: Choice) -> float:
        """Return a lower bound of the step time of a choice."""
        microbatches = self._count_microbatches(choice)
        stages = self._list_stages(choice)
        if stages is None:
            whole = self._count_whole(choice)
            return microbatches * self._time_microbatch(choice, [whole]) / choice.layout.pp * _BELOW
        busy = [self._time_microbatch(choice, stage) for stage in stages]
        # Before its first pass and after its last one, a rank waits for the first chunks of the ranks before.
        before = accumulate((self._time_microbatch(choice, stage[:1]) for stage in stages), initial=0.0)
        length = max(microbatches * seconds + waiting for seconds, waiting in zip(busy, before, strict=False))
        return self._end_step(choice, stages, max(length, microbatches * sum(busy) / len(busy)))

    def simulate_seconds(self, choice: Choice) -> float:
        """Return a better bound of a choice whose layers have been measured, from the schedule of its pipeline."""
        if choice not in self._simulated:
            stages = self._list_stages(choice)
            if stages is None or choice.layout.pp == 1 or not self._is_measured(choice):
                return self.count_seconds(choice)
            passes = [
                [self._time_passes(choice, chunk, rank=rank, index=index) for index, chunk in enumerate(stage)]
                for rank, stage in enumerate(stages)
            ]
            length = compute_length(
                choice.layout,
                forward=[[forward for forward, _ in stage] for stage in passes],
                backward=[[backward for _, backward in stage] for stage in passes],
                microbatches=self._count_microbatches(choice),
                group_size=self._group_size,
            )
            self._simulated[choice] = self._end_step(choice, stages, length)
        return self._simulated[choice]

    def count_bytes(self, choice: Choice) -> int:
        """Return a lower bound of the memory that the rank of a choice with the most memory needs."""
        stages, pp, vp = self._list_stages(choice), choice.layout.pp, choice.layout.vp
        if stages is None:
            # The rank with the most memory holds no less than the mean.
            return int(self._count_held(choice, [self._count_whole(choice)]) / pp)
        most = 0
        microbatches = self._count_microbatches(choice)
        if microbatches > 4 * pp:  # the peak is reached in the first rounds
            microbatches = 3 * pp + microbatches % pp
        for rank in {0, min(1, pp - 1), pp - 1}:  # the first chunk of rank 0 may have fewer layers than the others
            kept = [int(chunk.cost.kept * _BELOW) for chunk in stages[rank]]
            temporary = [int(chunk.temporary * _BELOW) for chunk in stages[rank]]
            activations = compute_peak(_list_passes(pp, vp, microbatches, rank, self._group_size), kept, temporary)
            most = max(most, int(self._count_held(choice, stages[rank])) + activations)
        return most

    def _time_microbatch(self, choice: Choice, chunks: Sequence[_Chunk]) -> float:
        """Return the time of both passes of a microbatch, without messages to other stages."""
        return sum(chunk.cost.seconds + self._time_gradients(choice, chunk.held) for chunk in chunks)

    def _time_gradients(self, choice: Choice, held: Held) -> float:
        shards = self._count_shards(choice) if _shards_weights(choice) else (1, 1)
        return time_gradients(held.dense / shards[0] + held.routed / shards[1], self._machine)

    def _time_passes(self, choice: Choice, chunk: _Chunk, *, rank: int, index: int) -> tuple[float, float]:
        """Return the time of both passes, with what messages to other stages add."""
        layout = choice.layout
        message = self._time_message(choice, rank)
        forward, backward = chunk.cost.forward, chunk.cost.backward + self._time_gradients(choice, chunk.held)
        if layout.vp > 1:  # others run meanwhile
            return max(forward, message), max(backward, message)
        is_first, is_last = (rank, index) == (0, 0), (rank, index) == (layout.pp - 1, layout.vp - 1)
        return forward + (0.0 if is_last else message), backward + (0.0 if is_first else message)

    def _time_message(self, choice: Choice, rank: int) -> float:
        ends = self._ends.get(_get_ends_key(choice))
        if ends is None or choice.layout.pp == 1:
            return 0.0
        message = Traffic(group="pp", ranks=choice.layout.pp, operation="send", calls=1, bytes=ends.message)
        return self._machine.traffic_seconds(message, choice.layout, pp=rank)

    def _end_step(self, choice: Choice, stages: Sequence[Sequence[_Chunk]], length: float) -> float:
        """Return the time of a step whose passes take some time: that of the rank that adds the least at its end."""
        ends = []
        for rank, chunks in enumerate(stages):
            held = _sum_held(chunks)
            optimizer = self._time_optimizer(choice, held)
            if _shards_weights(choice):
                # Gathers and reduces while it computes.
                ends.append(max(length, self._time_sharding(choice, chunks)) + optimizer)
            elif choice.wrapper is Wrapper.NONE:
                ends.append(length)
            elif choice.wrapper is Wrapper.MEGATRON_FSDP:
                ends.append(length + self._time_with_whole_weights(choice, chunks) + optimizer)
            else:
                ends.append(length + self._time_reducing(choice, chunks, rank) + optimizer)
        return min(ends) * _BELOW

    def _time_optimizer(self, choice: Choice, held: Held) -> float:
        """Return the time in which the optimizer reads and writes its memory."""
        master, moments = (4, 8) if self._model.is_half else (0, 8)
        updated = sum(number / shards for number, shards in zip(held, self._count_shards(choice), strict=True))
        size = _get_gradient_size(choice, is_half=self._model.is_half)
        gradients = size * (updated if _shards_gradients(choice) else sum(held))
        return ((2 * (master + moments) + 10) * updated + gradients) / self._machine.memory_speed

    def _time_sharding(self, choice: Choice, chunks: Sequence[_Chunk]) -> float:
        """Return the time of gathering and reducing under a wrapper that shards weights.

        Each microbatch gathers the weights of layers for both passes, but those of the last layer of a chunk only once,
        and reduces all gradients.
        """
        of_layers = self._get_held(choice)[: len(self._model.kinds)]
        largest = [max(sizes) for sizes in zip(*of_layers, strict=True)]
        gathered = [2 * sum(chunk.layers[index] for chunk in chunks) - len(chunks) * largest[index] for index in (0, 1)]
        size, seconds = (2 if self._model.is_half else 4) * self._count_microbatches(choice), []
        for once, all_, (group, ranks) in zip(gathered, _sum_held(chunks), _list_groups(choice), strict=True):
            gathers = self._time_collective(choice, group, "allgather", ranks, size * max(0.0, once))
            seconds.append(gathers + self._time_collective(choice, group, "reduce_scatter", ranks, size * all_))
        return max(seconds)  # each kind of group may be hidden

    def _time_with_whole_weights(self, choice: Choice, chunks: Sequence[_Chunk]) -> float:
        """Return the exposed time of gathering and reducing under Megatron-FSDP that does not shard weights.

        All weights are gathered once, at the end of a step. Gradients are reduced before that, unless they are sharded:
        then each microbatch reduces them during its backward pass.
        """
        size = 2 if self._model.is_half else 4
        held = list(zip(_sum_held(chunks), _list_groups(choice), strict=True))

        def time_all(operation: str) -> list[float]:
            return [
                self._time_collective(choice, group, operation, ranks, size * number) for number, (group, ranks) in held
            ]

        if choice.sharding_strategy is ShardingStrategy.NO_SHARD:
            return sum(time_all("allreduce"))
        gathered, reduced = sum(time_all("allgather")), time_all("reduce_scatter")
        if choice.sharding_strategy is ShardingStrategy.OPTIM:
            return gathered + sum(reduced)
        if not self._is_measured(choice):  # then it is not known how much the backward pass hides
            return gathered
        backward = sum(chunk.cost.backward + self._time_gradients(choice, chunk.held) for chunk in chunks)
        exposed = sum(max(0.0, seconds - backward * _ABOVE) for seconds in reduced)
        return gathered + self._count_microbatches(choice) * exposed

    def _time_reducing(self, choice: Choice, chunks: Sequence[_Chunk], rank: int) -> float:
        """Return the exposed time of reducing gradients and gathering weights at the end of a step, once measured."""
        if not self._is_measured(choice):
            return 0.0
        messages = self._time_message(choice, rank) * len(chunks)
        forward = sum(chunk.cost.forward for chunk in chunks) + messages
        backward = sum(chunk.cost.backward + self._time_gradients(choice, chunk.held) for chunk in chunks) + messages
        weight = 2 if self._model.is_half else 4
        if choice.distributed_optimizer:
            collectives = [("reduce_scatter", 4, backward), ("allgather", weight, forward)]
        else:
            collectives = [("allreduce", 4, backward)]
        seconds, held = 0.0, _sum_held(chunks)
        if choice.layout.ep == 1:  # experts are in the buffers of the other parameters, at least if split as these are
            held = Held(sum(held) if choice.layout.etp == choice.layout.tp else held.dense)
        for elements, (group, ranks) in zip(held, _list_groups(choice), strict=True):
            for operation, size, hidden in collectives:
                alone = self._time_collective(choice, group, operation, ranks, size * elements, rank=rank)
                last = alone / (self._buffers * len(chunks))
                seconds += max(last, alone - hidden * _ABOVE)
        return seconds

    def _time_collective(
        self, choice: Choice, group: str, operation: str, ranks: int, size: float, *, rank: int = 0
    ) -> float:
        if ranks == 1 or not size:
            return 0.0
        traffic = Traffic(group=group, ranks=ranks, operation=operation, calls=1, bytes=int(size))
        return self._machine.traffic_seconds(traffic, choice.layout, pp=rank)

    def _count_held(self, choice: Choice, chunks: Sequence[_Chunk]) -> float:
        """Return the bytes of weights, their 8-bit copies, gradients and optimizer."""
        weight, optimizer = (2, 12) if self._model.is_half else (4, 8)
        gradient = _get_gradient_size(choice, is_half=self._model.is_half)
        total = sum(chunk.cost.workspaces for chunk in chunks)
        for number, shards in zip(_sum_held(chunks), self._count_shards(choice), strict=True):
            if choice.wrapper is Wrapper.NONE:
                total += weight * number
                continue
            total += weight * number / (shards if _shards_weights(choice) else 1)
            total += gradient * number / (shards if _shards_gradients(choice) else 1)
            total += optimizer * number / shards
        if _shards_weights(choice):  # a layer or an end is gathered as a whole, and so are its gradients
            total += 2 * weight * max(sum(held) for held in self._get_held(choice))
        return total

    def _count_shards(self, choice: Choice) -> tuple[int, int]:
        """Return over how many ranks the optimizer state of dense parameters and of routed experts is sharded."""
        if _shards_optimizer(choice):
            return choice.layout.dp * choice.layout.cp, choice.layout.expert_dp
        return 1, 1

    def _count_microbatches(self, choice: Choice) -> int:
        return self._options.batch.global_batch_size // (choice.micro_batch_size * choice.layout.dp)

    def _list_stages(self, choice: Choice) -> list[list[_Chunk]] | None:
        """Return the chunks of each pipeline rank; None if it is not known how layers are divided."""
        layout = choice.layout
        if self._fixed.fixes_split or (layout.pp > 1 and not self._model.is_one_stack):
            return None
        numbers = _divide(tuple(self._model.order), layout.pp, layout.vp, choice.counted)
        if numbers is None:
            return None
        made = {kinds: self._make_chunk(choice, kinds) for kinds in {kinds for stage in numbers for kinds in stage}}
        stages = [[made[kinds] for kinds in stage] for stage in numbers]
        first, last = self._get_ends(choice)
        *_, held_first, held_last = self._get_held(choice)
        stages[0][0] = _add_end(stages[0][0], first, held_first)
        # What is after the layers has been freed before one of them is recomputed.
        temporary = max(last.temporary, stages[-1][-1].temporary - last.kept)
        stages[-1][-1] = _add_end(stages[-1][-1], last, held_last)._replace(temporary=temporary)
        return stages

    def _count_whole(self, choice: Choice) -> _Chunk:
        """Return the whole model as one chunk, if it is not known how layers are divided."""
        kinds = tuple(self._model.order.count(kind) for kind in range(len(self._model.kinds)))
        chunk = self._make_chunk(choice, kinds)
        for cost, held in zip(self._get_ends(choice), self._get_held(choice)[-2:], strict=True):
            chunk = _add_end(chunk, cost, held)
        return chunk

    def _make_chunk(self, choice: Choice, kinds: tuple[int, ...]) -> _Chunk:
        """Return a chunk that has a number of layers of each kind."""
        cost, held = LayerCost(), Held()
        for kind, (number, one) in enumerate(zip(kinds, self._get_held(choice), strict=False)):
            cost = cost.plus(self._count_layers(choice, kind, number, of_one_kind=number == sum(kinds)))
            held = held.plus(one, number)
        return _Chunk(cost, held, held, self._count_temporary(choice, kinds))

    def _count_temporary(self, choice: Choice, kinds: tuple[int, ...]) -> float:
        """Return what the backward pass of a chunk takes at least beside what is kept.

        The last layer, which may be of any kind, is recomputed while all that is kept exists.
        """
        measured = self._measured.get(choice.kind)
        if not measured:
            return 0.0
        return min((measured[kind].temporary for kind, number in enumerate(kinds) if number), default=0.0)

    def _count_layers(self, choice: Choice, kind: int, number: int, *, of_one_kind: bool) -> LayerCost:
        """Return the cost of a number of layers in a chunk, some of which may be recomputed."""
        pure = _list_pure(choice)
        none = self._get_layer(pure[0], kind)
        if len(pure) == 1:
            return LayerCost().plus(none, number)
        full = self._get_layer(pure[1], kind)
        if not of_one_kind:  # then it is not known which ones are recomputed
            return LayerCost().plus(replace(none, kept=full.kept), number)
        recomputed = min(number, choice.recompute.num_layers or 0)
        return LayerCost().plus(none, number - recomputed).plus(full, recomputed)

    def _get_layer(self, choice: Choice, kind: int) -> LayerCost:
        """Return the cost of a layer: measured, or from shapes."""
        measured = self._measured.get(choice.kind)
        if measured:
            return measured[kind]
        key = (choice.kind, kind)
        if key not in self._by_shape:
            self._by_shape[key] = self._model.count_layer(self._model.kinds[kind], choice)
        cost = self._by_shape[key]
        plain = self._measured.get(replace(choice, recompute=NO_RECOMPUTE).kind)
        least = plain[kind].seconds if plain else 0.0  # recomputation makes no layer faster
        workspaces = self._workspaces.get(_get_weights_key(choice), {}).get(kind, 0.0)
        return LayerCost(0.0, max(cost.seconds, least), cost.kept, workspaces)

    def _is_measured(self, choice: Choice) -> bool:
        return all(self._measured.get(one.kind) for one in _list_pure(choice))

    def _get_ends(self, choice: Choice) -> tuple[LayerCost, LayerCost]:
        """Return the costs of what is before the layers and after them."""
        key = _get_ends_key(choice)
        if key in self._ends:
            return self._ends[key].first, self._ends[key].last
        if key not in self._by_shape:
            # Words are looked up without a product, so all products outside of layers are after them.
            bare, cost = replace(choice, recompute=NO_RECOMPUTE), LayerCost()
            for part in (self._model.first, self._model.last):
                cost = cost.plus(self._model.count_layer(part, bare, is_layer=False))
            self._by_shape[key] = cost
        return LayerCost(), self._by_shape[key]

    def _get_held(self, choice: Choice) -> list[Held]:
        """Return the elements of a layer of each kind on a rank, of what is before the layers, and of what is after."""
        key = _get_weights_key(choice)
        if key not in self._held:
            parts: list[Part] = [*self._model.kinds, self._model.first, self._model.last]
            self._held[key] = [count_elements(part, choice.layout) for part in parts]
        return self._held[key]


def _add_end(chunk: _Chunk, cost: LayerCost, held: Held) -> _Chunk:
    return chunk._replace(cost=chunk.cost.plus(cost), held=chunk.held.plus(held))


def _sum_held(chunks: Sequence[_Chunk]) -> Held:
    return Held(sum(chunk.held.dense for chunk in chunks), sum(chunk.held.routed for chunk in chunks))


def _list_groups(choice: Choice) -> list[tuple[str, int]]:
    """Return the groups that average the gradients of dense parameters and of routed experts, and their sizes."""
    layout = choice.layout
    return [("dp_cp", layout.dp * layout.cp), ("expt_dp", layout.expert_dp)]


def _shards_weights(choice: Choice) -> bool:
    return choice.wrapper is Wrapper.TORCH_FSDP2 or choice.sharding_strategy is ShardingStrategy.OPTIM_GRADS_PARAMS


def _shards_gradients(choice: Choice) -> bool:
    return _shards_weights(choice) or choice.sharding_strategy is ShardingStrategy.OPTIM_GRADS


def _shards_optimizer(choice: Choice) -> bool:
    strategies = (None, ShardingStrategy.NO_SHARD)
    return choice.distributed_optimizer or _shards_weights(choice) or choice.sharding_strategy not in strategies


def _get_gradient_size(choice: Choice, *, is_half: bool) -> int:
    """Return the bytes of a gradient: DDP has full precision, FSDP the precision of the weight."""
    return 2 if is_half and choice.wrapper in (Wrapper.MEGATRON_FSDP, Wrapper.TORCH_FSDP2) else 4


def _list_pure(choice: Choice) -> list[Choice]:
    """Return choices of which every layer is recomputed in the same way, and of which this choice is a mixture."""
    if choice.recompute.method != "block":
        return [choice]
    return [replace(choice, recompute=recompute) for recompute in (NO_RECOMPUTE, FULL_RECOMPUTE)]


def _get_weights_key(choice: Choice) -> tuple[object, ...]:
    """Return what the size of a layer's weights and their copies depends on."""
    layout = choice.layout
    return (layout.tp, layout.ep, layout.etp, choice.fp8_recipe)


def _get_ends_key(choice: Choice) -> tuple[object, ...]:
    """Return what the cost of what is outside of the layers depends on."""
    return (choice.layout.tp, choice.layout.cp, choice.micro_batch_size, choice.fp8_recipe)


@cache
def _divide(order: tuple[int, ...], pp: int, vp: int, counted: tuple[str, ...]) -> list[list[tuple[int, ...]]] | None:
    """Return the number of layers of each kind by pipeline rank and chunk; None if they do not divide evenly."""
    stages = pp * vp
    if (len(order) + len(counted)) % stages:
        return None
    sizes = [(len(order) + len(counted)) // stages] * stages
    sizes[-1] -= "account_for_loss_in_pipeline_split" in counted
    sizes[0] -= "account_for_embedding_in_pipeline_split" in counted
    ends, all_kinds = list(accumulate(sizes)), range(max(order) + 1)
    places = [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    numbers = [tuple(place.count(kind) for kind in all_kinds) for place in places]
    return [numbers[rank::pp] for rank in range(pp)]


@lru_cache(maxsize=1024)
def _list_passes(pp: int, vp: int, microbatches: int, rank: int, group_size: int | None) -> list[Pass]:
    return list_passes(Layout(pp=pp, vp=vp), rank, microbatches, group_size=group_size)
