"""A folder of transformers as a Megatron checkpoint: the same weights, and none of them held as a whole."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_cases import MODELS
from huggingface_models import build_transformers_model
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_load_weights import compare_folders
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from bridge.dist.checkpoint.folder import find_iteration
from bridge.dist.checkpoint.reader import Checkpoint
from bridge.dist.errors import CheckpointError
from bridge.models.commands.checkpoints import export_hf, import_hf
from bridge.models.errors import WeightsError
from bridge.models.huggingface.checkpoint import export_folder as export_folder_module
from bridge.models.huggingface.checkpoint import import_folder as import_folder_module
from bridge.models.huggingface.checkpoint.export_folder import export_folder
from bridge.models.huggingface.checkpoint.import_folder import import_folder
from bridge.models.huggingface.checkpoint.reader import CheckpointReader


def make_folder(tmp_path: Path, case: str) -> Path:
    folder = tmp_path / "folder"
    build_transformers_model(MODELS[case]).save_pretrained(folder)
    return folder


def store_in(folder: Path, dtypes: list[torch.dtype]) -> None:
    """Store the tensors of a folder in these precisions, in turns."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    stored = {name: tensor.to(dtypes[i % len(dtypes)]) for i, (name, tensor) in enumerate(tensors.items())}
    save_file(stored, file, metadata={"format": "pt"})


