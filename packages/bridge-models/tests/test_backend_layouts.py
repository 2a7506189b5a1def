"""Layers in PyTorch under layouts: every parameter has the same gradient as on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ranks import run_ranks


class Case(NamedTuple):
    """A preset, changed by OVERRIDES, and a layout."""

    preset: str
    sizes: dict[str, int]
    sequence_parallel: bool = False


# Larger weights make attention far from uniform, so that all of its parameters get significant gradients.
OVERRIDES = {
    "tiny": [
        "transformer.init_method_std=0.2",
        "transformer.qk_layernorm=true",
        "transformer.num_query_groups=2",
        "position_embedding_type=rope",
    ],
    "mla-tiny": ["transformer.init_method_std=0.2"],
    "t5-tiny": ["transformer.init_method_std=0.2", "encoder_num_layers=1"],
    "moe-tiny": ["transformer.init_method_std=0.2", "transformer.moe_shared_expert_intermediate_size=32"],
    "mamba-tiny": ["transformer.init_method_std=0.2", "hybrid_layer_pattern=M*"],
}
LAYOUTS = {
    2: {
        "tp": Case("tiny", {"tp": 2}),
        "tp sp": Case("tiny", {"tp": 2}, sequence_parallel=True),
        "cp": Case("tiny", {"cp": 2}),
        "multi-latent tp": Case("mla-tiny", {"tp": 2}),
        "multi-latent tp sp": Case("mla-tiny", {"tp": 2}, sequence_parallel=True),
        "multi-latent cp": Case("mla-tiny", {"cp": 2}),
        "relative positions tp": Case("t5-tiny", {"tp": 2}),
        "relative positions tp sp": Case("t5-tiny", {"tp": 2}, sequence_parallel=True),
        "experts ep": Case("moe-tiny", {"ep": 2}),
        "experts tp sp": Case("moe-tiny", {"tp": 2}, sequence_parallel=True),
        "hybrid tp": Case("mamba-tiny", {"tp": 2}),
        "hybrid tp sp": Case("mamba-tiny", {"tp": 2}, sequence_parallel=True),
        "hybrid cp": Case("mamba-tiny", {"cp": 2}),
        "experts whole, tp sp": Case("moe-tiny", {"tp": 2, "etp": 1}, sequence_parallel=True),
    },
    4: {
        "tp sp cp": Case("tiny", {"tp": 2, "cp": 2}, sequence_parallel=True),
        "hybrid tp sp cp": Case("mamba-tiny", {"tp": 2, "cp": 2}, sequence_parallel=True),
        "multi-latent tp sp cp": Case("mla-tiny", {"tp": 2, "cp": 2}, sequence_parallel=True),
        "experts tp sp ep": Case("moe-tiny", {"tp": 2, "ep": 2}, sequence_parallel=True),
    },
}


def gradients(case: Case) -> list[tuple[Any, Any]]:
    """Run one backward pass; return this rank's parameters by their placement in the whole model, with gradients."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import Document
    from bridge.dist import Layout, create_process_groups
    from bridge.dist.document_layout import replace_layout
    from bridge.dist.engine.placement import named_parameters
    from bridge.dist.engine.weights import draw_weights

    document = Document.load(case.preset, [*OVERRIDES[case.preset], "transformer.num_layers=2"])
    replace_layout(document, case.sizes, sequence_parallel=case.sequence_parallel)
    config = document.config()
    groups = create_process_groups(Layout.of(config.transformer, torch.distributed.get_world_size()))
    model_parallel_cuda_manual_seed(1)

    def draw(stages: list[Any]) -> list[Any]:
        draw_weights(stages, groups, vocab_size=config.vocab_size)
        return stages

    config.pre_wrap_hooks.append(draw)
    builder = config.get_builder_cls()(config)
    (stage,) = builder.build_distributed_models(groups, DistributedDataParallelConfig())
    samples = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(5))
    mine = samples.chunk(groups.dp.size())[groups.dp.rank()]
    builder.forward_step(stage, mine, groups).float().mean().backward()
    finalize_model_grads([stage])
    return [(named.placement, named.parameter.main_grad) for named in named_parameters(stage, groups)]


def save_gradients(folder: Path) -> None:
    """Write the gradients of each whole model, on one rank."""
    import torch

    from bridge.dist import destroy_process_groups

    for preset in OVERRIDES:
        whole = {placement.full_name: gradient for placement, gradient in gradients(Case(preset, {}))}
        torch.save(whole, folder / f"{preset}.pt")
        destroy_process_groups()


def compare_gradients(cases: dict[str, Case], folder: Path) -> dict[str, dict[str, float]]:
    """Return the largest difference of each parameter's gradient, relative to its largest gradient, by case."""
    import torch

    from bridge.dist import destroy_process_groups

    found = {}
    for name, case in cases.items():
        whole = torch.load(folder / f"{case.preset}.pt")
        found[name] = {
            placement.full_name: (
                (gradient - placement.take_shard(whole[placement.full_name])).abs().max()
                / whole[placement.full_name].abs().max()
            ).item()
            for placement, gradient in gradients(case)
        }
        destroy_process_groups()
    return found


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Return the differences from the gradients of one process by case, for each rank."""
    folder = tmp_path_factory.mktemp("gradients")
    run_ranks(save_gradients, 1, folder)
    return {
        name: [rank[name] for rank in ranks]
        for world_size, cases in LAYOUTS.items()
        for ranks in [run_ranks(compare_gradients, world_size, cases, folder)]
        for name in cases
    }


@pytest.mark.parametrize("name", [name for cases in LAYOUTS.values() for name in cases])
def test_gradients_match_those_of_one_process(name: str, differences: dict[str, list[dict[str, float]]]) -> None:
    for rank in differences[name]:
        assert not {parameter: difference for parameter, difference in rank.items() if not difference < 1e-4}
