"""Ranks with different inputs raise an error that names ranks and fields, before any collective."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any

import pytest
from ranks import run_ranks

from bridge.dist.checks.agreement import collect_facts, collect_versions

SOON = timedelta(seconds=2)


def message_of(action: Any) -> str:
    from bridge.dist.errors import AgreementError

    try:
        action()
    except AgreementError as error:
        return str(error)
    return ""


def build_changed(changes: dict[int, dict[str, Any]], layout: dict[str, int], ddp: dict[int, dict[str, Any]]) -> str:
    """Build the tiny preset, changed on some ranks; return the error message."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import Document
    from bridge.dist import Layout, create_process_groups
    from bridge.dist.document_layout import apply_layout

    rank = torch.distributed.get_rank()
    document = Document.load("tiny")
    apply_layout(document, layout)
    for path, value in changes.get(rank, {}).items():
        document.set(path, value)
    config = document.config()
    config.pre_wrap_hooks.append(
        lambda stages: stages
    )  # a lambda has no written form, and another address in each process
    groups = create_process_groups(
        Layout(**layout, dp=torch.distributed.get_world_size() // Layout(**layout).world_size)
    )
    model_parallel_cuda_manual_seed(1)
    builder = config.get_builder_cls()(config)
    return message_of(
        lambda: builder.build_distributed_models(groups, DistributedDataParallelConfig(**ddp.get(rank, {})))
    )


def test_ranks_that_agree_build_the_model() -> None:
    assert run_ranks(build_changed, 2, {}, {}, {}) == [""] * 2


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}, {"tp": 2}])
@pytest.mark.parametrize("odd", [0, 3])
def test_a_differing_field_is_named_on_every_rank(layout: dict[str, int], odd: int) -> None:
    found = run_ranks(build_changed, 4, {odd: {"transformer.num_attention_heads": 2}}, layout, {})
    for message in found:
        assert "config.transformer.num_attention_heads is" in message
        assert f"2 on rank {odd}" in message
        assert "4 on rank" in message


def test_all_differing_fields_are_named() -> None:
    changes = {"transformer.hidden_size": 32, "seq_length": 64}
    for message in run_ranks(build_changed, 2, {1: changes}, {}, {1: {"overlap_grad_reduce": True}}):
        assert "config.seq_length is 128 on rank 0, 64 on rank 1" in message
        assert "config.transformer.hidden_size is 64 on rank 0, 32 on rank 1" in message
        assert "options.ddp_config.overlap_grad_reduce is false on rank 0, true on rank 1" in message
        assert "num_layers" not in message


def create_different_groups() -> str:
    import torch

    from bridge.dist import Layout, create_process_groups

    layouts = [Layout(tp=2), Layout(pp=2)]
    return message_of(lambda: create_process_groups(layouts[torch.distributed.get_rank()]))


def test_a_differing_layout_is_named() -> None:
    for message in run_ranks(create_different_groups, 2):
        assert "layout.tp is 2 on rank 0, 1 on rank 1" in message
        assert "layout.pp is 1 on rank 0, 2 on rank 1" in message


def agree_without_rank(absent: int) -> tuple[str, float]:
    """Compare facts on all ranks except one; return the message and the seconds it took."""
    import torch

    from bridge.dist.checks.agreement import agree_in_world

    start = time.monotonic()
    if torch.distributed.get_rank() == absent:
        return "", 0.0
    return message_of(lambda: agree_in_world({"field": "1"}, timeout=SOON)), time.monotonic() - start


@pytest.mark.parametrize("absent", [0, 2])
def test_a_missing_rank_is_named_in_time(absent: int) -> None:
    found = run_ranks(agree_without_rank, 3, absent)
    for rank, (message, seconds) in enumerate(found):
        if rank != absent:
            assert f"rank {absent} did not answer within 2 s" in message
            assert seconds < 15


def agree_without_last_rank() -> str:
    """Compare facts on all ranks except the last, in the groups of a model split by tp and pp."""
    import torch

    from bridge.dist import Layout, create_process_groups
    from bridge.dist.checks import agreement

    groups = create_process_groups(Layout(tp=2, pp=2))
    agreement._GRACE = timedelta(seconds=1)  # real runs wait longer
    if torch.distributed.get_rank() == 3:
        return ""
    if torch.distributed.get_rank() == 2:
        time.sleep(0.5)  # rank 0 waits for this rank, which then waits for rank 3
    return message_of(lambda: agreement.agree_in_groups({"field": "1"}, groups, timeout=SOON))


def test_only_the_silent_rank_is_named() -> None:
    for message in run_ranks(agree_without_last_rank, 4)[:3]:
        assert "rank 3 did not answer" in message


def disagree_through_store(port: int) -> tuple[str, bool]:
    """Disagree through a store that rank 0 serves and then drops; return the message, and whether its loss is named."""
    import torch
    from torch.distributed import TCPStore

    from bridge.dist.checks.agreement import agree

    rank = torch.distributed.get_rank()

    class SlowStore(TCPStore):
        """A store on which rank 1 reads the verdict late."""

        def wait(self, *args: Any) -> None:
            time.sleep(0.5 * rank)
            super().wait(*args)

    store = SlowStore("localhost", port, is_master=rank == 0, wait_for_workers=False)
    message = message_of(lambda: agree({"rank": str(rank)}, store=store, rank=rank, world_size=2))
    if rank == 0:
        del store
        return message, True
    lost = message_of(lambda: agree({}, store=store, rank=rank, world_size=2))
    return message, "lost the connection to the store of the job" in lost


def test_rank_0_keeps_the_store_open_and_its_loss_is_named() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for message, named in run_ranks(disagree_through_store, 2, port):
        assert "rank is 0 on rank 0, 1 on rank 1" in message
        assert named


def agree_repeatedly(times: int) -> int:
    """Compare facts many times; return the number of keys that this added to the store."""
    import torch
    from torch.distributed.distributed_c10d import _get_default_store

    from bridge.dist.checks.agreement import agree_in_world

    for _ in range(3):
        agree_in_world({"field": "1"})
    torch.distributed.barrier()
    before = _get_default_store().num_keys()
    torch.distributed.barrier()
    for _ in range(times):
        agree_in_world({"field": "1"})
    torch.distributed.barrier()
    return int(_get_default_store().num_keys() - before)


def test_keys_do_not_accumulate_in_the_store() -> None:
    assert max(run_ranks(agree_repeatedly, 2, 50)) < 10


def test_facts_are_reproducible_and_show_changes() -> None:
    from bridge.config import Document

    config = Document.load("tiny").config()
    assert collect_facts(config=config) == collect_facts(config=Document.load("tiny").config())
    config.transformer.init_method_std = 0.5
    assert collect_facts(config=config)["config.transformer.init_method_std"] == "0.5"


def test_versions_include_every_relevant_package() -> None:
    assert {"bridge-config", "bridge-dist", "megatron-core", "python", "torch"} <= collect_versions().keys()
