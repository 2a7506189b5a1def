"""The `bridge` command, whose subcommands are declared by installed distributions.

A distribution declares a click command in the entry-point group `bridge.commands`. Its module must be cheap to import:
`bridge --help` loads every command for its help line.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from io import TextIOWrapper

import click

from bridge.config.errors import BridgeError, did_you_mean
from bridge.config.tracebacks import format_error

GROUP = "bridge.commands"

# The package of each command, for the message if it is not installed.
_PACKAGES = {
    **dict.fromkeys(("build", "verify", "plan", "compare"), "bridge-dist"),
    **dict.fromkeys(("presets", "from-hf", "to-hf", "check-hf", "import-hf", "export-hf"), "bridge-models"),
}
_TRACEBACK = "--traceback"
_DISTRIBUTIONS = ("bridge-config", "bridge-builders", "bridge-dist", "bridge-models", "megatron-core", "torch")


class _Commands(click.Group):
    """The declared commands. One that cannot be loaded fails with the reason when it runs; the others work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_find_commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        point = _find_commands().get(cmd_name)
        if point is None:
            return None
        try:
            command = point.load()
        except Exception as error:  # a plugin's import may fail in any way
            return _make_broken_command(point, f"{type(error).__name__}: {error}")
        if not isinstance(command, click.Command):
            return _make_broken_command(point, "it is not a click command")
        command = copy.copy(command)  # the module's own object must not get the option
        command.params = [*command.params, _make_traceback_option()]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in _find_commands() or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        if name in _PACKAGES:
            ctx.fail(f"{name!r} comes with {_PACKAGES[name]}, which is not installed: pip install {_PACKAGES[name]}")
        return ctx.fail(f"no such command {name!r}{did_you_mean(name, {*_find_commands(), *_PACKAGES})}")


def _make_traceback_option() -> click.Option:
    """Return the option --traceback of every command. `main` looks for it among the arguments."""
    return click.Option([_TRACEBACK], is_flag=True, expose_value=False, help="Print the full traceback on errors.")


def _print_versions(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the version of each distribution from its metadata: importing torch would take seconds."""
    if not value or ctx.resilient_parsing:
        return
    for name in _DISTRIBUTIONS:
        try:
            click.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            click.echo(f"{name} is not installed")
    ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Print the versions of Bridge's packages, megatron-core and torch.",
)
def bridge() -> None:
    """Check, show and convert model configurations, and build distributed models from them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `bridge` command.

    Exit codes: 0 success, 1 an error, 2 wrong usage, 128 + N ended by signal N.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # documents are UTF-8, but file names may not be
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        with _exit_on_signals():
            bridge(args=arguments, prog_name="bridge")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            click.echo(f"the output cannot be written: {error.strerror}", err=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at exit
        elif _TRACEBACK in (sys.argv[1:] if arguments is None else arguments):
            raise
        elif isinstance(error, BridgeError):
            click.echo(str(error), err=True)
        else:
            click.echo(f"{format_error(error)}\n({_TRACEBACK} prints the full traceback)", err=True)
        sys.exit(1)


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Exit on SIGINT and SIGTERM by an exception, so that child processes are ended and temporary files removed."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, _exit) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    raise SystemExit(128 + number)


@cache
def _find_commands() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _make_broken_command(point: EntryPoint, reason: str) -> click.Command:
    """Return a replacement for a command that cannot be loaded, which fails with the reason."""
    owner = point.dist.name if point.dist else point.value

    def fail(arguments: tuple[str, ...]) -> None:
        raise click.ClickException(f"the command {point.name!r} of {owner} cannot be loaded: {reason}")

    return click.Command(
        point.name,
        callback=fail,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        help=f"(cannot be loaded: {reason})",
    )
