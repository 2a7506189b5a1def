"""Write small folders of weights, and read all of their parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_weights import Weights
from safetensors.torch import save_file

from bridge.models.huggingface.folder.folder import Folder
from bridge.models.huggingface.transfer.tensors import TensorReader


def write(folder: Path, config: dict[str, Any], *files: Weights) -> Path:
    """Write a folder with these tensors, in one file or in shards with an index."""
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for name, tensors in zip(names if len(files) > 1 else ["model.safetensors"], files, strict=True):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    if len(files) > 1:
        listed = {key: name for name, tensors in zip(names, files, strict=True) for key in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def read_weights(folder: Folder) -> Weights:
    """Read all parameters of the whole model."""
    reader = TensorReader()

    def read(name: str) -> torch.Tensor:
        weight, parts = folder.match.weights[name]
        rows = [reader.read(folder.stored[part.tensor], part, part.rows, slice(None)).clone() for part in parts]
        return torch.cat(rows) * weight.factor

    return {name: read(name) for name, (_, parts) in folder.match.weights.items() if parts}
