"""The rows, most important first: `pytest -m gpu`, or run.sh beside this file.

A row's docstring is its description in docs/gpu.md. What runs on the device is in the modules beside this one, which
only the worker imports: they take seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu.session import Row
from gpu.settings import BATCH, CASES, LLAMA, SETTINGS, STEPS, TOLERANCES

pytestmark = pytest.mark.gpu

REFERENCES: dict[str, Any] = json.loads(Path(__file__).with_name("references.json").read_text())
TEXT = Path(__file__).parents[2] / "LICENSE"
WRAPPERS = {
    "distributed-optimizer": ("ddp", True),
    "megatron-fsdp": ("megatron-fsdp", False),
    "torch-fsdp2": ("torch-fsdp2", False),
}
TRAINING = [
    *("--steps", str(STEPS), "--text", str(TEXT)),
    *(word for name, size in BATCH.items() for word in (f"--{name.replace('_', '-')}", str(size))),
]


def compare(row: Row, found: dict[str, Sequence[float | None]], case: str) -> None:
    """Compare losses and gradient norms with those on the CPU, and judge."""
    tolerance, expected = TOLERANCES[case.rpartition("-")[2]], REFERENCES["training"][case]
    row.measure("loss difference", largest(found["losses"], expected["losses"]), at_most=tolerance.loss)
    norms = largest(found["grad_norms"], expected["grad_norms"])
    row.measure("gradient norm difference", norms, at_most=tolerance.grad_norm)
    row.judge()


def largest(values: Sequence[float | None], expected: Sequence[float | None]) -> float:
    """Return the largest relative difference; infinite where one of them is missing or not a number."""
    differences = [
        math.inf if value is None or other is None or math.isnan(value) else abs(value - other) / abs(other)
        for value, other in zip(values, expected, strict=True)
    ]
    return max(differences)


@pytest.mark.parametrize("case", CASES)
def test_family(row: Row, case: str) -> None:
    """Five steps of training on CUDA give the losses and gradient norms of the CPU."""
    model, _, precision = case.rpartition("-")
    compare(row, row.run("gpu.training:train_model", model, precision), case)


def test_launch(row: Row) -> None:
    """`bridge build` starts a rank on a GPU, which trains as the CPU does."""
    report = row.bridge("build", "tiny", *TRAINING, *on_cuda(row))
    assert report["device"] == ("cpu" if row.rehearsing else "cuda")
    compare(row, report, "tiny-fp32")


def on_cuda(row: Row) -> list[str]:
    return ["--device", "cpu" if row.rehearsing else "cuda"]


@pytest.mark.parametrize("case", [f"{wrapper}-{precision}" for precision in ("fp32", "bf16") for wrapper in WRAPPERS])
def test_wrapper(row: Row, case: str) -> None:
    """With every wrapper, on one device over NCCL, training gives the losses and gradient norms of DDP on the CPU."""
    name, _, precision = case.rpartition("-")
    found = row.run("gpu.training:train_model", "tiny", precision, (), *WRAPPERS[name])
    compare(row, found, f"tiny-{precision}")


@pytest.mark.parametrize("name", ["ddp", "recompute", "megatron-fsdp"])
def test_memory(row: Row, name: str) -> None:
    """What a 1B Llama holds at most, by `torch.cuda.max_memory_allocated`, is what `bridge plan` says, within 5 %.

    The plan leaves out temporary tensors within a layer and workspaces of kernels.
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
    """A 1B Llama takes at most 1.02 x the time and memory of megatron-core's own constructors and a plain loop.

    Both take turns in one process. `same-layers` gives them the layers that Bridge chooses without Transformer Engine,
    `own-layers` leaves megatron-core its local ones.
    """
    # Megatron's local attention keeps the scores of all pairs of places.
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
    row.measure("first loss, difference", largest([bridge["loss"]], [megatron["loss"]]), at_most=1e-2)
    row.judge()


