"""Start of a command that computes: choice of the device, and the import of megatron-core."""

from __future__ import annotations

import os

import click

from bridge.dist.process.imports import import_megatron
from bridge.dist.process.messages import start_run
from bridge.dist.run.devices import Device, choose_device, count_gpus, hide_gpus
from bridge.dist.run.pool import StartMethod, start_fork_server
from bridge.dist.run.rank_environment import RankEnvironment


def prepare(asked: Device, place: RankEnvironment | None, *, ranks: int) -> StartMethod:
    """Choose the device for this process and its children, and import megatron-core for it.

    Args:
        asked: The device that the user chose.
        place: This process's rank environment under a launcher; None if it starts the ranks itself.
        ranks: Number of ranks to start.

    Returns:
        The start method of ranks on that device.

    Raises:
        LaunchError: The user chose CUDA, and this machine has fewer GPUs than ranks.
    """
    start_run()
    if place is not None:
        os.environ.update(place.as_variables())  # libraries read torchrun's variables, which srun does not set
    local_ranks = ranks if place is None else place.local_world_size
    device = choose_device(asked, local_ranks=local_ranks)
    if device is Device.CUDA:
        import_megatron(with_compiler=place is not None)  # a process that only starts ranks needs no compiler
        return "spawn"
    if asked is Device.AUTO and (gpus := count_gpus()) and (place is None or place.rank == 0):
        click.echo(f"{local_ranks} ranks, {gpus} GPU(s): computing on the CPU", err=True)
    hide_gpus()
    if place is None:
        start_fork_server(ranks)
    import_megatron(with_compiler=False)
    return "forkserver"
