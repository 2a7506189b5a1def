"""CUDA graphs of layers are deleted with the process groups; graphs themselves need a GPU and are stand-ins here."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.cuda_graphs import CudaGraphManager, _CudagraphGlobalRecord, _CudaGraphRunner

from bridge.dist import cpu
from bridge.dist.engine.groups import destroy_process_groups
from bridge.dist.engine.release import remember_cuda_graphs


class Graph:
    """A captured graph."""


@pytest.fixture
def layer() -> Iterator[torch.nn.Module]:
    """A layer that megatron-core computes with a graph."""
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    config.cuda_graph_impl = "local"
    one_stage = SimpleNamespace(pp=SimpleNamespace(size=lambda: 1))
    with cpu.cpu_runtime():
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)  # without a GPU, no other one is accepted
        layer = torch.nn.Module()
        layer.cudagraph_manager = CudaGraphManager(config, pg_collection=one_stage)
        yield layer
        initialize_rng_tracker(force_reset=True)


def test_captured_graphs_are_deleted_with_the_groups(layer: torch.nn.Module) -> None:
    runner = _CudaGraphRunner(layer, 0, [], {}, layer.forward, need_backward=True)
    layer.cudagraph_manager.cudagraph_runners.append(runner)
    runner.fwd_graph, runner.bwd_graph = Graph(), Graph()
    graphs = [weakref.ref(runner.fwd_graph), weakref.ref(runner.bwd_graph)]
    _CudagraphGlobalRecord.cudagraph_created = True
    remember_cuda_graphs([torch.nn.ModuleList([layer])])
    destroy_process_groups()
    assert [graph() for graph in graphs] == [None, None]
    assert not _CudagraphGlobalRecord.cudagraph_created
    assert CudaGraphManager.global_mempool is None  # the next model captures its own graphs
