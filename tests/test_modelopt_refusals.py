"""Checkpoints of ModelOpt that are refused: of another model or layout, damaged or hostile, or not asked for."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig
from modelopt_models import (
    SMALL,
    VOCAB,
    Changes,
    build_changed,
    create_groups,
    make_config,
    quantise,
    restore_error,
    save_file,
    save_ranks,
    save_shards,
)
from ranks import run_ranks
from tampering import COMMON_STATE, Payload, replace_object

from bridge.dist.errors import BuilderContractError
from bridge.models.errors import CheckpointError, ModelConfigError, UnsupportedError
from bridge.models.gpt import GPTModelBuilder, GPTModelConfig
from bridge.models.t5 import T5ModelConfig


def replace_extra_state(folder: Path, other: object) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    key = next(index.fqn for index in metadata.storage_data if "._extra_state/" in index.fqn)
    replace_object(folder, key, other)


HOSTILE: dict[str, Callable[[Path, object], object]] = {
    "metadata": lambda folder, bad: (folder / ".metadata").write_bytes(pickle.dumps(bad)),
    "metadata of the state": lambda folder, bad: (folder / "modelopt_state/.metadata").write_bytes(pickle.dumps(bad)),
    "common state": lambda folder, bad: replace_object(folder / "modelopt_state", COMMON_STATE, [{"bad": bad}]),
    "extra state": replace_extra_state,
}


def restore_hostile(config: Any, groups: Any, shards: Path) -> dict[str, str]:
    """Return the errors of restoring from checkpoints with an object that runs something when it is unpickled."""
    errors = {}
    for name, change in HOSTILE.items():
        folder = shards.parent / name
        shutil.copytree(shards, folder)
        change(folder / "iter_0000012", Payload(folder / "ran"))
        errors[name] = restore_error(config, groups, folder)
        assert not (folder / "ran").exists()
    return errors


OTHERS: dict[str, Changes] = {
    "layers": SMALL | {"transformer.num_layers": 4},
    "sizes": SMALL | {"transformer.hidden_size": 64},
}


def run_refused(folder: Path) -> dict[str, Any]:
    """Return the errors of restoring a quantised model from what does not fit it."""
    found: dict[str, Any] = {}
    model, config, groups = build_changed("tiny", SMALL, quantise)
    whole, shards, ranks = save_file(model, folder), save_shards(model, folder / "gpt"), folder / "ranks"
    save_ranks(model, ranks)
    (ranks / "mp_rank_00").rename(ranks / "mp_rank_01")
    found["other rank"] = restore_error(config, groups, ranks)
    found["hostile"] = restore_hostile(config, groups, shards)
    for name, changes in OTHERS.items():
        other = make_config("tiny", changes)
        for checkpoint in (whole, shards):
            found[f"other {name}, {checkpoint.name}"] = restore_error(other, groups, checkpoint)
    with pytest.raises(UnsupportedError, match="virtual pipeline"):
        GPTModelBuilder(make_config("tiny", SMALL | {"restore_modelopt_state": True})).build_model(groups, vp_stage=0)
    model, config, groups = build_changed("tiny", SMALL, lambda model: None)
    found["unchanged"] = restore_error(config, groups, save_file(model, folder))
    return found


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = run_ranks(run_refused, 1, tmp_path_factory.mktemp("one"))
    return found


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("layers, whole.pt", "decoder.layers.3."),
        ("layers, gpt", "only the model has decoder.layers.2."),
        ("sizes, whole.pt", "other shapes of decoder.final_layernorm.bias"),
        ("sizes, gpt", "embedding.position_embeddings.weight"),
    ],
)
def test_modelopt_state_of_another_architecture_is_refused(refused: dict[str, Any], other: str, named: str) -> None:
    message = refused[f"other {other}"]
    assert "cannot be restored into this model" in message
    assert named in message


def test_unsuitable_checkpoint_files_are_refused(refused: dict[str, Any]) -> None:
    assert "whole.pt has no ModelOpt state" in refused["unchanged"]
    assert "ranks has no mp_rank_00/model_optim_rng.pt" in refused["other rank"]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_checkpoint_would_run_is_refused(refused: dict[str, Any], name: str) -> None:
    assert "cannot be read: it refers to " in refused["hostile"][name]


def small(**fields: Any) -> GPTModelConfig:
    transformer = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2, **fields)
    return GPTModelConfig(transformer=transformer, vocab_size=VOCAB, restore_modelopt_state=True)


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no .*nowhere to restore"):
        GPTModelBuilder(small(), modelopt_checkpoint=tmp_path / "nowhere").check_restore()


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint of Megatron"):
        GPTModelBuilder(small(), modelopt_checkpoint=tmp_path).check_restore()


def test_a_distributed_checkpoint_without_modelopt_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    with pytest.raises(CheckpointError, match=r"has no ModelOpt state .no folder modelopt_state"):
        GPTModelBuilder(small(), modelopt_checkpoint=tmp_path).check_restore()


def test_restoring_without_a_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match="true, but there is no checkpoint to restore from"):
        GPTModelBuilder(small()).check_restore()


def test_a_checkpoint_without_restoring_is_refused(tmp_path: Path) -> None:
    config = small()
    config.restore_modelopt_state = False
    with pytest.raises(CheckpointError, match=r"false, but .* is given to restore from"):
        GPTModelBuilder(config, modelopt_checkpoint=tmp_path).check_restore()


def test_t5_with_modelopt_state_is_refused() -> None:
    config = T5ModelConfig(transformer=small().transformer, vocab_size=VOCAB, restore_modelopt_state=True)
    with pytest.raises(ModelConfigError, match="neither ModelOpt nor Megatron-Core supports it for T5"):
        config.validate()
    with pytest.raises(BuilderContractError, match="T5ModelBuilder cannot restore a ModelOpt state"):
        config.get_builder_cls()(config).check_restore()


class Blocked:
    """An import finder that hides ModelOpt."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "modelopt":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def without_modelopt(folder: Path) -> list[str]:
    sys.meta_path.insert(0, Blocked())
    (folder / "mp_rank_00").mkdir()
    config = small()
    errors = []
    for attempt in (
        GPTModelBuilder(config, modelopt_checkpoint=folder).check_restore,
        lambda: GPTModelBuilder(config).build_model(create_groups(config)),
    ):
        with pytest.raises(UnsupportedError) as caught:
            attempt()
        errors.append(str(caught.value))
    return errors


def test_a_missing_modelopt_is_an_error(tmp_path: Path) -> None:
    (errors,) = run_ranks(without_modelopt, 1, tmp_path)
    assert len(errors) == 2
    for message in errors:
        assert "No module named 'modelopt'" in message
        assert "install bridge-models[modelopt]" in message
