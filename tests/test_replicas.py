"""Ranks compare their copies of parameters after hooks, and the copies' gradients."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from bridge.dist.errors import CopyError

ADAPTER = Path(__file__).parent / "typing" / "extension" / "src" / "bigram" / "adapter.py"


def freeze_by_name(stages: list[Any]) -> list[Any]:
    """A common mistake: the copy on the last stage has another name."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if "word_embeddings" in name:
                parameter.requires_grad_(False)
    return stages


def freeze_both(stages: list[Any]) -> list[Any]:
    for stage in stages:
        stage.shared_embedding_or_output_weight().requires_grad_(False)
    return stages


def train_biases_only(stages: list[Any]) -> list[Any]:
    """Freeze all matrices, whatever their names."""
    for stage in stages:
        for parameter in stage.parameters():
            parameter.requires_grad_(parameter.dim() == 1)
    return stages


def redraw_first_copy(stages: list[Any]) -> list[Any]:
    for stage in stages:
        if stage.pre_process:
            stage.embedding.word_embeddings.weight.data.normal_()
    return stages


def replace_both(stages: list[Any]) -> list[Any]:
    import torch

    for stage in stages:
        owner = stage.embedding.word_embeddings if stage.pre_process else stage.output_layer
        owner.weight = torch.nn.Parameter(torch.zeros_like(owner.weight))
    return stages


def enlarge(stages: list[Any]) -> list[Any]:
    import torch

    for stage in stages:
        if stage.pre_process:
            old = stage.embedding.word_embeddings.weight
            old.data = torch.cat([old.data, old.data])
    return stages


def untie(stages: list[Any]) -> list[Any]:
    for stage in stages:
        stage.share_embeddings_and_output_weights = False
    return stages


def delete(stages: list[Any]) -> list[Any]:
    for stage in stages:
        if stage.post_process:
            del stage.output_layer.weight
    return stages


def add_separate_weight(stages: list[Any]) -> list[Any]:
    import torch

    for stage in stages:
        stage.output_layer.weight = torch.nn.Parameter(torch.zeros(256, 64))
    return stages


def draw_on_each_rank(stages: list[Any]) -> list[Any]:
    import torch

    torch.manual_seed(torch.distributed.get_rank())
    for stage in stages:
        stage.decoder.final_layernorm.weight.data.normal_()
    return stages


def freeze_on_one_rank(stages: list[Any]) -> list[Any]:
    import torch

    for stage in stages:
        stage.decoder.layers[1].mlp.linear_fc1.weight.requires_grad_(torch.distributed.get_rank() == 0)
    return stages


def add_adapters(stages: list[Any]) -> list[Any]:
    """Add the adapters of the extension guide."""
    add: Callable[[list[Any]], list[Any]] = _load(ADAPTER).add_adapters
    return add(stages)


def add_unmarked_adapters(stages: list[Any]) -> list[Any]:
    """Add the same adapters without tensor-parallel marks and communication."""
    adapter = _load(ADAPTER)
    adapter.set_tensor_model_parallel_attributes = lambda *_, **__: None
    adapter.copy_to_tensor_model_parallel_region = lambda tensor: tensor
    added: list[Any] = adapter.add_adapters(stages)
    for stage in added:
        for name, parameter in stage.named_parameters():
            if ".up." in name:
                parameter.data.fill_(0.1)
    return added


def _load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = {
    hook.__name__: hook
    for hook in (
        freeze_by_name,
        freeze_both,
        train_biases_only,
        redraw_first_copy,
        replace_both,
        enlarge,
        untie,
        delete,
        add_separate_weight,
        draw_on_each_rank,
        freeze_on_one_rank,
        add_adapters,
        add_unmarked_adapters,
    )
}


def train(sizes: dict[str, int], hook: str, *, tied: bool, steps: int = 2) -> str | list[float]:
    """Build a model with a hook and train it; return the losses, or the error."""
    import torch

    from bridge.config import Document
    from bridge.dist import create_process_groups
    from bridge.dist.document_layout import apply_layout
    from bridge.dist.job import BuildJob
    from bridge.dist.run.execute import build_and_train
    from bridge.dist.train.step import TrainOptions
    from bridge.dist.train.text import find_default_text
    from bridge.dist.wrapper import Wrapper

    document = Document.load("tiny", [f"share_embeddings_and_output_weights={tied}".lower()])
    apply_layout(document, sizes)
    training = TrainOptions(steps=steps, text=find_default_text(), seq_length=16, global_batch_size=2)
    job = BuildJob(document=document.data, wrapper=Wrapper.DDP, training=training)
    config = document.config()
    config.pre_wrap_hooks.append(HOOKS[hook])
    layout = job.check(config, torch.distributed.get_world_size())
    try:
        run = build_and_train(job, config, layout, create_process_groups(layout))
    except CopyError as error:
        return str(error)
    return [step.loss for step in run.steps]


