"""Options of the commands that plan jobs. Importing this module imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from bridge.config import Document
from bridge.dist.document_layout import find_transformer
from bridge.dist.errors import PlanError
from bridge.dist.plan.forecast.machine import Machine, list_machines, load_machine
from bridge.dist.plan.layers import Layers
from bridge.dist.run.commands.options import (
    CHOSEN_WRAPPER,
    MICRO_BATCH_SIZE,
    SIZE,
    SIZES,
    STRATEGIES,
    WRAPPERS,
    CommandT,
    add_options,
)
from bridge.dist.wrapper import ShardingStrategy, Wrapper

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OptionsT = TypeVar("OptionsT", bound="DataclassInstance")


class _Bytes(click.ParamType):  # type: ignore[type-arg]  # click 8.2 has no type for it
    """A memory size: a number and a unit, such as 80GiB."""

    name = "size"
    _UNITS: ClassVar = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

    def __init__(self, *, allows_zero: bool = False) -> None:
        self._allows_zero = allows_zero

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert the text to bytes."""
        size = _read_amount(value, self._UNITS)
        if size is None or not (size or self._allows_zero):
            self.fail(f"{value!r} is not a memory size: write one such as 80GiB; units are {', '.join(self._UNITS)}")
        return size


def _read_amount(value: object, units: Mapping[str, int]) -> int | None:
    """Return the amount that a text of up to 15 digits and a unit says; None if it is something else."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", str(value))
    return None if found is None or found[2] not in units else int(float(found[1]) * units[found[2]])


_KEPT = (
    click.option(
        "--wrap",
        "wrapper",
        type=WRAPPERS,
        callback=lambda ctx, param, value: None if value is None else Wrapper(value),
        help="Data-parallel wrapper to keep; by default ddp, megatron-fsdp and torch-fsdp2 are tried.",
    ),
    click.option(
        "--distributed-optimizer/--no-distributed-optimizer",
        default=None,
        help="With ddp: whether to shard the optimizer state; by default both are tried.",
    ),
    click.option(
        "--sharding-strategy",
        type=STRATEGIES,
        callback=lambda ctx, param, value: None if value is None else ShardingStrategy(value),
        help="With megatron-fsdp: what to shard; by default all but no_shard are tried.",
    ),
    click.option("--micro-batch-size", type=SIZE, help="Samples per forward pass; by default 1, 2, 4 and 8 are tried."),
    click.option(
        "--fp8",
        "fp8_recipe",
        type=click.Choice(("tensorwise", "delayed", "blockwise", "mxfp8")),
        help="Also try FP8 with this recipe.",
    ),
)
_GIVEN = (
    click.option(
        "--global-batch-size",
        type=SIZE,
        help="Samples per step over all ranks; by default one microbatch per rank, with a pipeline two per stage.",
    ),
    click.option("--seq-length", type=SIZE, help="Tokens per sample; by default the model's seq_length."),
    click.option(
        "--gpu-memory",
        type=_Bytes(),
        help="Memory of a GPU, such as 80GiB; by default that of --machine. Exit code 1 if a rank needs more.",
    ),
    click.option(
        "--reserve",
        type=_Bytes(allows_zero=True),
        help="Memory of a GPU to keep free for the CUDA context, NCCL, workspaces and fragmentation; by "
        "default 4GiB, or 1GiB on one GPU.",
    ),
    click.option(
        "--layers",
        type=click.Choice([str(layers) for layers in Layers]),
        callback=lambda ctx, param, value: None if value is None else Layers(value),
        help="Layers to count: Transformer Engine's, which need not be installed, PyTorch's as on a GPU, or "
        "those that this machine would build without its GPUs; by default as the document's transformer_impl "
        "says.",
    ),
)


def add_plan_options(command: CommandT) -> CommandT:
    """Add an option for each field of ``PlanRequest`` to a command, except ``gpus`` and ``dp``."""
    return add_options(command, *SIZES, *CHOSEN_WRAPPER, MICRO_BATCH_SIZE, *_GIVEN)


def add_search_options(command: CommandT) -> CommandT:
    """Add the options of a search to a command: sizes and settings to keep, and what is given."""
    return add_options(command, *SIZES, *_KEPT, *_GIVEN)


MACHINE = f"{__name__}.machine"
"""The key of click's context for what was given to --machine: a name or a file."""


class _MachineType(click.ParamType):  # type: ignore[type-arg]  # click 8.2 has no type for it
    """A known machine, or a YAML file that describes one."""

    name = "machine"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Machine:
        """Look up or read the machine, and keep how it was given, for commands to print."""
        if ctx is not None:
            ctx.meta[MACHINE] = str(value)
        return load_machine(str(value))


class _MachineOption(click.Option):
    """An option whose help names the known machines. Their table takes 20 ms to read, so only this help reads it."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help."""
        self.help = (self.help or "").replace("{machines}", ", ".join(list_machines()))
        return super().get_help_record(ctx)


def add_machine_option(command: CommandT) -> CommandT:
    """Add the option for the machine to a command."""
    return click.option(
        "--machine",
        cls=_MachineOption,
        type=_MachineType(),
        default="h100",
        show_default=True,
        help="Machine to estimate times for: {machines}, or a YAML file with the same fields. Its memory is the "
        "default of --gpu-memory.",
    )(command)


def check_precision(document: Document, machine: Machine) -> None:
    """Check that the GPUs of a machine have FP8 if a document needs it.

    Raises:
        PlanError: They have none.
    """
    prefix, transformer = find_transformer(document)
    if transformer.get("fp8") and machine.fp8_flops is None:
        raise PlanError(
            f"{prefix}fp8: GPUs of {machine.name} have no FP8: choose another --machine, or set {prefix}fp8=null"
        )


class _Tokens(click.ParamType):  # type: ignore[type-arg]  # click 8.2 has no type for it
    """A number of tokens, such as 15T."""

    name = "tokens"
    _UNITS: ClassVar = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert the text to a number."""
        tokens = _read_amount(value, self._UNITS)
        if not tokens:
            self.fail(f"{value!r} is not a number of tokens: write one such as 15T; units are K, M, B and T")
        return tokens


class _Price(click.ParamType):  # type: ignore[type-arg]  # click 8.2 has no type for it
    """A price: a number above 0. The ranges of click accept NaN."""

    name = "price"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert the text to a number."""
        try:
            price = float(str(value))
        except ValueError:
            price = math.nan
        if not 0 < price < 1e12:
            self.fail(f"{value!r} is not a price: write a number above 0, such as 2.5")
        return price


TOKENS, PRICE = _Tokens(), _Price()


def make_from_options(kind: type[OptionsT], options: Mapping[str, Any]) -> OptionsT:
    """Return a dataclass filled from the options of the same names; those not given keep its defaults."""
    return kind(**{field.name: options[field.name] for field in fields(kind) if options.get(field.name) is not None})
