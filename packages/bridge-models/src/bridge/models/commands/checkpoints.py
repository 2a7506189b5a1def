"""`bridge import-hf` and `bridge export-hf`."""

from __future__ import annotations

from pathlib import Path

import click

from bridge.config import Document
from bridge.config.cli.output import print_notes
from bridge.dist.process.imports import import_megatron
from bridge.dist.run.devices import hide_gpus


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder of the checkpoint.")
@click.option("--force", is_flag=True, help="Replace a checkpoint of this name.")
def import_hf(*, folder: Path, output: Path, force: bool) -> None:
    """Write the weights of a Hugging Face folder as a Megatron checkpoint, which loads under any layout.

    FOLDER holds config.json and safetensors files, or is a repository in the Hugging Face cache (org/name). The
    checkpoint is in megatron-core's format torch_dist; beside the weights it has the document, Megatron Bridge's
    run_config.yaml and the tokenizer's files. Tensors keep their precision. No model is held in memory.
    """
    _import_megatron()
    from bridge.models.huggingface.checkpoint.import_folder import import_folder  # torch takes seconds to import

    print_notes(folder, import_folder(folder, output, force=force))
    click.echo(f"{output}: a checkpoint of the weights in {folder}")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--config", metavar="FILE", help="The document of the model, if the checkpoint has none.")
@click.option("--force", is_flag=True, help="Replace a Hugging Face folder of this name.")
def export_hf(*, checkpoint: Path, output: Path, config: str | None, force: bool) -> None:
    """Write the weights of a Megatron checkpoint as a Hugging Face folder: config.json and safetensors files.

    CHECKPOINT is in megatron-core's format torch_dist, saved under any layout. Its latest iteration is read; nothing in
    it is run. The model is that of its document, which `bridge build --save` and `bridge import-hf` write, or of
    Megatron Bridge's run_config.yaml, or of --config. No model is held in memory.
    """
    _import_megatron()
    from bridge.models.huggingface.checkpoint.export_folder import export_folder  # torch takes seconds to import

    document = None
    if config is not None:
        document = Document.load(config)
        document.migrate()
    print_notes(checkpoint, export_folder(checkpoint, output, document=document, force=force))
    click.echo(f"{output}: the weights in {checkpoint}")


def _import_megatron() -> None:
    """Import megatron-core for a model without memory, which a visible GPU would prevent."""
    hide_gpus()
    import_megatron(with_compiler=False)
