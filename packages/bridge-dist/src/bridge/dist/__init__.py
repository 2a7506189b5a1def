"""From a builder to distributed, wrapped, training-ready stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge.config.import_warnings import silence_imports

if TYPE_CHECKING:
    from bridge.dist.checkpoint.load import load_checkpoint
    from bridge.dist.checkpoint.progress import Progress
    from bridge.dist.checkpoint.save import save_checkpoint
    from bridge.dist.checks.document import check_document
    from bridge.dist.document_layout import apply_layout
    from bridge.dist.engine.build import build_distributed, prepare_stages
    from bridge.dist.engine.builder import DistributedModelBuilder
    from bridge.dist.engine.groups import create_process_groups, destroy_process_groups
    from bridge.dist.engine.options import BuildOptions
    from bridge.dist.engine.seeds import seed_random_states
    from bridge.dist.engine.stages import build_stages
    from bridge.dist.layout import Layout
    from bridge.dist.run.world import join_world
    from bridge.dist.wrapper import Wrapper

__all__ = [
    "BuildOptions",
    "DistributedModelBuilder",
    "Layout",
    "Progress",
    "Wrapper",
    "apply_layout",
    "build_distributed",
    "build_stages",
    "check_document",
    "create_process_groups",
    "destroy_process_groups",
    "join_world",
    "load_checkpoint",
    "prepare_stages",
    "save_checkpoint",
    "seed_random_states",
]

silence_imports()  # before megatron-core is imported

_MODULES = {
    "BuildOptions": "engine.options",
    "DistributedModelBuilder": "engine.builder",
    "Layout": "layout",
    "Progress": "checkpoint.progress",
    "Wrapper": "wrapper",
    "apply_layout": "document_layout",
    "build_distributed": "engine.build",
    "build_stages": "engine.stages",
    "check_document": "checks.document",
    "create_process_groups": "engine.groups",
    "destroy_process_groups": "engine.groups",
    "join_world": "run.world",
    "load_checkpoint": "checkpoint.load",
    "prepare_stages": "engine.build",
    "save_checkpoint": "checkpoint.save",
    "seed_random_states": "engine.seeds",
}


def __getattr__(name: str) -> object:
    # The command line imports this package to list its commands, without torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
