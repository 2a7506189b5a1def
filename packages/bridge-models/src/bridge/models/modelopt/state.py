"""Restoring a ModelOpt state, and weights. Importing this module imports ModelOpt, and makes our attention known to it.

ModelOpt itself knows the linear layers of Megatron-Core, and of attention that of Transformer Engine only.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import modelopt.torch.opt as mto
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.safe_globals import SAFE_GLOBALS
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from modelopt.torch.opt.plugins import restore_sharded_modelopt_state
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from modelopt.torch.utils.distributed import ParallelState
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from bridge.dist.patch import Replacement, replaced
from bridge.models.backend import TorchAttention
from bridge.models.errors import CheckpointError
from bridge.models.modelopt.checkpoint import is_sharded

logger = logging.getLogger(__name__)

_KEY = "bridge.models.backend.TorchAttention"
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
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # ModelOpt prints what it does
        if is_sharded(checkpoint):
            stage = _from_shards(stage, checkpoint)
        else:
            stage = _from_file(stage, _file_of_rank(checkpoint, pg_collection))
    logger.info("restored a ModelOpt state from %s: %s", checkpoint, " ".join(said.getvalue().split()))
    return stage


def _from_shards(stage: MegatronModule, folder: Path) -> MegatronModule:
    """Restore from a distributed checkpoint, which may have been saved under another layout."""
    holder = [stage]
    try:
        with _listed_tensors():
            with _known_attention(load_sharded_metadata(str(folder))):
                restore_sharded_modelopt_state(holder, folder)
            (stage,) = holder
            described = stage.sharded_state_dict(metadata=dist_checkpointing.load_content_metadata(str(folder)))
            loaded: tuple[dict[str, Any], set[str], set[str]] = dist_checkpointing.load(  # type: ignore[assignment]
                {"model": described}, str(folder), strict=StrictHandling.RETURN_ALL
            )
    except CheckpointException as error:  # torch's, of what happened on which rank
        causes = [cause for cause, _ in error.failures.values()]
        raise _misfit(folder, str(causes[0])) from error
    except (RuntimeError, CheckpointingException) as error:
        raise _misfit(folder, str(error)) from error
    state, missing, unexpected = loaded
    parts = dict(stage.named_children())  # the rest of the checkpoint, an optimizer's state, is not the model's
    only = {
        "the checkpoint alone has": {name for name in missing if name.split(".")[0] in parts},
        "the model alone has": unexpected,
    }
    if found := [f"{side} {_some(names)}" for side, names in only.items() if names]:
        raise _misfit(folder, "; ".join(found))
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

    return replaced(Replacement(TorchDistLoadShardedStrategy, "load_tensors_metadata", without_strides))


def _from_file(stage: MegatronModule, file: Path) -> MegatronModule:
    """Restore from a file of this rank."""
    saved = _read(file)
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
        with _known_attention(quantizers):
            restored: MegatronModule = mto.restore_from_modelopt_state(stage, state)
    except RuntimeError as error:  # of ModelOpt: names differ
        raise _misfit(file, str(error)) from error
    shapes = {name: tuple(parameter.shape) for name, parameter in restored.named_parameters()}
    if found := {name for name, shape in shapes.items() if name in weights and tuple(weights[name].shape) != shape}:
        raise _misfit(file, f"the model has other shapes of {_some(found)}")
    _load_weights(restored, weights, file)
    return restored


def _file_of_rank(checkpoint: Path, pg_collection: ProcessGroupCollection) -> Path:
    """Return the file of this rank, as Megatron names it, in a folder that is no distributed checkpoint."""
    if checkpoint.is_file():
        ranks = pg_collection.tp.size() * pg_collection.pp.size() * pg_collection.ep.size()
        if ranks > 1:
            raise CheckpointError(
                f"{checkpoint} is the file of one rank, but {ranks} hold parts of the model: give a distributed "
                "checkpoint, or set tp, pp and ep to 1"
            )
        return checkpoint
    name = f"mp_rank_{pg_collection.tp.rank():02d}"
    for group in (pg_collection.pp, pg_collection.ep):
        name += f"_{group.rank():03d}" if group.size() > 1 else ""
    file = checkpoint / name / "model_optim_rng.pt"
    if not file.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {file.relative_to(checkpoint)}: it was saved under another layout, build under that"
        )
    return file


def _read(file: Path) -> dict[str, Any]:
    """Read what was saved with torch: data alone, and the few classes that Megatron puts into its checkpoints."""
    try:
        with torch.serialization.safe_globals(cast(list[Any], SAFE_GLOBALS)):
            saved: object = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(saved, dict):
        raise CheckpointError(f"{file} holds a {type(saved).__name__}, not a checkpoint: give another file")
    return saved


def _load_weights(stage: MegatronModule, weights: dict[str, Any], source: Path) -> None:
    try:
        stage.load_state_dict(weights)
    except RuntimeError as error:  # names or shapes differ
        raise _misfit(source, str(error)) from error


def _some(names: set[str]) -> str:
    shown = sorted(names)[:_MOST_NAMES]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _misfit(source: Path, how: str) -> CheckpointError:
    shown = how if len(how) <= _LONGEST else f"{how[:_LONGEST]} ..."
    return CheckpointError(
        f"{source} cannot be restored into this model: {shown}\n"
        "Build what was saved, with its configuration and layers. A model that ModelOpt shall change is built with "
        "restore_modelopt_state too, by build_model: then its experts are not grouped"
    )


@contextlib.contextmanager
def _known_attention(names: Iterable[str]) -> Iterator[None]:
    """Let ModelOpt convert our attention if it did when these names of quantizers and modules were saved.

    It did not in a model that was quantised before this module was imported.
    """
    if any("core_attention" in name for name in names):
        yield
        return
    QuantModuleRegistry.unregister(TorchAttention)
    try:
        yield
    finally:
        QuantModuleRegistry.register({TorchAttention: _KEY})(_QuantizedAttention)


@QuantModuleRegistry.register({TorchAttention: _KEY})
class _QuantizedAttention(QuantModule):  # type: ignore[misc]  # which has no types
    """Quantisation of queries, keys and values, as ModelOpt does it for Transformer Engine's attention."""

    device: torch.device  # ModelOpt sets it
    tp_group: torch.distributed.ProcessGroup

    def _setup(self) -> None:
        for name in ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer"):
            setattr(self, name, TensorQuantizer())
        self.parallel_state = ParallelState(
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend, see ``TorchAttention``."""
        query, key, value = self.q_bmm_quantizer(query), self.k_bmm_quantizer(key), self.v_bmm_quantizer(value)
        return super().forward(query, key, value, *args, **kwargs)

    def modelopt_post_restore(self, prefix: str = "") -> None:
        """Move what was restored to the device of the layer."""
        self.to(self.device)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe the quantizers, equal on tensor-parallel ranks, beside what the layer itself has."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        quantizers = {
            name: value
            for name, value in self.state_dict(keep_vars=True).items()
            if "_quantizer." in name or name == "_extra_state"
        }
        described: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        described |= make_sharded_tensors_for_checkpoint(
            quantizers, prefix, {}, sharded_offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )
        return described

    # ModelOpt puts methods of its own into each module, which torch calls only where the class has them.
    def get_extra_state(self) -> None:
        """Return the state of the quantizers."""

    def set_extra_state(self, state: object) -> None:
        """Restore the state of the quantizers."""
