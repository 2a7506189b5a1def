"""Compare building a model with constructing Megatron's directly: time and peak memory, as ratios.

    uv run python tests/benchmarks/build.py [PRESET] [ROUNDS]

Both ways take turns, each time in a fresh process of one rank, on the same configuration, without a wrapper. Time is
processor time, the median of the rounds. The peak is the resident memory beyond what the process had before it began
to build.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from ranks import run_ranks


class Cost(NamedTuple):
    seconds: float
    peak_mib: float


def measure(build: Callable[[], object]) -> Cost:
    before = read_resident_mib("VmRSS")
    start = time.process_time()
    model = build()
    seconds = time.process_time() - start
    peak = read_resident_mib("VmHWM") - before
    del model
    return Cost(seconds, peak)


def read_resident_mib(which: str) -> float:
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def build_with_bridge(preset: str) -> Cost:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import load_config
    from bridge.dist import Layout, create_process_groups

    groups = create_process_groups(Layout())
    model_parallel_cuda_manual_seed(1)
    config = load_config(preset)
    builder = config.get_builder_cls()(config)
    return measure(lambda: builder.build_distributed_models(groups, wrap_with_ddp=False))


def build_with_megatron(preset: str) -> Cost:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import load_config
    from bridge.dist import Layout, create_process_groups

    groups = create_process_groups(Layout())
    model_parallel_cuda_manual_seed(1)
    config = load_config(preset)
    spec = get_gpt_layer_local_spec(normalization=config.transformer.normalization)
    return measure(
        lambda: GPTModel(
            config=config.transformer,
            transformer_layer_spec=spec,
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.seq_length,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_base=config.rotary_base,
            pg_collection=groups,
        )
    )


def main(preset: str = "gpt2-124m", rounds: str = "10") -> None:
    ways = {"bridge": build_with_bridge, "megatron": build_with_megatron}
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for turn in range(int(rounds)):
        order = list(ways) if turn % 2 else list(reversed(ways))  # what runs first finds colder memory
        for name in order:
            costs[name].append(run_ranks(ways[name], 1, preset)[0])
    seconds = {name: statistics.median(cost.seconds for cost in taken) for name, taken in costs.items()}
    peaks = {name: statistics.median(cost.peak_mib for cost in taken) for name, taken in costs.items()}
    for name in ways:
        print(f"{name:9} {seconds[name]:8.3f} s {peaks[name]:9.0f} MiB")  # noqa: T201
    time_ratio, peak_ratio = (values["bridge"] / values["megatron"] for values in (seconds, peaks))
    print(f"bridge / megatron: time {time_ratio:.3f}, peak memory {peak_ratio:.3f}")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