@pytest.mark.parametrize("way", ["on-device", "meta-ddp", "meta-megatron-fsdp", "meta-torch-fsdp2"])
def test_initialisation(row: Row, way: str) -> None:
    """Weights that Megatron draws itself, on the device or after the meta device, start at the loss of a uniform guess.

    All are on the device when they are trained.
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
    """With `use_cpu_initialization` a model trains on the device."""
    overrides = ("transformer.use_cpu_initialization=true",)
    compare(row, row.run("gpu.training:train_model", "tiny", "fp32", overrides), "tiny-fp32")


def test_fp16(row: Row) -> None:
    """In fp16 with loss scaling, training gives the losses and gradient norms of the CPU."""
    compare(row, row.run("gpu.training:train_model", "tiny", "fp16"), "tiny-fp16")


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recompute(row: Row, granularity: str) -> None:
    """With activations computed again, training gives the losses and gradient norms of the CPU without."""
    overrides = [f"transformer.recompute_granularity={granularity}"]
    if granularity == "full":
        overrides += ["transformer.recompute_method=uniform", "transformer.recompute_num_layers=1"]
    compare(row, row.run("gpu.training:train_model", "tiny", "fp32", overrides), "tiny-fp32")


def test_verify(row: Row) -> None:
    """`bridge verify` on up to two GPUs finds every layout and wrapper equal to one process, or refuses it."""
    ranks = 1 if row.rehearsing else min(row.devices, 2)
    found = row.bridge("verify", "tiny", "--nproc", str(ranks), *TRAINING, *on_cuda(row), limit=150)
    for verdict in ("equal", "refused"):
        row.measure(verdict, sum(each["verdict"] == verdict for each in found))
    wrong = [each for each in found if each["verdict"] not in ("equal", "refused")]
    assert not wrong, "; ".join(f"{each['layout']}, {each['wrapper']}: {each['reason']}" for each in wrong)
    assert any(each["verdict"] == "equal" for each in found)


def test_plan(row: Row) -> None:
    """`bridge plan` beside a GPU says what it says elsewhere."""
    setting, expected = SETTINGS["ddp"], REFERENCES["plans"]["ddp"]
    sizes = ["--seq-length", str(setting.seq_length), "--global-batch-size", str(setting.global_batch_size)]
    (found,) = row.bridge("plan", LLAMA, *sizes)["stages"]
    for kind in ("weight_bytes", "gradient_bytes", "optimizer_bytes"):
        assert found[kind] == expected[kind]


def test_graphs_by_layer(row: Row) -> None:
    """With `cuda_graph_impl: local`, a CUDA graph for each layer, training gives the losses of the CPU."""
    row.needs_cuda()
    overrides = ("transformer.cuda_graph_impl=local", "transformer.use_te_rng_tracker=true")
    found = row.run("gpu.training:train_model", "tiny", "fp32", overrides, fresh=True)
    compare(row, found, "tiny-fp32")


def test_graph_of_a_step(row: Row) -> None:
    """With `cuda_graph_impl: full_iteration`, one CUDA graph for a step, training gives the losses of the CPU."""
    overrides = ("transformer.cuda_graph_impl=full_iteration", "transformer.use_te_rng_tracker=true")
    found = row.run("gpu.graphs:train_in_one_graph", "tiny", overrides, not row.rehearsing, fresh=True)
    compare(row, found, "tiny-fp32")


def test_modelopt(row: Row) -> None:
    """A model that ModelOpt quantised is rebuilt to the bit, and trains."""
    row.needs("nvidia-modelopt")
    found = row.run("gpu.quantised:rebuild_and_train", "tiny")
    row.measure("difference of logits", found["difference"], at_most=0)
    row.judge()
    assert found["losses"][1] < found["losses"][0]


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_two_devices(row: Row, layout: str) -> None:
    """On two GPUs over NCCL, training gives the losses and gradient norms of one process on the CPU."""
    if not row.rehearsing and row.devices < 2:
        pytest.skip("needs two devices")
    report = row.bridge("build", "tiny", "--nproc", "2", f"--{layout[:2]}", "2", *TRAINING, *on_cuda(row))
    compare(row, report, "tiny-fp32")


def test_te_layers(row: Row) -> None:
    """With Transformer Engine's layers, training in bf16 gives the losses and gradient norms of ours on the CPU."""
    row.needs("transformer-engine")
    compare(row, row.run("gpu.training:train_model", "tiny", "bf16", limit=120), "tiny-bf16")


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_te_fp8(row: Row, recipe: str) -> None:
    """With Transformer Engine's layers in FP8, training lowers the loss about as in bf16."""
    row.needs("transformer-engine")
    overrides = ("transformer.fp8=hybrid", f"transformer.fp8_recipe={recipe}")
    found = row.run("gpu.training:train_model", "tiny", "bf16", overrides, limit=120)
    difference = largest(found["losses"], REFERENCES["training"]["tiny-bf16"]["losses"])
    row.measure("loss difference", difference, at_most=0.02)
    row.judge()


def test_te_memory(row: Row) -> None:
    """What a layer of the Llama keeps for the backward pass: Transformer Engine's, and ours."""
    row.needs("transformer-engine")
    for implementation in ("transformer_engine", "local"):
        kept = row.run("gpu.te:layer_bytes", implementation, row.rehearsing)
        row.measure(f"{implementation}, MiB", kept / 2**20)


def test_mamba_scan(row: Row) -> None:
    """mamba-ssm's scan and its gradients are those of ours, in fp32 as its kernels multiply."""
    row.needs("mamba-ssm")
    found = row.run("gpu.te:compare_scans", limit=120)
    row.measure("times as fast", found.pop("speed-up"))
    for name, difference in found.items():
        row.measure(f"difference of {name}", difference, at_most=1e-2)
    row.judge()
