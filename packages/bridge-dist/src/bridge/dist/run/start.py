"""Start of a command that computes: choice of the device, and the import of megatron-core."""

from __future__ import annotations

import os

import click

from bridge.dist.process.imports import import_megatron
from bridge.dist.process.messages import start_run
from bridge.dist.run.devices import UNUSABLE, Device, choose_device, count_gpus, hide_gpus
from bridge.dist.run.pool import StartMethod, share_cores, start_fork_server
from bridge.dist.run.rank_environment import RankEnvironment


def prepare(asked: Device, rank_environment: RankEnvironment | None, *, ranks: int) -> StartMethod:
    """Choose the device for this process and its children, and import megatron-core for it.

    Args:
        asked: The device that the user chose.
        rank_environment: This process's rank environment under a launcher; None if it starts the ranks itself.
        ranks: Number of ranks to start.

    Returns:
        The start method of ranks on that device.

    Raises:
        LaunchError: The user chose CUDA, and this machine has fewer GPUs than ranks, or torch cannot use them.
    """
    start_run()
    if rank_environment is not None:
        # Libraries read torchrun's variables, which srun does not set.
        os.environ.update(rank_environment.as_variables())
    local_ranks = ranks if rank_environment is None else rank_environment.local_world_size
    # A launcher may show each rank another GPU; ranks that this process starts all see the same ones.
    environment = {} if rank_environment is None else os.environ
    device = choose_device(asked, local_ranks=local_ranks, environment=environment)
    if device is Device.CUDA:
        if rank_environment is None:
            share_cores(ranks)
        # A process that only starts ranks needs no compiler.
        import_megatron(with_compiler=rank_environment is not None)
        return "spawn"
    if asked is Device.AUTO and (gpus := count_gpus()) and (rank_environment is None or rank_environment.rank == 0):
        reason = f"{local_ranks} ranks, {gpus} GPU(s)" if (local_ranks or 1) > gpus else UNUSABLE
        click.echo(f"{reason}: computing on the CPU", err=True)
    hide_gpus()
    if rank_environment is None:
        start_fork_server(ranks)
    import_megatron(with_compiler=False)
    return "forkserver"
