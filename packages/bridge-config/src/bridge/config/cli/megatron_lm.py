"""`bridge to-megatron-lm`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from bridge.config.cli.output import check_output, print_notes, write_output


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of all words.")
def to_megatron_lm(*, file: str, overrides: tuple[str, ...], output: Path | None, force: bool, as_json: bool) -> None:
    """Convert a GPT to arguments of Megatron-LM's pretrain_gpt.py, one a line, quoted for a shell.

    FILE is a .yaml, .yml or .json file, the name of a preset, a Hugging Face folder, or - for standard input.
    PATH=VALUE overrides a value, ~PATH removes one. Fields that no argument can express are errors, all reported at
    once by path.

    The arguments describe the model. Add those of the run, such as --micro-batch-size, --train-iters, --data-path and
    --tokenizer-type, and read the file with xargs:

    \b
        xargs -a model.args torchrun pretrain_gpt.py --micro-batch-size 1 ...
    """
    from bridge.config.documents.document import Document  # `bridge --help` loads this module
    from bridge.config.megatron_lm import to_megatron_lm as convert

    check_output(output, force=force)
    document = Document.load(file, overrides)
    with document.locate_problems():
        arguments = convert(document.data)
    print_notes(file, [*document.notes, *arguments.notes])
    if as_json:
        text = json.dumps([word for words in arguments.words for word in words], indent=2, ensure_ascii=False)
    else:
        text = "\n".join(shlex.join(words) for words in arguments.words)
    write_output(text, output)
