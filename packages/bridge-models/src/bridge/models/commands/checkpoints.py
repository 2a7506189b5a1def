"""`bridge import-hf`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder of the checkpoint.")
@click.option("--force", is_flag=True, help="Replace a checkpoint of this name.")
def import_hf(*, folder: Path, output: Path, force: bool) -> None:
    """Write the weights of a Hugging Face folder as a Megatron checkpoint, which loads under any layout.

    FOLDER holds config.json and safetensors files. The checkpoint is in megatron-core's format torch_dist; beside the
    weights it has the document, Megatron Bridge's run_config.yaml and the tokenizer's files. Tensors keep their
    precision. No model is held in memory.
    """
    from bridge.models.huggingface.checkpoint.import_folder import import_folder  # torch takes seconds to import

    for note in import_folder(folder, output, force=force):
        click.echo(f"{folder}: note: {note}", err=True)
    click.echo(f"{output}: a checkpoint of the weights in {folder}")
