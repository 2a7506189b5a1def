"""The builder that restores a ModelOpt state. Importing this module does not import ModelOpt."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.builders import BuildConfigT, ModelT
from bridge.dist import DistributedModelBuilder
from bridge.dist.checks.preflight import Rule
from bridge.models.common.groups import check_global_groups
from bridge.models.errors import CheckpointError, UnsupportedError
from bridge.models.modelopt.checkpoint import find_checkpoint
from bridge.models.modelopt.rules import MODELOPT_RULES


class ModelOptBuilder(DistributedModelBuilder[ModelT, BuildConfigT]):
    """Builder that restores a ModelOpt state and weights before stages are wrapped.

    Example:
        >>> config = GPTModelConfig(transformer=transformer, vocab_size=256, restore_modelopt_state=True)
        >>> model = GPTModelBuilder(config).build_model(pg_collection)  # ModelOpt's layers, to be quantised
        >>> builder = GPTModelBuilder(config, modelopt_checkpoint=folder)
        >>> (stage,) = builder.build_distributed_models(pg_collection, ddp_config)  # restored and wrapped
    """

    rules: ClassVar[tuple[Rule, ...]] = MODELOPT_RULES

    def __init__(
        self, model_config: BuildConfigT, *, modelopt_checkpoint: str | os.PathLike[str] | None = None
    ) -> None:
        """Store the configuration and the checkpoint to restore from.

        Args:
            model_config: The configuration of the model.
            modelopt_checkpoint: The checkpoint, required if ``restore_modelopt_state`` is true: a folder that Megatron
                saved (distributed, ``mp_rank_*``, or several iterations), or a file of ``modelopt.torch.opt.save``.
        """
        super().__init__(model_config)
        self._checkpoint = None if modelopt_checkpoint is None else Path(modelopt_checkpoint)

    def check_restore(self) -> None:
        """Check that a checkpoint with a ModelOpt state is given if, and only if, the configuration asks for one.

        Raises:
            CheckpointError: The checkpoint is missing, has no state, or is not asked for.
            UnsupportedError: ModelOpt is not installed.
        """
        wanted = self._model_config.restore_modelopt_state
        if self._checkpoint is None and wanted:
            raise CheckpointError(
                "restore_modelopt_state is true, but there is no checkpoint to restore from: pass one "
                "(modelopt_checkpoint of the builder, --load of `bridge build`), or set it to false"
            )
        if self._checkpoint is not None and not wanted:
            raise CheckpointError(
                f"restore_modelopt_state is false, but {self._checkpoint} is given to restore from: set it to true, "
                "or pass no checkpoint"
            )
        if self._checkpoint is not None:
            find_checkpoint(self._checkpoint)
            _require_modelopt()

    def restore(self, stages: list[MegatronModule], pg_collection: ProcessGroupCollection) -> list[MegatronModule]:
        """Restore the ModelOpt state of the only stage, then load its weights.

        Raises:
            CheckpointError: The checkpoint does not fit the model.
        """
        if self._checkpoint is None:
            return stages
        state = import_modelopt()
        (stage,) = stages
        return [state.restore_checkpoint(stage, find_checkpoint(self._checkpoint), pg_collection)]

    def _config_to_build(self, pg_collection: ProcessGroupCollection, vp_stage: int | None) -> BuildConfigT:
        """Return the configuration to build a stage from; with a ModelOpt state, a modified copy.

        Raises:
            UnsupportedError: ModelOpt is not installed, or does not support the layout.
        """
        if not self._model_config.restore_modelopt_state:
            return self._model_config
        import_modelopt()
        if vp_stage is not None:
            raise UnsupportedError(
                "ModelOpt does not support virtual pipeline stages: set virtual_pipeline_model_parallel_size to 1"
            )
        check_global_groups(pg_collection, component="ModelOpt")
        config = copy.copy(self._model_config)
        transformer = copy.copy(self.transformer_config)
        transformer.moe_grouped_gemm = False  # ModelOpt requires one module per expert
        setattr(config, "transformer", transformer)  # noqa: B010 - a field of all families
        return config


def import_modelopt() -> ModuleType:
    """Import ``bridge.models.modelopt.state``, which imports ModelOpt and registers TorchAttention with it.

    Raises:
        UnsupportedError: ModelOpt is not installed.
    """
    try:
        # ModelOpt prints, and warns about optional libraries, while it is imported.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            from bridge.models.modelopt import state
    except ImportError as error:
        raise _make_import_error(str(error)) from error
    return state


def _require_modelopt() -> None:
    """Check that ModelOpt is installed without importing it, which takes seconds."""
    try:
        spec = importlib.util.find_spec("modelopt")
    except ImportError as error:
        raise _make_import_error(str(error)) from error
    if spec is None:
        raise _make_import_error("no module named 'modelopt'")


def _make_import_error(why: str) -> UnsupportedError:
    return UnsupportedError(
        f"restore_modelopt_state requires nvidia-modelopt, which cannot be imported ({why}): "
        "install bridge-models[modelopt], or set it to false"
    )
