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
import warnings
from collections.abc import Iterator, Sequence
from functools import cache, partial
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from io import TextIOWrapper
from typing import Any

import click

from bridge.config.errors import BridgeError, OmittedWarning, did_you_mean
from bridge.config.tracebacks import format_error

GROUP = "bridge.commands"

BRIDGE_PACKAGES = ("bridge-config", "bridge-builders", "bridge-dist", "bridge-models")
COMMAND_PACKAGES = {
    **dict.fromkeys(("build", "verify", "plan", "search", "compare"), "bridge-dist"),
    **dict.fromkeys(("presets", "from-hf", "to-hf", "check-hf", "import-hf", "export-hf"), "bridge-models"),
}
_TRACEBACK = "--traceback"
_EXIT_AGAIN_S = 0.2
# What `bridge` without arguments prints: tasks, and a command for each.
_FIRST_COMMANDS = {
    "See what is installed here": "bridge doctor",
    "List the models that come with it": "bridge presets",
    "Train a tiny one for three steps": "bridge build tiny --steps 3",
    "Split it over two processes": "bridge build tiny --nproc 2 --tp 2",
    "Compare layouts with one process": "bridge verify tiny --nproc 4",
    "Plan a job for 64 GPUs": "bridge plan llama-3.1-8b --gpus 64 --tp 4",
    "Convert a Hugging Face folder": "bridge from-hf FOLDER -o my-model.yaml",
    "Check a document": "bridge validate my-model.yaml",
    "Print it with a change": "bridge show my-model.yaml PATH=VALUE",
}


class _Commands(click.Group):
    """The declared commands. One that cannot be loaded fails with the reason when it runs; the others work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_find_commands())

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands with whole sentences; click cuts them off at the width of the terminal."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(name, command.get_short_help_str(limit=500)) for name, command in commands.items() if command]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

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
        if name in COMMAND_PACKAGES:
            package = COMMAND_PACKAGES[name]
            ctx.fail(f"{name!r} comes with {package}, which is not installed: pip install {package}")
        return ctx.fail(f"no such command {name!r}{did_you_mean(name, {*_find_commands(), *COMMAND_PACKAGES})}")


def _make_traceback_option() -> click.Option:
    """Return the option --traceback of every command. `main` looks for it among the arguments."""
    return click.Option([_TRACEBACK], is_flag=True, expose_value=False, help="Print the full traceback on errors.")


def _print_versions(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the version of each distribution from its metadata: importing torch would take seconds."""
    if not value or ctx.resilient_parsing:
        return
    for name in (*BRIDGE_PACKAGES, "megatron-core", "torch"):
        try:
            click.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            click.echo(f"{name} is not installed")
    ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Print the versions of Bridge's packages, megatron-core and torch.",
)
@click.pass_context
def bridge(ctx: click.Context) -> None:
    """Check, show and convert model configurations, and build distributed models from them."""
    if ctx.invoked_subcommand is None:
        _print_first_commands(ctx)


def _print_first_commands(ctx: click.Context) -> None:
    """Print what to do first, with the commands that are installed."""
    rows = {task: line for task, line in _FIRST_COMMANDS.items() if line.split()[1] in _find_commands()}
    formatter = ctx.make_formatter()
    formatter.write("Bridge turns a configuration file into a distributed Megatron-Core model.\n\n")
    with formatter.indentation():
        formatter.write_dl(list(rows.items()), col_max=40)
    formatter.write("\n")
    if missing := sorted({package for name, package in COMMAND_PACKAGES.items() if name not in _find_commands()}):
        formatter.write_text(f"More commands come with {' and '.join(missing)}: pip install {missing[-1]}")
    formatter.write_text("bridge --help lists all commands, bridge COMMAND --help explains one.")
    click.echo(formatter.getvalue().rstrip("\n"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `bridge` command.

    Exit codes: 0 success, 1 an error, 2 wrong usage, 128 + N ended by signal N.
    """
    if sys.stdout is None:  # the next file that is opened would take its place, and get what is printed
        click.echo("standard output is closed: redirect it to a file or to /dev/null", err=True)
        sys.exit(1)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # documents are UTF-8, but file names may not be
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        with _exit_on_signals(), _show_omissions_as_notes():
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
def _show_omissions_as_notes() -> Iterator[None]:
    """Print each OmittedWarning once, as a note. Python would repeat it, each time with a line of click's code."""
    show, shown = warnings.showwarning, set[str]()

    def show_once(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if not issubclass(category, OmittedWarning):
            show(message, category, *place, **options)
        elif str(message) not in shown:
            shown.add(str(message))
            click.echo(f"note: {message}", err=True)

    warnings.showwarning = show_once
    try:
        yield
    finally:
        warnings.showwarning = show


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Exit on SIGINT and SIGTERM by an exception, so that child processes are ended and temporary files removed."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, _exit) for number in numbers}
    report, sys.unraisablehook = sys.unraisablehook, _report_other_exceptions
    try:
        yield
    finally:
        sys.unraisablehook = report
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    signal.signal(signal.SIGALRM, partial(_exit_again, 128 + number))
    signal.setitimer(signal.ITIMER_REAL, _EXIT_AGAIN_S, _EXIT_AGAIN_S)
    raise SystemExit(128 + number)


def _report_other_exceptions(swallowed: Any) -> None:
    """Report what Python swallows in a callback, as of a weak reference, but not the exit, which is raised again."""
    if not issubclass(swallowed.exc_type, SystemExit):
        sys.__unraisablehook__(swallowed)


def _exit_again(code: int, number: int, frame: object) -> None:
    """Exit unless that is under way: a library may have caught the exception, as `except:` around an import does."""
    handled = sys.exception()
    while handled is not None and not isinstance(handled, SystemExit):
        handled = handled.__context__
    if handled is None:
        raise SystemExit(code)


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
