"""A folder of transformers as a Megatron checkpoint: the same weights, and none of them held as a whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_cases import MODELS
from huggingface_models import build_transformers_model
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from bridge.models.commands.checkpoints import import_hf
from bridge.models.errors import WeightsError
from bridge.models.huggingface.checkpoint.import_folder import import_folder


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

    from megatron.core import dist_checkpointing
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

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
    wrong = []
    for stage in stages:
        expected = {name: value.clone() for name, value in stage.state_dict().items() if value is not None}
        for parameter in stage.parameters():
            parameter.data.zero_()
        metadata = {"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}
        state = {"model": stage.sharded_state_dict(metadata=metadata)}
        stage.load_state_dict(dist_checkpointing.load(state, checkpoint)["model"])
        loaded = stage.state_dict()
        wrong += [name for name, value in expected.items() if not torch.equal(value, loaded[name])]
    destroy_process_groups()
    return wrong


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
    folder = make_folder(tmp_path, case)
    import_folder(folder, tmp_path / "checkpoint")
    arguments = str(folder), str(tmp_path / "checkpoint" / "release"), sizes
    assert run_ranks(compare_loaded, 2, *arguments) == [[], []]


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
    with pytest.raises(WeightsError, match="exists"):
        import_folder(folder, checkpoint)
    assert (checkpoint / "iter_0000001").is_dir()
    import_folder(folder, checkpoint, force=True)
    assert sorted(file.name for file in checkpoint.iterdir()) == ["latest_checkpointed_iteration.txt", "release"]
    with pytest.raises(WeightsError, match="is not replaced"):  # it is no checkpoint
        import_folder(folder, folder, force=True)


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path, "llama")
    disk = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    with pytest.raises(WeightsError, match="GB left"):
        import_folder(folder, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_the_command(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "qwen3")
    done = CliRunner().invoke(import_hf, [str(folder), "-o", str(tmp_path / "checkpoint")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").read_text() == "release"
