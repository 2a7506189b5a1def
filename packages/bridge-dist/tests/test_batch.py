"""Valid numbers of microbatches are those that Megatron's interleaved schedule accepts."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import TransformerConfig

from bridge.dist import Layout
from bridge.dist.cpu import cpu_runtime
from bridge.dist.errors import TrainingError
from bridge.dist.train.batch import Batch


class AcceptedError(Exception):
    """The schedule has accepted the number of microbatches."""


class Chunk(torch.nn.Module):
    """A virtual stage that stops the schedule: its model type is read once before the checks and again after them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.asked = 0

    def model_type(self) -> ModelType:
        self.asked += 1
        if self.asked > 1:
            raise AcceptedError
        return ModelType.encoder_or_decoder


def does_schedule_accept(microbatches: int, group_size: int, pp: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether the checks of Megatron's schedule pass, for groups that have only a rank and a size."""
    monkeypatch.setattr(schedules, "get_model_type", Chunk.model_type)
    group = SimpleNamespace(size=lambda: pp, rank=lambda: 0)
    config = TransformerConfig(num_layers=4, hidden_size=8, num_attention_heads=1)
    config.microbatch_group_size_per_vp_stage = group_size
    config.batch_p2p_comm = False
    model = [Chunk(config)] * 2
    communicator = SimpleNamespace(
        pp_group=group, virtual_pipeline_model_parallel_size=2, config=config, total_model_chunks=2
    )
    groups = SimpleNamespace(tp=group, cp=group, embd=None, pos_embd=None, pp=group, dp_cp=group, dp=group)
    try:
        with cpu_runtime():
            schedules.forward_backward_pipelining_with_interleaving(
                forward_step_func=None,
                data_iterator=[None, None],
                model=model,
                num_microbatches=microbatches,
                seq_length=8,
                micro_batch_size=1,
                forward_only=False,
                p2p_communicator=communicator,
                pg_collection=groups,
            )
    except AcceptedError:
        return True
    except (ValueError, RuntimeError) as error:
        if "contiguous micro-batches" not in str(error):
            raise
        return False
    raise AssertionError("the schedule ran")


def test_valid_microbatch_counts_match_megatrons_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = {}
    for pp, group_size, microbatches in itertools.product((2, 3, 4), range(2, 7), range(1, 15)):
        if group_size < pp:
            continue  # refused by the rule interleaving-group-size
        batch = Batch(seq_length=8, global_batch_size=microbatches)
        try:
            taken = batch.count_microbatches(Layout(pp=pp, vp=2), group_size=group_size) == microbatches
        except TrainingError:
            taken = False
        assert taken == does_schedule_accept(microbatches, group_size, pp, monkeypatch), (pp, group_size, microbatches)
        verdicts[pp, group_size, microbatches] = taken
    assert not verdicts[2, 3, 4]
    assert verdicts[2, 4, 7]
