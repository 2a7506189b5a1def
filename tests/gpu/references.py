#!/usr/bin/env python3
"""Write references.json: the expected results of the rows, computed on the CPU.

    uv run python tests/gpu/references.py

It holds the losses and gradient norms of every model, the fingerprint of its document, the plan of every Llama setting,
and what a layer of Transformer Engine is modelled to hold and keep.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[0] = str(HERE.parent)  # replaces this folder, whose modules would hide others of the same names
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from gpu.llama import plan_memory  # noqa: E402
from gpu.settings import CASES, LLAMA, SETTINGS, TE_STORAGE, list_te_overrides  # noqa: E402
from gpu.training import train_model  # noqa: E402

from bridge.config import Document  # noqa: E402


def train_case(case: str) -> dict[str, Any]:
    """Return the losses and gradient norms of a model in a precision, with the fingerprint of its document."""
    model, _, precision = case.rpartition("-")
    return {"fingerprint": Document.load(model).fingerprint(), **train_model(model, precision)}


def plan_te_layer(storage: str) -> dict[str, int]:
    """Return the bytes that a layer of the Llama holds and keeps with Transformer Engine's layers.

    They are the difference between four layers and two. `bridge plan` models these layers in a process of its own.
    """
    few, more = (_plan_te_model(storage, layers) for layers in (2, 4))
    return {kind: (more[kind] - few[kind]) // 2 for kind in few}


def _plan_te_model(storage: str, layers: int) -> dict[str, int]:
    options = ["--global-batch-size", "1", "--layers", "transformer-engine", "--json"]
    command = [Path(sys.executable).with_name("bridge"), "plan", LLAMA, *list_te_overrides(storage, layers), *options]
    (stage,) = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["stages"]
    return {
        "held": stage["weight_bytes"] + stage["gradient_bytes"],
        "kept": stage["chunks"][0]["activation_bytes"],
    }


def main() -> None:
    """Write the file."""
    references = {
        "made_with": {name: importlib.metadata.version(name) for name in ("megatron-core", "torch")},
        "training": {case: train_case(case) for case in [*CASES, "tiny-fp16"]},
        "plans": {name: plan_memory(name) for name in SETTINGS},
        "te_layers": {storage: plan_te_layer(storage) for storage in TE_STORAGE},
    }
    (HERE / "references.json").write_text(json.dumps(references, indent=2) + "\n")


if __name__ == "__main__":
    main()
