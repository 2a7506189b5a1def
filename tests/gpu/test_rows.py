"""Rows of the GPU suite, most important first; run them by `pytest -m gpu` or run.sh.

The docstring of a row is its description in docs/gpu.md. The code that runs on the device is in the other modules of
this folder. Only the worker imports them, because the imports take seconds.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu.session import Row
from gpu.settings import (
    BATCH,
    CASES,
    LLAMA,
    SETTINGS,
    STEPS,
    TE_STORAGE,
    TOLERANCES,
)

pytestmark = pytest.mark.gpu

REFERENCES: dict[str, Any] = json.loads(Path(__file__).with_name("references.json").read_text())
TEXT = Path(__file__).parents[2] / "LICENSE"
WRAPPERS = {
    "distributed-optimizer": ("ddp", True),
    "megatron-fsdp": ("megatron-fsdp", False),
    "torch-fsdp2": ("torch-fsdp2", False),
}
LAUNCHERS = {
    "bridge": [],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--no-python"],
}
TRAINING = [
    *("--steps", str(STEPS), "--text", str(TEXT)),
    *(word for name, size in BATCH.items() for word in (f"--{name.replace('_', '-')}", str(size))),
]


def compare(row: Row, found: dict[str, Sequence[float | None]], case: str) -> None:
    """Fail the row if losses or gradient norms differ too much from those on the CPU."""
    tolerance, expected = TOLERANCES[case.rpartition("-")[2]], REFERENCES["training"][case]
    row.measure("loss difference", find_largest_difference(found["losses"], expected["losses"]), at_most=tolerance.loss)
    norms = find_largest_difference(found["grad_norms"], expected["grad_norms"])
    row.measure("gradient norm difference", norms, at_most=tolerance.grad_norm)
    row.judge()


def find_largest_difference(values: Sequence[float | None], expected: Sequence[float | None]) -> float:
    """Return the largest relative difference; infinity if a value is missing or NaN."""
    differences = [
        math.inf if value is None or other is None or math.isnan(value) else abs(value - other) / abs(other)
        for value, other in zip(values, expected, strict=True)
    ]
    return max(differences)


@pytest.mark.parametrize("case", CASES)
def test_family(row: Row, case: str) -> None:
    """Training on CUDA for five steps gives the same losses and gradient norms as on the CPU."""
    model, _, precision = case.rpartition("-")
    compare(row, row.run("gpu.training:train_model", model, precision), case)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launch(row: Row, launcher: str) -> None:
    """A rank that `bridge build` or torchrun starts on a GPU gives the same losses and gradient norms as on the CPU."""
    report = row.bridge("build", "tiny", *TRAINING, *get_device_option(row), launcher=LAUNCHERS[launcher])
    assert report["device"] == ("cpu" if row.rehearsing else "cuda")
    compare(row, report, "tiny-fp32")


def get_device_option(row: Row) -> list[str]:
    """Return the command-line option that selects the GPU; the CPU in a rehearsal."""
    return ["--device", "cpu" if row.rehearsing else "cuda"]


@pytest.mark.parametrize("case", [f"{wrapper}-{precision}" for precision in ("fp32", "bf16") for wrapper in WRAPPERS])
def test_wrapper(row: Row, case: str) -> None:
    """Each wrapper on one GPU with NCCL gives the same losses and gradient norms as DDP on the CPU."""
    name, _, precision = case.rpartition("-")
    found = row.run("gpu.training:train_model", "tiny", precision, (), *WRAPPERS[name])
    compare(row, found, f"tiny-{precision}")


@pytest.mark.parametrize("name", ["ddp", "recompute", "megatron-fsdp"])
def test_memory(row: Row, name: str) -> None:
    """The peak memory of a 1B Llama is within 5 % of what `bridge plan` predicts.

    The peak is measured by `torch.cuda.max_memory_allocated`. The plan does not count temporary tensors within a layer
    and kernel workspaces.
    """
    plan = REFERENCES["plans"][name]
    held = row.run("gpu.llama:measure_memory", name, row.rehearsing)
    static = plan["weight_bytes"] + plan["gradient_bytes"]
    for figure, planned, measured in (
        ("weights and gradients", static, held["built"]),
        ("with optimizer", static + plan["optimizer_bytes"], held["between_steps"]),
        ("at most", plan["total_bytes"], held["peak"]),
    ):
        row.measure(f"{figure}, planned GiB", planned / 2**30)
        row.measure(f"{figure}, GiB", measured / 2**30)
    difference = abs(held["peak"] / plan["total_bytes"] - 1)
    row.measure("difference", difference, at_most=None if row.rehearsing else 0.05)
    row.judge()


@pytest.mark.parametrize("layers", ["same-layers", "own-layers"])
def test_speed(row: Row, layers: str) -> None:
    """A 1B Llama needs at most 1.02 times the step time and memory of a training loop written with megatron-core alone.

    Both run alternately in one process. In `same-layers` both use the layers that Bridge chooses without Transformer
    Engine. In `own-layers` megatron-core uses its local layers.
    """
    # megatron-core's local attention stores the scores of all pairs of positions, so its sequences are shorter.
    name = "ddp" if layers == "same-layers" else "short"
    sides = row.run("gpu.llama:measure_speed", name, layers == "own-layers", row.rehearsing, limit=90)
    setting, flops = SETTINGS[name], REFERENCES["plans"][name]["flops"]
    peak = row.run("bridge.dist.train.flops:find_peak_flops", row.device)
    for side, found in sides.items():
        row.measure(f"{side}, tokens/s", setting.global_batch_size * setting.seq_length / found["step_seconds"])
        row.measure(f"{side}, GiB", found["peak"] / 2**30)
        if peak is not None:
            row.measure(f"{side}, model-FLOPs utilisation", flops / found["step_seconds"] / peak)
    bridge, megatron = sides["bridge"], sides["megatron"]
    if not row.rehearsing:
        row.measure("time, ratio", bridge["step_seconds"] / megatron["step_seconds"], at_most=1.02)
        row.measure("memory, ratio", bridge["peak"] / megatron["peak"], at_most=1.02)
    row.measure("first loss, difference", find_largest_difference([bridge["loss"]], [megatron["loss"]]), at_most=1e-2)
    row.judge()


@pytest.mark.parametrize("way", ["on-device", "meta-ddp", "meta-megatron-fsdp", "meta-torch-fsdp2"])
def test_initialisation(row: Row, way: str) -> None:
    """megatron-core's initialisation, on the GPU or from the meta device, gives the first loss of a uniform guess.

    All parameters are on the GPU after training.
    """
    on_meta = way.startswith("meta-")
    overrides = ("transformer.init_model_with_meta_device=true",) if on_meta else ()
    wrapper = way.removeprefix("meta-") if on_meta else "ddp"
    found = row.run("gpu.training:train_as_initialised", "tiny", overrides, wrapper)
    device = "cpu" if row.rehearsing else "cuda"
    assert ("meta" if on_meta else device) in found["built_on"]
    assert found["trained_on"] == [device]
    assert found["losses"][-1] < found["losses"][0]
    row.measure("first loss, from uniform", abs(found["losses"][0] - math.log(256)), at_most=0.2)
    row.judge()


def test_cpu_initialisation(row: Row) -> None:
    """A model initialised with `use_cpu_initialization` gives the same losses and gradient norms on the GPU."""
    overrides = ("transformer.use_cpu_initialization=true",)
    compare(row, row.run("gpu.training:train_model", "tiny", "fp32", overrides), "tiny-fp32")


def test_fp16(row: Row) -> None:
    """Training in fp16 with loss scaling gives the same losses and gradient norms as on the CPU."""
    compare(row, row.run("gpu.training:train_model", "tiny", "fp16"), "tiny-fp16")


@pytest.mark.parametrize("wrapper", ["ddp", *WRAPPERS])
def test_checkpoint(row: Row, wrapper: str) -> None:
    """Training that goes on from a checkpoint gives the losses and gradient norms of training that never stopped."""
    options = WRAPPERS.get(wrapper, (wrapper, False))
    compare(row, row.run("gpu.saving:train_in_two_parts", "tiny", *options), "tiny-fp32")


@pytest.mark.parametrize(
    ("model", "wrapper"),
    [("tiny", "ddp"), ("moe-tiny", "ddp"), ("tiny", "megatron-fsdp"), ("tiny", "torch-fsdp2")],
)
def test_folder(row: Row, model: str, wrapper: str) -> None:
    """Weights saved as a folder of transformers and loaded again give the losses and gradient norms of the CPU."""
    compare(row, row.run("gpu.saving:train_from_folder", model, wrapper), f"{model}-fp32")


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recompute(row: Row, granularity: str) -> None:
    """Activation recomputation gives the same losses and gradient norms as the CPU without it."""
    overrides = [f"transformer.recompute_granularity={granularity}"]
    if granularity == "full":
        overrides += ["transformer.recompute_method=uniform", "transformer.recompute_num_layers=1"]
    compare(row, row.run("gpu.training:train_model", "tiny", "fp32", overrides), "tiny-fp32")


def test_verify(row: Row) -> None:
    """`bridge verify` on up to two GPUs reports every layout and wrapper as equal to one process or as refused."""
    ranks = 1 if row.rehearsing else min(row.devices, 2)
    found = row.bridge("verify", "tiny", "--nproc", str(ranks), *TRAINING, *get_device_option(row), limit=150)
    for verdict in ("equal", "refused"):
        row.measure(verdict, sum(each["verdict"] == verdict for each in found))
    wrong = [each for each in found if each["verdict"] not in ("equal", "refused")]
    assert not wrong, "; ".join(f"{each['layout']}, {each['wrapper']}: {each['reason']}" for each in wrong)
    assert any(each["verdict"] == "equal" for each in found)


def test_plan(row: Row) -> None:
    """`bridge plan` reports the same bytes on a machine with a GPU as on one without."""
    setting, expected = SETTINGS["ddp"], REFERENCES["plans"]["ddp"]
    sizes = ["--seq-length", str(setting.seq_length), "--global-batch-size", str(setting.global_batch_size)]
    (found,) = row.bridge("plan", LLAMA, *sizes)["stages"]
    for kind in ("weight_bytes", "gradient_bytes", "optimizer_bytes"):
        assert found[kind] == expected[kind]


def test_graphs_by_layer(row: Row) -> None:
    """One CUDA graph per layer (`cuda_graph_impl: local`) gives the losses and gradient norms of the CPU."""
    row.needs_cuda()
    overrides = ("transformer.cuda_graph_impl=local", "transformer.use_te_rng_tracker=true")
    found = row.run("gpu.training:train_model", "tiny", "fp32", overrides)
    compare(row, found, "tiny-fp32")


def test_graph_of_a_step(row: Row) -> None:
    """One CUDA graph per step (`cuda_graph_impl: full_iteration`) gives the losses and gradient norms of the CPU."""
    overrides = ("transformer.cuda_graph_impl=full_iteration", "transformer.use_te_rng_tracker=true")
    found = row.run("gpu.graphs:train_in_one_graph", "tiny", overrides, not row.rehearsing)
    compare(row, found, "tiny-fp32")


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_two_devices(row: Row, layout: str) -> None:
    """Training on two GPUs with NCCL gives the same losses and gradient norms as one process on the CPU."""
    if not row.rehearsing and row.devices < 2:
        pytest.skip("needs two devices")
    report = row.bridge("build", "tiny", "--nproc", "2", f"--{layout[:2]}", "2", *TRAINING, *get_device_option(row))
    compare(row, report, "tiny-fp32")


def test_modelopt(row: Row) -> None:
    """A model quantised by ModelOpt is restored with bitwise equal logits and can be trained."""
    row.needs("nvidia-modelopt")
    # On the first GPU, ModelOpt compiles its kernels: with nvcc this takes a minute or two.
    found = row.run("gpu.quantised:rebuild_and_train", "tiny", limit=240)
    row.measure("difference of logits", found["difference"], at_most=0)
    row.judge()
    assert found["losses"][1] < found["losses"][0]


def test_te_layers(row: Row) -> None:
    """Transformer Engine's layers in bf16 give the same losses and gradient norms as Bridge's layers on the CPU."""
    row.needs("transformer-engine")
    compare(row, row.run("gpu.training:train_model", "tiny", "bf16", limit=120), "tiny-bf16")


@pytest.mark.parametrize("case", ["delayed", "tensorwise", "tensorwise-weights"])
def test_te_fp8(row: Row, case: str) -> None:
    """Transformer Engine's layers in FP8 give losses within 2 % of those in bf16 on the CPU.

    In the last row the weights are in FP8 too, and a distributed optimizer updates them.
    """
    row.needs("transformer-engine")
    recipe, _, weights = case.partition("-")
    overrides = ["transformer.fp8=hybrid", f"transformer.fp8_recipe={recipe}"]
    if weights:
        overrides.append("transformer.fp8_param=true")
    found = row.run("gpu.training:train_model", "tiny", "bf16", overrides, "ddp", bool(weights), limit=120)
    difference = find_largest_difference(found["losses"], REFERENCES["training"]["tiny-bf16"]["losses"])
    row.measure("loss difference", difference, at_most=0.02)
    row.judge()


@pytest.mark.parametrize("storage", TE_STORAGE)
def test_te_memory(row: Row, storage: str) -> None:
    """A layer of a 1B Llama of Transformer Engine holds and keeps within 2 % of the bytes that `bridge plan` models.

    It holds weights, their copies in FP8, and gradients; it keeps activations for the backward pass. The first row also
    shows what Bridge's layers keep.
    """
    row.needs_cuda()
    row.needs("transformer-engine")
    if storage == "mxfp8":
        row.needs_capability(10)
    found = row.run("gpu.te:measure_layer", storage, limit=120)
    for kind, modelled in REFERENCES["te_layers"][storage].items():
        row.measure(f"{kind}, modelled MiB", modelled / 2**20)
        row.measure(f"{kind}, MiB", found[kind] / 2**20)
        row.measure(f"{kind}, difference", abs(found[kind] / modelled - 1), at_most=0.02)
    if storage == "bf16":
        local = row.run("gpu.te:measure_layer", storage, "local")
        row.measure("kept by Bridge's layers, MiB", local["kept"] / 2**20)
    row.judge()


def test_mamba_scan(row: Row) -> None:
    """mamba-ssm's scan and its gradients equal those of Bridge's scan, within the precision of its kernels."""
    row.needs("mamba-ssm")
    found = row.run("gpu.te:compare_scans", limit=200)  # its kernels have 120 variants, which Triton compiles and times
    row.measure("times as fast", found.pop("speed-up"))
    for name, difference in found.items():
        row.measure(f"difference of {name}", difference, at_most=1e-2)
    row.judge()
