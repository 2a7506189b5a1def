"""Compare loading, saving, importing and exporting a folder of 1 GB with the libraries' own: time and peak memory.

Loading, saving and exporting are compared with safetensors, importing with megatron-core's dist_checkpointing.

uv run python tests/benchmarks/weights.py [ROUNDS]

Each side runs in a process of its own. Time excludes imports and the making of the model; memory is the peak above what
the process had before. The file is in the page cache, so the disk plays no part.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}

START = """
import json, os, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch._C._distributed_c10d import HashStore
from bridge.config import ModelConfig
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from bridge.dist.cpu import cpu_runtime, on_meta
from bridge.dist.engine.groups import create_process_groups
from bridge.dist.layout import Layout
from bridge.dist.run.peak_memory import read_peak_memory
from bridge.models.huggingface import from_hf, load_weights, save_weights
import bridge.models.gpt.builder
folder = Path(sys.argv[1])
def begin():
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    return read_peak_memory().resident, time.perf_counter()
"""
END = """
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "bytes": read_peak_memory().resident - before}))
"""
MODEL = """
torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
config = ModelConfig.from_dict(from_hf(json.loads((folder / "config.json").read_text())).data)
config.transformer.init_model_with_meta_device = True
config.finalize()
groups = create_process_groups(Layout.of(config.transformer, 1))
with cpu_runtime():
    model_parallel_cuda_manual_seed(1)
    with on_meta():
        stage = config.get_builder_cls()(config).build_model(groups)
"""
FSDP2 = """
import megatron.core.distributed
import torch.distributed.fsdp
import torch.distributed.tensor
from bridge.dist.job import BuildJob
from bridge.dist.plan.virtual_rank.groups import act_as_rank
from bridge.dist.wrapper import Wrapper
document = from_hf(json.loads((folder / "config.json").read_text())).data
document["transformer"] |= {"params_dtype": "torch.bfloat16", "bf16": True, "init_model_with_meta_device": True}
job = BuildJob(document=document, wrapper=Wrapper.TORCH_FSDP2)
config = ModelConfig.from_dict(job.document)
with cpu_runtime(), act_as_rank(Layout(dp=4), 0) as groups:
    job.finalize(config, 4)
    config.transformer.perform_initialization = False
    config.pre_wrap_hooks = [lambda stages: (load_weights(stages, folder, groups), stages)[1]]
    builder = job.make_builder(config)
    ddp_config = job.make_options(builder.transformer_config).ddp_config
    before, start = begin()
    builder.build_distributed_models(
        groups, ddp_config=ddp_config, use_torch_fsdp2=True, data_parallel_random_init=False
    )
"""
SIDES = {
    "safetensors, read": """
before, start = begin()
with safe_open(folder / "model.safetensors", framework="pt") as file:
    tensors = [file.get_tensor(name).clone() for name in file.keys()]
""",
    "load_weights": MODEL
    + """
    before, start = begin()
    load_weights([stage], folder, groups)
""",
    "safetensors, write": """
with safe_open(folder / "model.safetensors", framework="pt") as file:
    tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
before, start = begin()
save_file(tensors, folder.parent / "written.safetensors")
with (folder.parent / "written.safetensors").open("rb") as written:
    os.fsync(written.fileno())  # as save_weights does
""",
    "save_weights": MODEL
    + """
    load_weights([stage], folder, groups)
    before, start = begin()
    save_weights([stage], folder.parent / "written", groups, model=config)
""",
    "dist_checkpointing.save": """
from megatron.core import dist_checkpointing
torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
with safe_open(folder / "model.safetensors", framework="pt") as file:
    state = {
        name: dist_checkpointing.ShardedTensor.from_rank_offsets(name, file.get_tensor(name).clone())
        for name in file.keys()
    }
(folder.parent / "checkpoint").mkdir()
with cpu_runtime():
    before, start = begin()
    dist_checkpointing.save(state, str(folder.parent / "checkpoint"))
    os.sync()  # as import_folder waits for the disk
""",
    "import_folder": """
from bridge.models.huggingface.checkpoint.import_folder import import_folder
before, start = begin()
import_folder(folder, folder.parent / "checkpoint")
""",
    "export_folder": """
from bridge.models.huggingface.checkpoint.export_folder import export_folder
from bridge.models.huggingface.checkpoint.import_folder import import_folder
import_folder(folder, folder.parent / "checkpoint")
before, start = begin()
export_folder(folder.parent / "checkpoint", folder.parent / "written")
""",
    "load_weights, FSDP2, one of four ranks": FSDP2,
}
MAKE = """
generator = torch.Generator().manual_seed(0)
from bridge.models.huggingface.document_fields import read_fields
from bridge.models.huggingface.matching import find_architecture
from bridge.models.huggingface.weights.sizes import Sizes
given = json.loads((folder / "config.json").read_text())
entries = find_architecture(given).weights(Sizes(read_fields(from_hf(given).data)))
shapes = {part.tensor: part.shape for entry in entries for part in entry.forms[0]}
tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
save_file(tensors, folder / "model.safetensors")
"""


def run(program: str, folder: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", START + program, str(folder)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def remove_written(parent: Path) -> None:
    (parent / "written.safetensors").unlink(missing_ok=True)
    for name in ("written", "checkpoint"):
        shutil.rmtree(parent / name, ignore_errors=True)


def main() -> None:
    rounds = int(sys.argv[1]) if sys.argv[1:] else 5
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        run(MAKE, folder)
        size = (folder / "model.safetensors").stat().st_size
        for _ in range(rounds):
            for side, program in SIDES.items():
                results[side].append(json.loads(run(program + END, folder)))
                remove_written(Path(parent))
    sys.stdout.write(f"a folder of {size / 1e9:.2f} GB\n")
    medians = {side: statistics.median(one["seconds"] for one in found) for side, found in results.items()}
    for side, found in results.items():
        memory = max(one["bytes"] for one in found) / 1e6
        sys.stdout.write(f"{side}: {medians[side]:.2f} s, {size / 1e9 / medians[side]:.1f} GB/s, {memory:,.0f} MB\n")
    read, load, write, save, checkpoint, imported, exported, _ = medians.values()
    ratios = {"loading": read / load, "saving": write / save, "exporting": write / exported}
    ratios["importing"] = checkpoint / imported
    sys.stdout.write(f"of the libraries' speed: {', '.join(f'{name} {ratio:.2f}' for name, ratio in ratios.items())}\n")


if __name__ == "__main__":
    main()