def train_tied_on_two_stages(hook: str) -> str | list[float]:
    return train({"pp": 2}, hook, tied=True)


def train_tied_on_one_stage(hook: str) -> str | list[float]:
    return train({}, hook, tied=True)


def train_on_one_rank(hook: str) -> str | list[float]:
    return train({}, hook, tied=False)


def train_on_tensor_parallel_ranks(hook: str) -> str | list[float]:
    return train({"tp": 2}, hook, tied=False)


def test_user_hooks_are_listed_without_those_of_bridge() -> None:
    from bridge.builders import compose_hooks
    from bridge.dist.engine.replicas import list_user_hooks

    names = list_user_hooks([compose_hooks([freeze_both, compose_hooks([])]), freeze_by_name])
    assert names == [f"{__name__}.freeze_both", f"{__name__}.freeze_by_name"]


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        (
            "freeze_by_name",
            "requires_grad is False on embedding.word_embeddings.weight (rank 0), True on output_layer.weight (rank 1)",
        ),
        (
            "redraw_first_copy",
            "different values on embedding.word_embeddings.weight (rank 0), output_layer.weight (rank 1)",
        ),
        ("enlarge", "shape is (512, 64) on embedding.word_embeddings.weight (rank 0), (256, 64) on"),
        ("replace_both", "output_layer.weight was replaced by a parameter without"),
        ("untie", "share_embeddings_and_output_weights was True and is False"),
        ("delete", "missing on output_layer.weight (rank 1)"),
    ],
)
def test_a_hook_that_changes_one_copy_of_a_tied_embedding_is_refused(hook: str, says: str) -> None:
    first, last = run_ranks(train_tied_on_two_stages, 2, hook)
    assert first == last
    assert isinstance(first, str)
    assert "after the pre-wrap hooks (" in first
    assert f"test_replicas.{hook})" in first
    assert says in first


@pytest.mark.parametrize("hook", ["freeze_both", "train_biases_only"])
def test_a_hook_may_change_both_copies_of_a_tied_embedding(hook: str) -> None:
    (whole,) = run_ranks(train_tied_on_one_stage, 1, hook)
    for losses in run_ranks(train_tied_on_two_stages, 2, hook):
        assert losses == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("hook", "says"), [("untie", "is False"), ("add_separate_weight", "output_layer.weight is new but unused")]
)
def test_a_hook_that_unties_on_one_stage_is_refused(hook: str, says: str) -> None:
    (error,) = run_ranks(train_tied_on_one_stage, 1, hook)
    assert isinstance(error, str)
    assert says in error


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        ("draw_on_each_rank", "decoder.final_layernorm.weight differs between tensor-parallel ranks: different values"),
        (
            "freeze_on_one_rank",
            "decoder.layers.1.mlp.linear_fc1.weight differs between tensor-parallel ranks: "
            "requires_grad is True on rank 0, False on rank 1\n  A hook must do the same on every tensor-parallel rank",
        ),
        ("add_unmarked_adapters", "decoder.layers.3.mlp.linear_fc1.down.weight: the gradient on rank 1 differs"),
    ],
)
def test_parameters_that_diverge_across_tensor_parallel_ranks_are_refused(hook: str, says: str) -> None:
    first, second = run_ranks(train_on_tensor_parallel_ranks, 2, hook)
    assert first == second
    assert isinstance(first, str)
    assert says in first
    marking = "set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=DIM, stride=1)"
    assert (marking in first) == (hook != "freeze_on_one_rank")  # of a parameter that is marked


def test_the_adapter_in_the_guide_trains_as_on_one_rank() -> None:
    (whole,) = run_ranks(train_on_one_rank, 1, "add_adapters")
    for losses in run_ranks(train_on_tensor_parallel_ranks, 2, "add_adapters"):
        assert losses == pytest.approx(whole, rel=1e-5)
