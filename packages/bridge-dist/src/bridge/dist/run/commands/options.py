"""Options shared by several commands."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from bridge.config import ModelConfig
from bridge.dist.errors import TrainingError
from bridge.dist.run.devices import Device
from bridge.dist.wrapper import Wrapper

if TYPE_CHECKING:
    from bridge.dist.train.step import TrainOptions

CommandT = TypeVar("CommandT", bound=Callable[..., object])

WRAPPERS = tuple(wrapper.value for wrapper in Wrapper)
SIZE = click.IntRange(min=1)
_LONGEST_DEFAULT_SAMPLE = 128  # tokens; keeps steps on a CPU short

device_option = click.option(
    "--device",
    type=click.Choice([device.value for device in Device]),
    default=Device.AUTO.value,
    show_default=True,
    help="Device of the ranks. auto: one GPU per rank if the machine has enough GPUs, else the CPU.",
)


def add_training_options(command: CommandT) -> CommandT:
    """Add the options for training data and batch sizes to a command."""
    for option in (
        click.option(
            "--seq-length",
            type=SIZE,
            help=f"Tokens per sample; by default the model's seq_length, at most {_LONGEST_DEFAULT_SAMPLE}.",
        ),
        click.option("--micro-batch-size", type=SIZE, default=1, show_default=True, help="Samples per forward pass."),
        click.option(
            "--global-batch-size", type=SIZE, default=8, show_default=True, help="Samples per step over all ranks."
        ),
        click.option(
            "--text",
            type=click.Path(path_type=Path),
            help="Text file to train on; by default a built-in sample text. If weights are loaded from a folder, its "
            "tokenizer turns the text into tokens; otherwise each byte is a token.",
        ),
    ):
        command = option(command)
    return command


def make_train_options(
    config: ModelConfig,
    steps: int,
    text: Path | None,
    seq_length: int | None,
    global_batch_size: int,
    micro_batch_size: int,
    *,
    weights: Path | None = None,
) -> TrainOptions:
    """Return the training options of a command; the sample length and the text have defaults.

    The tokenizer is that of the folder that ``weights`` are loaded from.
    """
    from bridge.dist.train.step import TrainOptions
    from bridge.dist.train.text import find_default_text  # imports torch, which `bridge -h` must not wait for

    longest = min(getattr(config, "seq_length", _LONGEST_DEFAULT_SAMPLE), _LONGEST_DEFAULT_SAMPLE)
    return TrainOptions(
        steps=steps,
        text=text or find_default_text(),
        tokenizer=None if weights is None else _find_tokenizer(weights),
        seq_length=seq_length or longest,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
    )


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
