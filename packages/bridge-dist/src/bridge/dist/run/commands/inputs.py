"""What `bridge build` and `bridge verify` are given: a document, and the weights or checkpoint to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from bridge.config import Document
from bridge.config.cli.output import print_notes
from bridge.config.documents.hub_cache import resolve_repository
from bridge.dist.loaders import check_weights
from bridge.dist.run.origin import Origin, request_restore


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The document FILE and the folder of --load."""

    file: str
    document: Document
    load: Path | None
    notes: Sequence[str]
    """Notes about FILE."""

    is_quiet: bool
    """Whether another rank prints notes."""

    def check_weights(self, origin: Origin) -> None:
        """Check the weights of an origin before anything is built, and print notes about them.

        Raises:
            BridgeError: They cannot be loaded.
        """
        if origin.weights is not None:
            found = check_weights(origin.weights, is_file=self.load is None)
            self.print_notes([note for note in found if note not in self.notes])

    def print_notes(self, notes: Sequence[str]) -> None:
        """Print notes about the weights, unless another rank does."""
        if not self.is_quiet:
            print_notes(self.load or self.file, notes)


def read_inputs(
    file: str, overrides: Sequence[str], load: Path | None, *, random_init: bool, is_quiet: bool = False
) -> Inputs:
    """Read FILE, find --load in the cache if it names a repository, and print notes about both.

    Raises:
        UsageError: --load and --random-init are both given.
        BridgeError: FILE or a checkpoint cannot be read.
    """
    if load is not None and random_init:
        raise click.UsageError("--load and --random-init exclude each other: give one of them")
    load = None if load is None else Path(resolve_repository(str(load)))
    document = Document.load(file, overrides)
    notes = document.migrate()  # before a layout is written in the current form
    if not is_quiet:
        print_notes(file, notes)
    inputs = Inputs(file=file, document=document, load=load, notes=notes, is_quiet=is_quiet)
    inputs.print_notes(request_restore(document, load))
    return inputs
