"""Options shared by several commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from bridge.config import ModelConfig
from bridge.config.cli.output import check_output
from bridge.dist.checkpoint.tokenizer import find_tokenizer_folder
from bridge.dist.errors import TrainingError
from bridge.dist.run.devices import Device
from bridge.dist.run.origin import Origin
from bridge.dist.train.batch import Batch
from bridge.dist.wrapper import ShardingStrategy, Wrapper

if TYPE_CHECKING:
    from bridge.dist.checks.preflight import Setup
    from bridge.dist.train.step import TrainOptions

CommandT = TypeVar("CommandT", bound=Callable[..., object])

SIZE = click.IntRange(min=1)
LOCAL_RANKS = click.IntRange(1, 1024)  # each takes hundreds of megabytes; a hundred thousand would start for minutes
WRAPPERS = click.Choice([wrapper.value for wrapper in Wrapper])
STRATEGIES = click.Choice([strategy.value for strategy in ShardingStrategy])
_LONGEST_DEFAULT_SAMPLE = 128  # tokens

device_option = click.option(
    "--device",
    type=click.Choice([device.value for device in Device]),
    default=Device.AUTO.value,
    show_default=True,
    help="Device of the ranks. auto: one GPU per rank if the machine has enough GPUs, else the CPU.",
)

SIZES = (
    click.option("--tp", type=SIZE, help="Tensor-parallel size."),
    click.option("--pp", type=SIZE, help="Pipeline-parallel size."),
    click.option("--vp", type=SIZE, help="Virtual pipeline stages per rank."),
    click.option("--cp", type=SIZE, help="Context-parallel size."),
    click.option("--ep", type=SIZE, help="Expert-parallel size."),
    click.option("--etp", type=SIZE, help="Expert-tensor-parallel size; by default the value of --tp."),
)
CHOSEN_WRAPPER = (
    click.option(
        "--wrap",
        "wrapper",
        type=WRAPPERS,
        default=Wrapper.DDP.value,
        show_default=True,
        callback=lambda ctx, param, value: Wrapper(value),
        help="Data-parallel wrapper.",
    ),
    click.option("--distributed-optimizer", is_flag=True, help="With ddp: shard the optimizer state."),
    click.option(
        "--sharding-strategy",
        type=STRATEGIES,
        callback=lambda ctx, param, value: None if value is None else ShardingStrategy(value),
        help="With megatron-fsdp: shard nothing, the optimizer state, also gradients, or also weights.  [default: "
        f"{ShardingStrategy.OPTIM_GRADS_PARAMS}]",
    ),
)
MICRO_BATCH_SIZE = click.option(
    "--micro-batch-size", type=SIZE, default=1, show_default=True, help="Samples per forward pass."
)
_ORIGIN = (
    click.option(
        "--load",
        type=click.Path(path_type=Path),
        help="Start from the weights of this Hugging Face folder, continue from this Megatron checkpoint, or restore "
        "the weights and the ModelOpt state of this checkpoint. The kind is detected from the files in it; for a file "
        "that ModelOpt saved, also set restore_modelopt_state=true.",
    ),
    click.option(
        "--random-init", is_flag=True, help="With a folder as FILE: draw the weights instead of loading them."
    ),
)
_TRAINING = (
    click.option(
        "--text",
        type=click.Path(path_type=Path),
        help="Text file to train on; by default a built-in sample text. If a folder or checkpoint is loaded, its "
        "tokenizer turns the text into tokens; otherwise each byte is a token.",
    ),
    click.option(
        "--global-batch-size", type=SIZE, default=8, show_default=True, help="Samples per step over all ranks."
    ),
    MICRO_BATCH_SIZE,
    click.option(
        "--seq-length",
        type=SIZE,
        help=f"Tokens per sample; by default the model's seq_length, at most {_LONGEST_DEFAULT_SAMPLE}.",
    ),
)


def add_options(command: CommandT, *options: Callable[[CommandT], CommandT]) -> CommandT:
    """Add options to a command, in the order of its help."""
    for option in reversed(options):
        command = option(command)
    return command


def add_size_options(command: CommandT) -> CommandT:
    """Add the options for the sizes of parallelism to a command."""
    return add_options(command, *SIZES)


def add_layout_options(command: CommandT) -> CommandT:
    """Add the options for the sizes of parallelism and the wrapper to a command."""
    return add_options(command, *SIZES, *CHOSEN_WRAPPER)


def check_sharding_strategy(wrapper: Wrapper | None, strategy: ShardingStrategy | None) -> None:
    """Check that a strategy is given with Megatron-FSDP only, or while the wrapper is to be searched.

    Raises:
        UsageError: There is another wrapper.
    """
    if strategy is not None and wrapper not in (None, Wrapper.MEGATRON_FSDP):
        raise click.UsageError(
            f"--sharding-strategy needs --wrap {Wrapper.MEGATRON_FSDP}, not {wrapper}: change the wrapper, or leave "
            "the strategy out"
        )


def add_origin_options(command: CommandT) -> CommandT:
    """Add the options for the origin of the weights to a command."""
    return add_options(command, *_ORIGIN)


def add_training_options(command: CommandT) -> CommandT:
    """Add the options for training data and batch sizes to a command."""
    return add_options(command, *_TRAINING)


def check_batch(setup: Setup, *, seq_length: int | None, global_batch_size: int, micro_batch_size: int) -> None:
    """Check that the batch of a command divides over the ranks of a layout.

    Raises:
        TrainingError: It does not.
    """
    batch = Batch(
        seq_length=seq_length or choose_sample_length(setup.model),
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
    )
    batch.check(setup.transformer, setup.layout)


def make_train_options(
    config: ModelConfig,
    steps: int,
    text: Path | None,
    seq_length: int | None,
    global_batch_size: int,
    micro_batch_size: int,
    *,
    origin: Origin,
) -> TrainOptions:
    """Return the training options of a command; the sample length and the text have defaults.

    The tokenizer is that of the folder or checkpoint that the model comes from.
    """
    from bridge.dist.train.step import TrainOptions
    from bridge.dist.train.text import find_default_text  # imports torch, which `bridge -h` must not wait for

    folder = find_tokenizer_folder(origin.weights, origin.checkpoint)
    return TrainOptions(
        steps=steps,
        text=text or find_default_text(),
        tokenizer=None if folder is None else _find_tokenizer(folder),
        seq_length=seq_length or choose_sample_length(config),
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
    )


def choose_sample_length(config: ModelConfig | None) -> int:
    """Return the default length of samples: that of a model's sequences, or less, to keep steps on a CPU short."""
    return min(getattr(config, "seq_length", None) or _LONGEST_DEFAULT_SAMPLE, _LONGEST_DEFAULT_SAMPLE)


