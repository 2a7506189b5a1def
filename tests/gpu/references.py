#!/usr/bin/env python3
"""Write references.json: what rows are compared with, computed on the CPU.

    uv run python tests/gpu/references.py

Losses and gradient norms of every model that rows train, the fingerprint of its document, and the plan of every
setting of the Llama.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[0] = str(HERE.parent)  # in place of this folder, whose modules have names of no package
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from gpu.llama import plan_memory  # noqa: E402
from gpu.settings import CASES, SETTINGS  # noqa: E402
from gpu.training import train_model  # noqa: E402

from bridge.config import Document  # noqa: E402


def training(case: str) -> dict[str, Any]:
    """Train a model in a precision."""
    model, _, precision = case.rpartition("-")
    return {"fingerprint": Document.load(model).fingerprint(), **train_model(model, precision)}


def main() -> None:
    """Write the file."""
    references = {
        "made_with": {name: importlib.metadata.version(name) for name in ("megatron-core", "torch")},
        "training": {case: training(case) for case in [*CASES, "tiny-fp16"]},
        "plans": {name: plan_memory(name) for name in SETTINGS},
    }
    (HERE / "references.json").write_text(json.dumps(references, indent=2) + "\n")


if __name__ == "__main__":
    main()
