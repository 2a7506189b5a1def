"""The start of a command that computes: the device, in this process and those that it starts, and megatron-core."""

from __future__ import annotations

import os

import click

from bridge.dist.process.imports import import_megatron
from bridge.dist.process.messages import start_run
from bridge.dist.run.devices import Device, choose_device, count_gpus, hide_gpus
from bridge.dist.run.pool import StartMethod, start_fork_server
from bridge.dist.run.rank_environment import RankEnvironment


def prepare(asked: Device, place: RankEnvironment | None, *, ranks: int) -> StartMethod:
    """Choose the device, in this process and those it starts, and import megatron-core for it.

    Args:
        asked: What the user asks for.
        place: This process's among the ranks of a launcher; None if it starts them itself.
        ranks: How many it starts.

    Returns:
        How ranks are started that compute on the device.

    Raises:
        LaunchError: There is no GPU for each rank of this machine, and the user asks for it.
    """
    start_run()
    if place is not None:
        os.environ.update(place.as_variables())  # as libraries look for them, under srun too
    local_ranks = ranks if place is None else place.local_world_size
    device = choose_device(asked, local_ranks=local_ranks)
    if device is Device.CUDA:
        import_megatron(with_compiler=place is not None)  # the process that starts ranks computes nothing
        return "spawn"
    if asked is Device.AUTO and (gpus := count_gpus()) and (place is None or place.rank == 0):
        click.echo(f"{local_ranks} ranks, {gpus} GPU(s): computing on the CPU", err=True)
    hide_gpus()
    if place is None:
        start_fork_server(ranks)
    import_megatron(with_compiler=False)
    return "forkserver"