def _find_tokenizer(folder: Path) -> Path | None:
    """Return the tokenizer of a folder; None if it has none.

    Raises:
        TrainingError: It has one, and the package that reads it is not installed.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    if find_spec("tokenizers") is None:
        raise TrainingError(f"{file} needs the package tokenizers: pip install 'bridge-dist[tokenizers]'")
    return file


class CommandKeepingArguments(click.Command):
    """A command that keeps its arguments as they were given, for ``format_command``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments, and parse them."""
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


_ARGUMENTS = f"{__name__}.arguments"


def format_command() -> str:
    """Return the command line of the running command, as it can be pasted into a shell."""
    ctx = click.get_current_context()
    return shlex.join([*ctx.command_path.split(), *ctx.meta[_ARGUMENTS]])


def add_html_option(command: CommandT) -> CommandT:
    """Add the option --html to a command; it needs the packages of an extra."""
    return click.option(
        "--html",
        type=click.Path(path_type=Path, dir_okay=False),
        callback=_check_page,
        help="Write an HTML page with charts to this file.",
    )(command)


def _check_page(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    missing = [name for name in ("bokeh", "jinja2") if find_spec(name) is None]
    if value is not None and missing:
        raise click.UsageError(f"--html needs {' and '.join(missing)}: pip install 'bridge-dist[page]'")
    check_output(value, force=True)  # before the work that the page shows
    return value
