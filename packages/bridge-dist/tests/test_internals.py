"""Private names of torch and megatron-core that bridge-dist uses exist in the installed versions."""

from __future__ import annotations

import inspect
import pkgutil

import pytest
from megatron.core.tensor_parallel import random
from ranks import run_ranks

from bridge.dist import destroy_process_groups
from bridge.dist.internals import (
    MEGATRON_ATTRIBUTES,
    MEGATRON_MESSAGE,
    MEGATRON_NAMES,
    PRIVATE_NAMES,
    PRIVATE_NAMES_OF_PLANS,
    TESTED_THROUGHOUT,
    TORCH,
)
from bridge.dist.plan.virtual_rank.state import STATE

MAMBA_WITHOUT_A_GPU = (2, 8)
NAMES_OF_STATE = dict.fromkeys(STATE, "plan.virtual_rank.state: is put back after a plan")
NEEDED = PRIVATE_NAMES | MEGATRON_NAMES | NAMES_OF_STATE
if TORCH >= TESTED_THROUGHOUT:
    NEEDED |= PRIVATE_NAMES_OF_PLANS


@pytest.mark.parametrize("name", NEEDED)
def test_private_names_exist(name: str) -> None:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"there is no {name}, which bridge-dist uses ({NEEDED[name]}): {error}")


def attributes_of_built_models() -> set[str]:
    """Build and train two models; return which of the listed attributes their modules, parameters and groups have."""
    from bridge.config import Document
    from bridge.dist import create_process_groups
    from bridge.dist.job import BuildJob
    from bridge.dist.run.execute import build_and_train
    from bridge.dist.train.optimizer import set_up_optimizer
    from bridge.dist.train.step import TrainOptions
    from bridge.dist.train.text import find_default_text
    from bridge.dist.wrapper import Wrapper

    found: set[str] = set()
    predicting = ["position_embedding_type=rope", "transformer.mtp_num_layers=1"]
    hybrids = [Document.load("hybrid-tiny")] if TORCH >= MAMBA_WITHOUT_A_GPU else []
    for document in (Document.load("moe-tiny", predicting), *hybrids):
        training = TrainOptions(steps=1, text=find_default_text(), seq_length=16, global_batch_size=1)
        job = BuildJob(document=document.data, wrapper=Wrapper.DDP, training=training)
        config = document.config()
        layout = job.check(config, 1)
        groups = create_process_groups(layout)
        stages = build_and_train(job, config, layout, groups).stages
        with set_up_optimizer(stages) as optimizer:
            objects = [groups, optimizer, *stages[0].modules(), *stages[0].parameters()]
            found |= {name for name in MEGATRON_ATTRIBUTES for one in objects if hasattr(one, name)}
        destroy_process_groups()
    return found


def test_attributes_looked_up_by_name_exist() -> None:
    [found] = run_ranks(attributes_of_built_models, 1)
    assert MEGATRON_ATTRIBUTES.keys() - found == (set() if TORCH >= MAMBA_WITHOUT_A_GPU else {"partition_sizes"})


def test_megatron_still_logs_the_silenced_message() -> None:
    assert MEGATRON_MESSAGE in inspect.getsource(random)
