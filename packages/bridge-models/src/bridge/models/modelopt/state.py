"""Restoring a ModelOpt state, and weights. It imports ModelOpt, and makes our attention known to it."""

from __future__ import annotations

import contextlib
import io
import logging
from contextlib import AbstractContextManager
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
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from bridge.dist.patch import Replacement, replace_attributes
from bridge.models.errors import CheckpointError
from bridge.models.modelopt.attention import known_attention
from bridge.models.modelopt.checkpoint import file_of_rank, is_sharded, read_file

logger = logging.getLogger(__name__)

_MOST_NAMES = 5
_LONGEST = 1000


def restored(stage: MegatronModule, checkpoint: Path, pg_collection: ProcessGroupCollection) -> MegatronModule:
    """Give a stage that was just built the ModelOpt state and the weights of a checkpoint.

    Collective, if it is a distributed checkpoint.

    Args:
        stage: Is changed, and may be replaced by what is returned.
        checkpoint: What ``bridge.models.modelopt.checkpoint.locate`` returned.
        pg_collection: The process groups of this rank.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is of another model or layout.
    """
    output = io.StringIO()
    with contextlib.redirect_stdout(output):  # ModelOpt prints what it does
        if is_sharded(checkpoint):
            stage = _from_shards(stage, checkpoint)
        else:
            stage = _from_file(stage, file_of_rank(checkpoint, pg_collection))
    logger.info("restored a ModelOpt state from %s: %s", checkpoint, " ".join(output.getvalue().split()))
    return stage


def _from_shards(stage: MegatronModule, folder: Path) -> MegatronModule:
    """Restore from a distributed checkpoint, which may have been saved under another layout."""
    holder = [stage]
    try:
        with _listed_tensors():
            with known_attention(load_sharded_metadata(str(folder))):
                restore_sharded_modelopt_state(holder, folder)
            (stage,) = holder
            described = stage.sharded_state_dict(metadata=dist_checkpointing.load_content_metadata(str(folder)))
            loaded: tuple[dict[str, Any], set[str], set[str]] = dist_checkpointing.load(  # type: ignore[assignment]
                {"model": described}, str(folder), strict=StrictHandling.RETURN_ALL
            )
    except CheckpointException as error:  # torch's, of what happened on which rank
        causes = [cause for cause, _ in error.failures.values()]
        raise _mismatch_error(folder, str(causes[0])) from error
    except (RuntimeError, CheckpointingException) as error:
        raise _mismatch_error(folder, str(error)) from error
    state, missing, unexpected = loaded
    parts = dict(stage.named_children())  # the rest of the checkpoint, an optimizer's state, is not the model's
    only = {
        "the checkpoint alone has": {name for name in missing if name.split(".")[0] in parts},
        "the model alone has": unexpected,
    }
    if found := [f"{side} {_format_names(names)}" for side, names in only.items() if names]:
        raise _mismatch_error(folder, "; ".join(found))
    _load_weights(stage, state["model"], folder)
    return stage


def _listed_tensors() -> AbstractContextManager[None]:
    """Have Megatron list what tensors a checkpoint has.

    megatron-core 0.19.2 makes each with all properties that torch keeps of it, and fails where torch (2.15) keeps its
    strides too.
    """
    list_tensors: Any = TorchDistLoadShardedStrategy.load_tensors_metadata

    def without_strides(self: object, folder: Path, metadata: Metadata | None = None) -> object:
        metadata = metadata or FileSystemReader(folder).read_metadata()
        for stored in metadata.state_dict_metadata.values():
            if isinstance(stored, TensorStorageMetadata):
                vars(stored.properties).pop("strides", None)
        return list_tensors(self, folder, metadata)

    return replace_attributes(Replacement(TorchDistLoadShardedStrategy, "load_tensors_metadata", without_strides))


def _from_file(stage: MegatronModule, file: Path) -> MegatronModule:
    """Restore from a file of this rank."""
    saved = read_file(file)
    state, weights = saved.get("modelopt_state"), saved.get("model_state_dict", saved.get("model"))
    if weights is None or not (state and state["modelopt_state_dict"]):
        raise CheckpointError(
            f"{file} has no ModelOpt state with weights: give the checkpoint of a model that ModelOpt changed, "
            "or set restore_modelopt_state to false"
        )
    quantizers = {
        name for _, mode in state["modelopt_state_dict"] for name in mode["metadata"].get("quantizer_state", ())
    }
    try:
        with known_attention(quantizers):
            restored: MegatronModule = mto.restore_from_modelopt_state(stage, state)
    except RuntimeError as error:  # of ModelOpt: names differ
        raise _mismatch_error(file, str(error)) from error
    shapes = {name: tuple(parameter.shape) for name, parameter in restored.named_parameters()}
    if found := {name for name, shape in shapes.items() if name in weights and tuple(weights[name].shape) != shape}:
        raise _mismatch_error(file, f"the model has other shapes of {_format_names(found)}")
    _load_weights(restored, weights, file)
    return restored


def _load_weights(stage: MegatronModule, weights: dict[str, Any], source: Path) -> None:
    try:
        stage.load_state_dict(weights)
    except RuntimeError as error:  # names or shapes differ
        raise _mismatch_error(source, str(error)) from error


def _format_names(names: set[str]) -> str:
    shown = sorted(names)[:_MOST_NAMES]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _mismatch_error(source: Path, how: str) -> CheckpointError:
    shown = how if len(how) <= _LONGEST else f"{how[:_LONGEST]} ..."
    return CheckpointError(
        f"{source} cannot be restored into this model: {shown}\n"
        "Build it with the configuration and layers that it was saved with. Call build_model with"
        " restore_modelopt_state also for the model that ModelOpt is to convert: its experts are then not grouped"
    )
