"""What `bridge build` does on each rank: join the world, build, train, report."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection

from bridge.config import ModelConfig
from bridge.dist.checks.agreement import collect_facts, collect_versions
from bridge.dist.engine.groups import create_process_groups, destroy_process_groups
from bridge.dist.job import BuildJob
from bridge.dist.layout import Layout
from bridge.dist.run.collect import collect_report
from bridge.dist.run.execute import build_and_train
from bridge.dist.run.report import BuildReport
from bridge.dist.run.world import join_world


def run_rank(job: BuildJob) -> BuildReport:
    """Run a job as one rank of the world that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Collective: every rank gets the same job, which was checked, and returns the same report. Rank 0 shows progress on
    standard error, where also goes what Megatron prints.
    """
    with join_job(job) as (config, layout, groups):
        run = build_and_train(job, config, layout, groups, show_steps=True)
        return collect_report(job, config, run, layout, groups)


@contextlib.contextmanager
def join_job(job: BuildJob) -> Iterator[tuple[ModelConfig, Layout, ProcessGroupCollection]]:
    """Join the world that the environment describes with a job's configuration and process groups.

    They are left after a success only, see ``world``. The job was checked (``BuildJob.check``) by the process that
    started the ranks, or by each rank that a launcher started; the build checks once more what depends on the process.
    """
    with contextlib.redirect_stdout(sys.stderr), join_world(facts(job=job, versions=versions())):
        config = ModelConfig.from_dict(job.document)
        layout = job.finalize(config, torch.distributed.get_world_size())
        groups = create_process_groups(layout, embedding_ranks=job.embedding_ranks(config))
        yield config, layout, groups
        destroy_process_groups()
