"""Restore a ModelOpt state and weights. Importing this module imports ModelOpt and registers TorchAttention with it."""

from __future__ import annotations

import contextlib
import io
import logging
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from modelopt.torch.opt.plugins import restore_sharded_modelopt_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, Metadata, TensorStorageMetadata

from bridge.dist import errors as dist_errors
from bridge.dist.checkpoint.folder import MODELOPT_STATE
from bridge.dist.checkpoint.reader import Checkpoint, read_safely
from bridge.dist.patch import Replacement, replace_attributes
from bridge.models.errors import CheckpointError
from bridge.models.modelopt.attention import convert_attention_as_saved
from bridge.models.modelopt.checkpoint import find_rank_file, is_sharded, read_file

logger = logging.getLogger(__name__)

_MAX_NAMES = 5
_MAX_REASON_LENGTH = 1000


def restore_checkpoint(
    stage: MegatronModule, checkpoint: Path, pg_collection: ProcessGroupCollection
) -> MegatronModule:
    """Restore the ModelOpt state and the weights of a checkpoint into a newly built stage.

    Every rank must call it if the checkpoint is distributed.

    Args:
        stage: The stage, which is changed. Use the returned one, which may be another object.
        checkpoint: What ``bridge.models.modelopt.checkpoint.find_checkpoint`` returned.
        pg_collection: The process groups of this rank.

    Raises:
        CheckpointError: The checkpoint cannot be read, or belongs to another model or layout.
    """
    output = io.StringIO()
    with contextlib.redirect_stdout(output):  # ModelOpt prints its progress
        if is_sharded(checkpoint):
            stage = _restore_sharded(stage, checkpoint)
        else:
            stage = _restore_file(stage, find_rank_file(checkpoint, pg_collection))
    logger.info("restored a ModelOpt state from %s: %s", checkpoint, " ".join(output.getvalue().split()))
    return stage


def _restore_sharded(stage: MegatronModule, folder: Path) -> MegatronModule:
    """Restore from a distributed checkpoint, which may have been saved under another layout."""
    holder = [stage]
    try:
        with read_safely(Checkpoint(folder), Checkpoint(folder / MODELOPT_STATE)), _ignore_strides():
            with convert_attention_as_saved(load_sharded_metadata(str(folder))):
                restore_sharded_modelopt_state(holder, folder)
            (stage,) = holder
            described = stage.sharded_state_dict(metadata=dist_checkpointing.load_content_metadata(str(folder)))
            loaded: tuple[dict[str, Any], set[str], set[str]] = dist_checkpointing.load(  # type: ignore[assignment]
                {"model": described}, str(folder), strict=StrictHandling.RETURN_ALL
            )
    except dist_errors.CheckpointError as error:
        raise CheckpointError(str(error)) from error
    except CheckpointException as error:  # from torch, with the errors of all ranks
        causes = [cause for cause, _ in error.failures.values()]
        if isinstance(causes[0], dist_errors.CheckpointError):
            raise CheckpointError(str(causes[0])) from error
        raise _make_mismatch_error(folder, str(causes[0])) from error
    except (RuntimeError, CheckpointingException) as error:
        raise _make_mismatch_error(folder, str(error)) from error
    state, missing, unexpected = loaded
    parts = dict(stage.named_children())  # other names in the checkpoint are not the model's, but the optimizer's
    only = {
        "only the checkpoint has": {name for name in missing if name.split(".")[0] in parts},
        "only the model has": unexpected,
    }
    if mismatches := [f"{side} {_format_names(names)}" for side, names in only.items() if names]:
        raise _make_mismatch_error(folder, "; ".join(mismatches))
    _load_weights(stage, state["model"], folder)
    return stage


def _ignore_strides() -> AbstractContextManager[None]:
    """Let Megatron list the tensors of a checkpoint within a context.

    megatron-core 0.19.2 creates each tensor from all properties that torch stores, and fails because torch 2.15 stores
    strides too.
    """
    list_tensors: Any = TorchDistLoadShardedStrategy.load_tensors_metadata

    def list_without_strides(self: object, folder: Path, metadata: Metadata) -> object:
        stored = {name: _drop_strides(one) for name, one in metadata.state_dict_metadata.items()}
        return list_tensors(self, folder, replace(metadata, state_dict_metadata=stored))

    return replace_attributes(Replacement(TorchDistLoadShardedStrategy, "load_tensors_metadata", list_without_strides))


def _drop_strides(stored: STORAGE_TYPES) -> STORAGE_TYPES:
    if not isinstance(stored, TensorStorageMetadata):
        return stored
    properties = copy(stored.properties)
    vars(properties).pop("strides", None)
    return replace(stored, properties=properties)


def _restore_file(stage: MegatronModule, file: Path) -> MegatronModule:
    """Restore from the file of this rank."""
    saved = read_file(file)
    state, weights = saved.get("modelopt_state"), saved.get("model_state_dict", saved.get("model"))
    if weights is None or not (state and state["modelopt_state_dict"]):
        raise CheckpointError(
            f"{file} has no ModelOpt state with weights: pass the checkpoint of a model that ModelOpt changed, "
            "or set restore_modelopt_state to false"
        )
    quantizers = {
        name for _, mode in state["modelopt_state_dict"] for name in mode["metadata"].get("quantizer_state", ())
    }
    try:
        with convert_attention_as_saved(quantizers):
            restored: MegatronModule = mto.restore_from_modelopt_state(stage, state)
    except RuntimeError as error:  # from ModelOpt: names differ
        raise _make_mismatch_error(file, str(error)) from error
    shapes = {name: tuple(parameter.shape) for name, parameter in restored.named_parameters()}
    different = {name for name, shape in shapes.items() if name in weights and tuple(weights[name].shape) != shape}
    if different:
        raise _make_mismatch_error(file, f"the model has other shapes of {_format_names(different)}")
    _load_weights(restored, weights, file)
    return restored


def _load_weights(stage: MegatronModule, weights: dict[str, Any], source: Path) -> None:
    try:
        stage.load_state_dict(weights)
    except RuntimeError as error:  # names or shapes differ
        raise _make_mismatch_error(source, str(error)) from error


def _format_names(names: set[str]) -> str:
    shown = sorted(names)[:_MAX_NAMES]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _make_mismatch_error(source: Path, reason: str) -> CheckpointError:
    shown = reason if len(reason) <= _MAX_REASON_LENGTH else f"{reason[:_MAX_REASON_LENGTH]} ..."
    return CheckpointError(
        f"{source} cannot be restored into this model: {shown}\n"
        "Build the model with the configuration and layers that the checkpoint was saved with. Build the model that "
        "ModelOpt changes with restore_modelopt_state too, so that its experts are not grouped"
    )
