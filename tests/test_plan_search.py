"""A search of layouts: each is planned, and those that fit are ranked."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import pytest

from bridge.config import Document
from bridge.dist.document_layout import replace_layout
from bridge.dist.errors import PlanError
from bridge.dist.plan.forecast.machine import Machine
from bridge.dist.plan.forecast.ranking import Candidate
from bridge.dist.plan.forecast.search import search
from bridge.dist.plan.plan import PlanOptions, plan
from bridge.dist.train.batch import Batch


def test_a_search_plans_every_layout_and_ranks_those_that_fit() -> None:
    document = Document.load("moe-tiny")
    limit = 4_000_000
    options = PlanOptions(
        batch=Batch(seq_length=64, global_batch_size=16), world_size=4, gpu_memory=limit, distributed_optimizer=True
    )
    watched: list[tuple[Candidate | str, int]] = []

    def watch(outcomes: Iterator[Candidate | str], total: int) -> Iterator[Candidate | str]:
        for outcome in outcomes:
            watched.append((outcome, total))
            yield outcome

    found = search(document, options, Machine(), fixed={"tp": 1}, processes=2, watch=watch)
    assert len(watched) == found.tried
    assert {total for _, total in watched} == {found.tried}
    assert found.tried == found.refused + found.too_large + len(found.candidates)
    assert found.too_large
    seconds = [candidate.seconds for candidate in found.candidates]
    assert seconds == sorted(seconds)
    for candidate in found.candidates:
        again = deepcopy(document)
        sizes = {axis: size for axis, size in candidate.plan.layout.items() if axis not in ("dp", "etp")}
        replace_layout(again, sizes, sequence_parallel=False)
        assert plan(again, options).stages == candidate.plan.stages
        assert candidate.plan.worst.total_bytes <= limit
        assert candidate.seconds == pytest.approx(sum(candidate.parts.values()))
    assert found.to_json()["kind"] == "search"
    why = found.explain_ranking()
    assert why is not None
    assert why.startswith(f"{found.candidates[0].name} is faster than {found.candidates[1].name}: ")
    with pytest.raises(PlanError, match=r"no layout of 4 GPUs fits"):
        search(document, replace(options, gpu_memory=1000), Machine(), fixed={"tp": 1, "pp": 1}, processes=1)
    odd = replace(options, batch=Batch(seq_length=64, global_batch_size=3))
    with pytest.raises(PlanError, match=r"0 too large\n\d+ are refused because the global batch of 3 samples does not"):
        search(document, odd, Machine(), fixed={"tp": 1, "pp": 1}, processes=1)
