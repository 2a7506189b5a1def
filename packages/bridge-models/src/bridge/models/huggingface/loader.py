"""Load the weights of Hugging Face folders, and run transformers on them, for `bridge build` and `bridge verify`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bridge.dist.errors import ComparisonError
from bridge.models.huggingface.folder.folder import open_folder

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import MegatronModule


_REFERENCE = "bridge.models.huggingface.reference"
_LONGEST_S = 1800


class FolderLoader:
    """The ``bridge.loaders`` entry point of folders with a config.json."""

    def check(self, folder: Path) -> list[str]:
        """Check that the tensors of a folder are those of its config.json."""
        return open_folder(folder).notes

    def load(self, stages: Sequence[MegatronModule], folder: Path, pg_collection: ProcessGroupCollection) -> None:
        """Load the weights into the stages of this rank."""
        from bridge.models.huggingface.transfer.load import load_weights  # torch, which `check` does without

        load_weights(stages, folder, pg_collection)

    def compute_logits(self, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of transformers, which runs in a process of its own, for half an hour at most."""
        import torch

        if find_spec("transformers") is None:
            raise ComparisonError("transformers is not installed: pip install transformers")
        with TemporaryDirectory() as temporary:
            given, computed = Path(temporary, "tokens.pt"), Path(temporary, "logits.pt")
            torch.save(tokens, given)
            command = [sys.executable, "-m", _REFERENCE, str(folder), str(given), str(computed)]
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
            try:
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=False, timeout=_LONGEST_S
                )
            except subprocess.TimeoutExpired:
                raise ComparisonError(f"transformers has not computed them in {_LONGEST_S / 60:.0f} minutes") from None
            if done.returncode:
                reason = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
                raise ComparisonError(f"transformers cannot run the model: {reason}")
            logits: torch.Tensor = torch.load(computed, weights_only=True)
        return logits


LOADER = FolderLoader()
