"""Compare the cost of configurations with that of megatron.training: time and peak memory, as ratios.

    uv run python tests/benchmarks/config.py [ROUNDS]

The ways of a comparison take turns. Time is processor time, the median of the rounds. The peak of a process is its
resident memory, that of a call what Python allocated during it. Both sides hold the same TransformerConfig, of a
SwiGLU model in bf16; megatron.training gets hand-written hooks for data that JSON and YAML lack, and still loses
the activation and the initialisers.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import megatron.training.models.gpt as megatron_gpt
    from megatron.core.transformer.transformer_config import TransformerConfig

    from bridge.models.gpt import GPTModelConfig

STDLIB, IMPORT, VALIDATE, MEGATRON = (
    "stdlib imports",
    "import bridge.config",
    "bridge validate",
    "megatron.training import",
)


class Cost(NamedTuple):
    seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Comparison:
    """Costs of Bridge and of the baseline; the target is the highest ratio of times."""

    name: str
    bridge: list[Cost]
    baseline: list[Cost]
    target: float

    def format_row(self) -> str:
        """Return one line of the table."""
        (bridge, bridge_mib), (baseline, baseline_mib) = get_median(self.bridge), get_median(self.baseline)
        ratio = bridge / baseline
        verdict = "met" if ratio <= self.target else "not met"
        return (
            f"{self.name:40} {bridge * 1e3:9.2f} {baseline * 1e3:9.2f} {ratio:8.4f} {self.target:8.4f}  {verdict:7}"
            f" {bridge_mib:8.2f} {baseline_mib:8.2f} {bridge_mib / baseline_mib:7.3f}"
        )


HEADER = (
    f"{'':40} {'Bridge ms':>9} {'Megatron':>9} {'ratio':>8} {'target':>8}  {'':7}"
    f" {'Bridge':>8} {'Megatron':>8} {'ratio':>7}"
)


def get_median(costs: list[Cost]) -> Cost:
    return Cost(*(statistics.median(values) for values in zip(*costs, strict=True)))


def alternate(ways: Mapping[str, Callable[[], Cost]], rounds: int) -> dict[str, list[Cost]]:
    """Return the costs of each way; who goes first alternates, since what runs first finds colder caches."""
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in sorted(ways, reverse=turn % 2 == 1):
            costs[name].append(ways[name]())
    return costs


def compare_processes(document: Path, rounds: int) -> list[Comparison]:
    ways = {
        STDLIB: partial(run_process, "import dataclasses, importlib, typing, json, enum"),
        IMPORT: partial(run_process, "import bridge.config"),
        VALIDATE: partial(run_process, "from bridge.config.cli.entry import main; main()", "validate", str(document)),
        MEGATRON: partial(run_process, "import megatron.training.models.base", times=1),
    }
    alternate(ways, 1)  # compiles what has not been compiled
    costs = alternate(ways, rounds)
    return [
        Comparison("import bridge.config / standard library", costs[IMPORT], costs[STDLIB], 1.5),
        Comparison("import bridge.config / megatron.training", costs[IMPORT], costs[MEGATRON], 1 / 80),
        Comparison("bridge validate FILE / megatron.training import", costs[VALIDATE], costs[MEGATRON], 1 / 20),
    ]


def run_process(code: str, *args: str, times: int = 5) -> Cost:
    """Return the median cost of a Python process that runs `code`."""
    # What the system says about an ended process counts the peak of the one that started it, too.
    print_status = "import atexit; atexit.register(lambda: print(open('/proc/self/status').read()))"
    costs = []
    for _ in range(times):
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", f"{print_status}\n{code}", *args], stdout=output, stderr=output
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            printed = output.read()
        peak = re.search(r"^VmHWM:\s+(\d+) kB", printed, re.MULTILINE)
        if process.returncode or peak is None:
            raise RuntimeError(f"{code}: exit status {process.returncode}\n{printed}")
        costs.append(Cost(usage.ru_utime + usage.ru_stime, int(peak[1]) / 1024))
    return get_median(costs)


def compare_calls(rounds: int) -> list[Comparison]:
    import megatron.training.models.base
    import megatron.training.models.gpt
    import yaml

    from bridge.config import ModelConfig

    bridge, baseline = make_configs()
    bridge_data, baseline_data = bridge.as_dict(), baseline.as_dict()
    read, read_baseline = ModelConfig.from_dict, megatron.training.models.base.ModelConfig.from_dict
    # The keys of what was parsed are not the very strings that the classes have: keyword arguments take longer.
    parsed = json.loads(json.dumps(bridge_data))
    parsed_baseline = json.loads(json.dumps(baseline_data, default=to_plain), object_hook=from_plain)
    dumper, loader = make_yaml_classes()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"

        def json_bridge() -> object:
            return read(json.loads(json.dumps(bridge.as_dict())))

        def json_baseline() -> object:
            return read_baseline(json.loads(json.dumps(baseline.as_dict(), default=to_plain), object_hook=from_plain))

        def yaml_bridge() -> object:
            from bridge.config import Document, load_config

            file.write_text(Document.of(bridge).to_yaml())
            return load_config(file)

        def yaml_baseline() -> object:
            file.write_text(yaml.dump(baseline.as_dict(), Dumper=dumper))
            return read_baseline(yaml.load(file.read_text(), Loader=loader))

        return [
            compare_call("as_dict", bridge.as_dict, baseline.as_dict, 0.35, rounds),
            compare_call("from_dict", lambda: read(bridge_data), lambda: read_baseline(baseline_data), 0.60, rounds),
            compare_call(
                "from_dict of parsed JSON", lambda: read(parsed), lambda: read_baseline(parsed_baseline), 0.60, rounds
            ),
            compare_call("JSON text and back", json_bridge, json_baseline, 0.35, rounds),
            compare_call("YAML text and back", yaml_bridge, yaml_baseline, 1.0, rounds),
        ]


def compare_call(
    name: str, bridge: Callable[[], object], baseline: Callable[[], object], target: float, rounds: int
) -> Comparison:
    bridge(), baseline()  # whatever is done once is done
    costs = alternate({"bridge": partial(measure_calls, bridge), "baseline": partial(measure_calls, baseline)}, rounds)
    return Comparison(name, costs["bridge"], costs["baseline"], target)


def measure_calls(call: Callable[[], object], *, times: int = 10) -> Cost:
    """Return the mean time of `times` calls, and the peak memory of one more."""
    start = time.process_time()
    for _ in range(times):
        call()
    seconds = (time.process_time() - start) / times
    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return Cost(seconds, peak / 2**20)


def make_configs() -> tuple[GPTModelConfig, megatron_gpt.GPTModelConfig]:
    """Return a configuration of Bridge and one of megatron.training, with equal transformers."""
    import megatron.training.models.gpt as megatron_gpt

    from bridge.models.gpt import GPTModelConfig

    surroundings: dict[str, Any] = {
        "vocab_size": 128256,
        "seq_length": 8192,
        "position_embedding_type": "rope",
        "rotary_base": 500000,
        "rope_scaling": True,
    }
    return (
        GPTModelConfig(transformer=transformer(), **surroundings),
        megatron_gpt.GPTModelConfig(transformer=transformer(), **surroundings),
    )


def transformer() -> TransformerConfig:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        pipeline_dtype=torch.bfloat16,
        sequence_parallel=True,
    )


def to_plain(value: object) -> dict[str, str]:
    """Return a dtype or an enum member as a mapping, which megatron.training leaves to its users."""
    if isinstance(value, Enum):
        return {"_enum_": f"{type(value).__module__}:{type(value).__qualname__}", "member": value.name}
    return {"_dtype_": str(value).removeprefix("torch.")}


def from_plain(data: dict[str, Any]) -> Any:
    import pkgutil

    import torch

    if "_dtype_" in data:
        return getattr(torch, data["_dtype_"])
    return pkgutil.resolve_name(data["_enum_"])[data["member"]] if "_enum_" in data else data


def make_yaml_classes() -> tuple[type, type]:
    """Return a dumper and a loader, those of PyYAML in C, for the data of megatron.training."""
    import torch
    import yaml

    class Dumper(yaml.CSafeDumper):
        pass

    class Loader(yaml.CSafeLoader):
        pass

    def represent(dumper: Any, value: object) -> Any:
        return dumper.represent_mapping("!value", to_plain(value))

    def construct(loader: Any, node: Any) -> object:
        return from_plain(loader.construct_mapping(node))

    Dumper.add_representer(torch.dtype, represent)
    Dumper.add_multi_representer(Enum, represent)
    Loader.add_constructor("!value", construct)
    return Dumper, Loader


def main(rounds: str = "9") -> None:
    from bridge.config import Document

    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "model.yaml"
        document.write_text(Document.of(make_configs()[0]).to_yaml())
        found = compare_processes(document, int(rounds))
    found += compare_calls(int(rounds))
    print("\n".join([HEADER, *(comparison.format_row() for comparison in found)]))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
