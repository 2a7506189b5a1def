"""The parameters of a whole model, and how parallelism divides them."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from bridge.config import Document
from bridge.dist.cpu import on_meta
from bridge.dist.document_layout import replace_layout
from bridge.dist.engine.environment import disable_cuda_graphs
from bridge.dist.engine.placement import named_parameters
from bridge.dist.engine.stages import build_stages
from bridge.dist.job import make_builder
from bridge.dist.layout import Layout
from bridge.dist.plan.virtual_rank.groups import act_as_rank

_LAYER = re.compile(r"((?!mtp\b)\w+)\.layers\.(\d+)\.")


class ModelParameter(NamedTuple):
    """A parameter of the whole model.

    ``layer`` names the layer that it belongs to, and is empty for those outside the layers that a pipeline divides.
    ``split_dim`` is the dimension that tensor parallelism splits; None if every rank has the whole.
    """

    name: str
    shape: torch.Size
    layer: str
    split_dim: int | None


def list_parameters(document: Document) -> list[ModelParameter]:
    """Return the parameters of a document's model in order, built on the meta device without its layout."""
    whole = deepcopy(document)
    replace_layout(whole, {}, sequence_parallel=False)
    with on_meta(), act_as_rank(Layout(), 0) as groups:
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = whole.config()
        finalize = getattr(config, "finalize", None)
        if finalize is not None:
            finalize()
        builder = make_builder(config)
        disable_cuda_graphs(builder.transformer_config)
        builder.transformer_config.perform_initialization = False  # meta tensors have no values
        [stage] = build_stages(builder.build_model, groups, vp_size=None)
        return [
            ModelParameter(
                placement.full_name,
                placement.full_shape,
                found[0] if (found := _LAYER.match(placement.full_name)) else "",
                placement.dim if getattr(parameter, "tensor_model_parallel", False) else None,
            )
            for placement, parameter, _ in named_parameters(stage, groups)
        ]