def compare_loaded(folder: str, checkpoint: str, sizes: dict[str, int]) -> list[str]:
    """Return the parameters of this rank that differ between a folder and a checkpoint, each loaded by its own code."""
    import json

    from checkpoint_runs import Run, set_megatron_arguments
    from megatron.core import dist_checkpointing
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.training import checkpointing

    from bridge.config import Document, ModelConfig
    from bridge.dist.document_layout import apply_layout
    from bridge.dist.engine.groups import create_process_groups, destroy_process_groups
    from bridge.dist.job import BuildJob
    from bridge.dist.wrapper import Wrapper
    from bridge.models.huggingface import from_hf, load_weights

    document = Document(from_hf(json.loads((Path(folder) / "config.json").read_text())).data)
    apply_layout(document, sizes)
    config: Any = ModelConfig.from_dict(document.data)
    job = BuildJob(document=document.data, wrapper=Wrapper.NONE)
    layout = job.finalize(config, torch.distributed.get_world_size())
    groups = create_process_groups(layout, embedding_ranks=job.find_embedding_ranks(config))
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    stages = job.make_builder(config).build_distributed_models(groups, wrap_with_ddp=False)
    load_weights(stages, folder, groups)
    (stage,) = stages
    expected = {name: value.clone() for name, value in stage.state_dict().items() if value is not None}
    wrong = []
    for by_megatron_training in (False, True):
        for parameter in stage.parameters():
            parameter.data.zero_()
        if by_megatron_training:
            names = "num_layers", "hidden_size", "num_attention_heads"
            run = Run(sizes, 0, settings={name: getattr(stage.config, name) for name in names})
            set_megatron_arguments(run, Path(checkpoint).parent)
            assert checkpointing.load_checkpoint(stages, None, None)[0] == 0
        else:
            metadata = {"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}
            state = {"model": stage.sharded_state_dict(metadata=metadata)}
            stage.load_state_dict(dist_checkpointing.load(state, checkpoint)["model"])
        loaded = stage.state_dict()
        wrong += [name for name, value in expected.items() if not torch.equal(value, loaded[name])]
    destroy_process_groups()
    return wrong


def save_again(folder: str, imported: str, checkpoint: str, sizes: dict[str, int]) -> None:
    """Load the checkpoint that was imported from a folder under a layout, and save another one."""
    import json

    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import Document, ModelConfig
    from bridge.dist.checkpoint.load import load_checkpoint
    from bridge.dist.checkpoint.progress import Progress
    from bridge.dist.checkpoint.save import save_checkpoint
    from bridge.dist.document_layout import apply_layout
    from bridge.dist.engine.groups import create_process_groups, destroy_process_groups
    from bridge.dist.job import BuildJob
    from bridge.dist.wrapper import Wrapper
    from bridge.models.huggingface import from_hf

    document = Document(from_hf(json.loads((Path(folder) / "config.json").read_text())).data)
    apply_layout(document, sizes)
    document.data["should_pad_vocab"] = True
    config: Any = ModelConfig.from_dict(document.data)
    job = BuildJob(document=document.data, wrapper=Wrapper.NONE)
    layout = job.finalize(config, torch.distributed.get_world_size())
    groups = create_process_groups(layout, embedding_ranks=job.find_embedding_ranks(config))
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    stages = job.make_builder(config).build_distributed_models(groups, wrap_with_ddp=False)
    load_checkpoint(stages, imported, groups)
    save_checkpoint(stages, checkpoint, groups, model=config, progress=Progress(step=3))
    destroy_process_groups()


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("llama 3.2, tied", {"tp": 2}),
        ("llama 3.2, tied", {"pp": 2}),
        ("deepseek_v3", {"tp": 2}),
        ("gpt_oss", {"ep": 2}),
        ("nemotron_h, experts", {"tp": 2}),
        ("t5, 1.0", {"tp": 2}),
    ],
)
def test_megatron_loads_the_same_weights(case: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """By megatron-core, and by the function of megatron.training that continues a run."""
    folder = make_folder(tmp_path, case)
    import_folder(folder, tmp_path / "checkpoint")
    arguments = str(folder), str(tmp_path / "checkpoint" / "release"), sizes
    assert run_ranks(compare_loaded, 2, *arguments) == [[], []]


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("llama 3.2, tied", {"tp": 2}),
        ("qwen3", {"pp": 2}),
        ("nemotron_h, experts", {"ep": 2}),
        ("gpt2", {"tp": 2}),
        ("t5, 1.0", {"tp": 2}),
    ],
)
def test_a_checkpoint_of_any_layout_is_exported(case: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """The vocabulary is padded on the way, as far as the layout needs it."""
    folder, imported = make_folder(tmp_path, case), tmp_path / "imported"
    import_folder(folder, imported)
    run_ranks(save_again, 2, str(folder), str(imported), str(tmp_path / "checkpoint"), sizes)
    export_folder(tmp_path / "checkpoint", tmp_path / "exported", shard_bytes=30_000)
    compare_folders(tmp_path / "exported", folder)


@pytest.mark.parametrize("case", MODELS)
def test_a_folder_comes_back_to_the_bit(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As fp32, as bf16 and with several precisions; in windows of few rows."""
    monkeypatch.setattr(import_folder_module, "WINDOW", 1000)
    monkeypatch.setattr(export_folder_module, "WINDOW", 1500)
    folder = make_folder(tmp_path, case)
    for number, dtypes in enumerate(([], [torch.bfloat16], [torch.float16, torch.float32, torch.bfloat16])):
        if dtypes:
            store_in(folder, dtypes)
        import_folder(folder, tmp_path / f"checkpoint{number}")
        export_folder(tmp_path / f"checkpoint{number}", tmp_path / f"exported{number}")
        compare_folders(tmp_path / f"exported{number}", folder)


def test_what_is_no_checkpoint_of_a_model(tmp_path: Path) -> None:
    folder, checkpoint, exported = make_folder(tmp_path, "llama"), tmp_path / "checkpoint", tmp_path / "exported"
    import_folder(folder, checkpoint)
    iteration = checkpoint / "release"
    document = (iteration / "bridge.yaml").read_text()
    (iteration / "bridge.yaml").write_text(document.replace("num_layers: 2", "num_layers: 3"))
    with pytest.raises(WeightsError, match=r"linear_qkv.weight: expected the shape \[3, 64, 32\], got \[2, 64, 32\]"):
        export_folder(checkpoint, exported)
    (iteration / "bridge.yaml").unlink()
    (iteration / "run_config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"has neither bridge\.yaml nor run_config\.yaml.* --config FILE"):
        export_folder(checkpoint, exported)
    (tmp_path / "model.yaml").write_text(document)
    given = [str(checkpoint), "-o", str(tmp_path / "given"), "--config", str(tmp_path / "model.yaml")]
    assert CliRunner().invoke(export_hf, given).exit_code == 0
    compare_folders(tmp_path / "given", folder)
    (iteration / "bridge.yaml").write_text(document)
    metadata = (iteration / ".metadata").read_bytes()
    (iteration / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        export_folder(checkpoint, exported)
    assert not exported.exists()
    assert not (tmp_path / "ran").exists()
    (iteration / ".metadata").write_bytes(metadata)
    export_folder(checkpoint, exported)
    with pytest.raises(WeightsError, match="exists: choose another folder, or replace it with --force"):
        export_folder(checkpoint, exported)


def test_a_chunk_that_is_no_tensor(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "__0_0.distcp", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Hostile(tmp_path / "ran")))
        archive.writestr("archive/data/0", bytes(8))
    size = (tmp_path / "__0_0.distcp").stat().st_size
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    described = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([2]), [chunk])
    places = {MetadataIndex("bias", [0]): _StorageInfo("__0_0.distcp", 0, size)}
    reader = CheckpointReader(tmp_path, Metadata({"bias": described}, storage_data=places))
    with pytest.raises(WeightsError, match="refers to pathlib"):
        reader.read("bias", [0], [2])
    with pytest.raises(WeightsError, match="does not have each number"):
        reader.read("bias", [0], [3])
    assert not (tmp_path / "ran").exists()


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_tensors_keep_their_precision(tmp_path: Path) -> None:
    """A tensor that stacks layers has the precision that holds those of all."""
    from torch.distributed.checkpoint import FileSystemReader

    folder = make_folder(tmp_path, "llama")
    store_in(folder, [torch.bfloat16])
    import_folder(folder, tmp_path / "half")
    found = FileSystemReader(tmp_path / "half" / "release").read_metadata().state_dict_metadata
    assert {one.properties.dtype for one in found.values() if hasattr(one, "properties")} == {torch.bfloat16}
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    save_file(tensors | {name: tensors[name].half()}, folder / "model.safetensors", metadata={"format": "pt"})
    import_folder(folder, tmp_path / "mixed")
    found = FileSystemReader(tmp_path / "mixed" / "release").read_metadata().state_dict_metadata
    wide = {key for key, one in found.items() if getattr(one, "properties", None) and one.properties.dtype.itemsize > 2}
    assert wide == {"decoder.layers.self_attention.linear_proj.weight"}
    assert name in (tmp_path / "mixed" / "release" / "huggingface_dtypes.json").read_text()


def test_a_checkpoint_that_exists_is_kept(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "llama")
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = tmp_path / "checkpoint"
    import_folder(folder, checkpoint)
    assert (checkpoint / "release" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    (checkpoint / "iter_0000001").mkdir()
    with pytest.raises(WeightsError, match="exists: choose another folder, or replace it with --force"):
        import_folder(folder, checkpoint)
    assert (checkpoint / "iter_0000001").is_dir()
    import_folder(folder, checkpoint, force=True)
    assert sorted(file.name for file in checkpoint.iterdir()) == ["latest_checkpointed_iteration.txt", "release"]
    with pytest.raises(WeightsError, match="is not replaced"):  # it is no checkpoint
        import_folder(folder, folder, force=True)


def test_a_folder_that_holds_the_source_is_not_replaced(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "llama")
    import_folder(folder, folder / "checkpoint")
    with pytest.raises(WeightsError, match=r"folder: exists, and is not replaced, as .*checkpoint/release is in it"):
        export_folder(folder / "checkpoint", folder, force=True)
    inner = (folder / "checkpoint").rename(tmp_path / "checkpoint") / "folder"
    folder.rename(inner)
    with pytest.raises(WeightsError, match=r"checkpoint: exists, and is not replaced, as .*checkpoint/folder is in it"):
        import_folder(inner, tmp_path / "checkpoint", force=True)
    assert (inner / "model.safetensors").is_file()


def test_folders_of_the_other_kind_are_told(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "llama")
    import_folder(folder, tmp_path / "checkpoint")
    with pytest.raises(WeightsError, match=r"checkpoint: is a Megatron checkpoint: `bridge export-hf` writes one"):
        import_folder(tmp_path / "checkpoint", tmp_path / "other")
    with pytest.raises(WeightsError, match=r"folder: is a Hugging Face folder already"):
        export_folder(folder, tmp_path / "other")


def test_a_disk_that_becomes_full(tmp_path: Path) -> None:
    """Nothing that looks whole is left."""
    folder = make_folder(tmp_path, "llama")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))  # bytes
    try:
        with pytest.raises(WeightsError, match="checkpoint: cannot be written: File too large"):
            import_folder(folder, tmp_path / "checkpoint")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert not (tmp_path / "checkpoint").exists()


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path, "llama")
    disk = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    with pytest.raises(WeightsError, match=r"0\.001 MB left: free some space"):
        import_folder(folder, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_checkpoint_of_megatron_bridge_is_exported(tmp_path: Path) -> None:
    """The files of Megatron Bridge: a tracker that is a pickle, and run_config.yaml with the sections of a run."""
    folder, checkpoint = make_folder(tmp_path, "qwen3"), tmp_path / "checkpoint"
    import_folder(folder, checkpoint)
    (checkpoint / "latest_checkpointed_iteration.txt").unlink()
    iteration = (checkpoint / "release").rename(checkpoint / "iter_0000005")
    (iteration / "bridge.yaml").unlink()
    state = {"step": torch.tensor(5, dtype=torch.int32), "consumed_train_samples": torch.tensor(40, dtype=torch.int32)}
    for file in (checkpoint / "latest_train_state.pt", iteration / "train_state.pt"):
        torch.save(state, file)
    with (iteration / "run_config.yaml").open("a") as config:
        config.write("_target_: megatron.bridge.training.config.ConfigContainer\ntrain: {train_iters: 100}\n")
    found = Checkpoint(find_iteration(checkpoint))
    assert (found.iteration, found.step, found.samples) == (iteration, 5, 40)
    export_folder(checkpoint, tmp_path / "exported")
    compare_folders(tmp_path / "exported", folder)
    torch.save([1], iteration / "train_state.pt")
    with pytest.raises(CheckpointError, match=r"train_state\.pt is not Megatron Bridge's train state"):
        Checkpoint(iteration)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They write to empty folders, too, and run on a machine with a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != "")
    folder = make_folder(tmp_path, "qwen3")
    for name in ("checkpoint", "exported"):
        (tmp_path / name).mkdir()
    done = CliRunner().invoke(import_hf, [str(folder), "-o", str(tmp_path / "checkpoint")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").read_text() == "release"
    done = CliRunner().invoke(export_hf, [str(tmp_path / "checkpoint"), "-o", str(tmp_path / "exported")])
    assert done.exit_code == 0, done.output
    compare_folders(tmp_path / "exported", folder)
