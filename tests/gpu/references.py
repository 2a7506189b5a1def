#!/usr/bin/env python3
"""Write references.json: the expected results of the rows, computed on the CPU.

    uv run python tests/gpu/references.py

It holds the losses and gradient norms of every model, the fingerprint of its document, and the plan of every Llama
setting.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[0] = str(HERE.parent)  # replaces this folder, whose modules would hide others of the same names
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from gpu.llama import plan_memory  # noqa: E402
from gpu.settings import CASES, SETTINGS  # noqa: E402
from gpu.training import train_model  # noqa: E402

from bridge.config import Document  # noqa: E402


def train_case(case: str) -> dict[str, Any]:
    """Return the losses and gradient norms of a model in a precision, with the fingerprint of its document."""
    model, _, precision = case.rpartition("-")
    return {"fingerprint": Document.load(model).fingerprint(), **train_model(model, precision)}


def main() -> None:
    """Write the file."""
    references = {
        "made_with": {name: importlib.metadata.version(name) for name in ("megatron-core", "torch")},
        "training": {case: train_case(case) for case in [*CASES, "tiny-fp16"]},
        "plans": {name: plan_memory(name) for name in SETTINGS},
    }
    (HERE / "references.json").write_text(json.dumps(references, indent=2) + "\n")


if __name__ == "__main__":
    main()
