"""The layers that a plan is made with. Importing this module imports no torch."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path

from bridge.config import Document
from bridge.dist.errors import PlanError
from bridge.dist.process.gpu_libraries import has_stand_in, replace_library

_LIBRARY = "transformer_engine"


class Layers(StrEnum):
    """Whose layers a plan counts."""

    TRANSFORMER_ENGINE = "transformer-engine"
    """Those of Transformer Engine, modelled if it is not installed."""

    PYTORCH = "pytorch"
    """Bridge's layers in PyTorch."""

    INSTALLED = "installed"
    """Those that a build on this machine uses, without its GPUs."""


def choose_layers(document: Document, asked: Layers | None) -> Layers:
    """Return the layers that are asked for or, by default, those that the model has on a GPU.

    Those are Transformer Engine's, unless the document sets ``transformer_impl: local``.
    """
    if asked is not None:
        return asked
    # A configuration of another package may hold the field itself.
    transformer = document.data.get("transformer", document.data)
    is_local = isinstance(transformer, dict) and transformer.get("transformer_impl") == "local"
    return Layers.PYTORCH if is_local else Layers.TRANSFORMER_ENGINE


def prepare_process(layers: Layers) -> None:
    """Let this process plan with layers: call it before megatron-core is imported.

    Raises:
        PlanError: megatron-core was imported for other layers.
    """
    if layers is Layers.TRANSFORMER_ENGINE and "megatron.core" not in sys.modules:
        replace_library(_LIBRARY, Path(__file__).with_name(_LIBRARY))
    check_process(layers)


def list_first_imports(layers: Layers) -> list[str]:
    """Return the modules that another process must import first to plan with layers."""
    return ["bridge.dist.plan.preload_transformer_engine"] if layers is Layers.TRANSFORMER_ENGINE else []


def check_process(layers: Layers) -> None:
    """Check that this process can plan with layers.

    Raises:
        PlanError: It cannot.
    """
    if has_stand_in(_LIBRARY) == (layers is Layers.TRANSFORMER_ENGINE):
        return
    raise PlanError(
        f"this process imported megatron-core for other layers than {layers}, which cannot be changed: "
        f'call prepare_process(Layers("{layers}")) of bridge.dist.plan.layers before anything imports megatron-core, '
        "or plan in a new process"
    )
