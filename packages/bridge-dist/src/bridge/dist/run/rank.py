"""A rank of `bridge build`: join the world, build, train, report."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection

from bridge.config import ModelConfig, OmittedWarning
from bridge.dist.checks.agreement import collect_facts, collect_versions
from bridge.dist.engine.groups import create_process_groups, destroy_process_groups
from bridge.dist.job import BuildJob
from bridge.dist.layout import Layout
from bridge.dist.run.collect import collect_report
from bridge.dist.run.execute import build_and_train
from bridge.dist.run.report import BuildReport
from bridge.dist.run.world import join_world


def run_rank(job: BuildJob) -> BuildReport:
    """Run a job as one rank of the world that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR and others).

    Collective: every rank gets the same checked job and returns the same report. Progress (on rank 0) and Megatron's
    output go to standard error.
    """
    with join_job(job) as (config, layout, groups):
        run = build_and_train(job, config, layout, groups, show_steps=True)
        return collect_report(job, config, run, layout, groups)


@contextlib.contextmanager
def join_job(job: BuildJob) -> Iterator[tuple[ModelConfig, Layout, ProcessGroupCollection]]:
    """Join the world that the environment describes, and yield the job's configuration, layout and process groups.

    The groups are destroyed only on success, see ``join_world``. The job was checked (``BuildJob.check``) by the
    process that started the ranks, or by each rank under a launcher; the build repeats the checks that depend on the
    process.
    """
    with (
        contextlib.redirect_stdout(sys.stderr),
        warnings.catch_warnings(action="ignore", category=OmittedWarning),  # the check of the job has reported them
        join_world(collect_facts(job=job, versions=collect_versions())),
    ):
        config = ModelConfig.from_dict(job.document)
        layout = job.finalize(config, torch.distributed.get_world_size())
        groups = create_process_groups(layout, embedding_ranks=job.find_embedding_ranks(config))
        yield config, layout, groups
        destroy_process_groups()
