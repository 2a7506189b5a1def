"""The commands of bridge-config. They check documents against the shipped table and do not need torch."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bridge.config.cli.output import check_output, print_json, print_notes, print_written, write_output
from bridge.config.documents.overrides import is_override, suggest_override
from bridge.config.documents.sources import STANDARD_INPUT, is_preset, is_source
from bridge.config.errors import BridgeError, DocumentError, OmittedWarning, quote_name

# `bridge --help` loads this module for its help lines, so commands import documents where they run.
if TYPE_CHECKING:
    from bridge.config.documents.document import Document
    from bridge.config.errors import Problem
    from bridge.config.read.decode import Checked

    Check = Callable[[Document], list[Problem]]

LAYOUT_CHECKS = "bridge.preflight"
"""The entry-point group of functions that check a document: `(document, sizes, *, wrapper=...) -> problems`."""

_SIZE = re.compile(r"0*[1-9][0-9]{0,8}", re.ASCII)
_FILE = (
    "FILE is a .yaml, .yml or .json file, the name of a preset, a Hugging Face folder, a repository in the Hugging "
    "Face cache (org/name), or - for standard input."
)
_OVERRIDES = "PATH=VALUE overrides a value, ~PATH removes one."
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_overrides = click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")


def _parse_sizes(ctx: click.Context, parameter: click.Parameter, text: str | None) -> dict[str, int] | None:
    """Parse the option --layout into sizes by axis."""
    if text is None:
        return None
    pairs = [part.strip().partition("=") for part in text.split(",")]
    # Fewer sizes than pairs: an axis was given twice, or a size is malformed.
    sizes = {axis: int(size) for axis, _, size in pairs if _SIZE.fullmatch(size)}
    if len(sizes) < len(pairs):
        raise click.BadParameter(
            f"expected sizes such as tp=2,pp=2 (each axis once, sizes from 1 to 999,999,999), got {quote_name(text)}"
        )
    return sizes


@click.command(
    help=f"""Check documents: every problem with its file, line, column and path.

    {_FILE} PATH=VALUE overrides a value in each of them, ~PATH removes one. No constructors run: problems that only
    Megatron's constructors detect are reported when the model is built.
    """
)
@click.argument("files", nargs=-1, required=True, metavar="FILE... [PATH=VALUE]...")
@click.option(
    "--layout",
    callback=_parse_sizes,
    metavar="AXIS=SIZE,...",
    help="Also check the document against this layout, such as tp=2,pp=2,dp=4. Axes: tp, pp, vp, cp, ep, etp, dp; "
    "axes left out are taken from FILE, dp defaults to 1. Requires bridge-dist.",
)
@click.option("--wrap", help="With --layout: ddp (the default), megatron-fsdp, torch-fsdp2 or none.")
@_as_json
@click.pass_context
def validate(
    ctx: click.Context, files: tuple[str, ...], layout: dict[str, int] | None, wrap: str | None, as_json: bool
) -> None:
    """Check documents."""
    sources, overrides = _split_arguments(files)
    if wrap and layout is None:
        raise click.UsageError("--wrap requires --layout")
    checks = [] if layout is None else _load_layout_checks(layout, wrap)
    verdicts = {source: _check_document(source, overrides, checks) for source in sources}
    for source, (problems, notes) in verdicts.items():
        if not as_json:
            for problem in problems:
                click.echo(str(problem), err=True)
            print_notes(source, notes)
            if not problems:
                click.echo(f"{source}: ok")
    if as_json:
        print_json(
            [
                {"source": source, "ok": not problems, "problems": [asdict(one) for one in problems], "notes": notes}
                for source, (problems, notes) in verdicts.items()
            ]
        )
    if any(problems for problems, _ in verdicts.values()):
        ctx.exit(1)


@click.command(help=f"Print a document with overrides applied, without checking it.\n\n{_FILE} {_OVERRIDES}")
@click.argument("file")
@_overrides
@_as_json
def show(file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a document."""
    from bridge.config.documents.document import Document

    document = Document.load(file, overrides)
    print_notes(file, document.notes)
    click.echo(document.to_json() if as_json else document.to_yaml().rstrip("\n"))


@click.command(
    help=f"""Print the differences between two documents, field by field.

    A field that is left out counts as set to its default. Lines begin with ~ for a changed value, with + or - for a
    value that only the second or the first document has, and with > for a field that a schema version moved or renamed.

    {_FILE} The exit code is 0 whether or not they differ, unless --exit-code is given.
    """
)
@click.argument("first", metavar="FILE")
@click.argument("second", metavar="FILE")
@click.option(
    "--as-written", is_flag=True, help="Distinguish fields that are left out from fields set to their default."
)
@click.option("--exit-code", is_flag=True, help="Exit with code 1 if they differ.")
@_as_json
@click.pass_context
def diff(ctx: click.Context, first: str, second: str, as_written: bool, exit_code: bool, as_json: bool) -> None:
    """Print the differences between two documents."""
    from bridge.config.compare import find_differences

    _check_sources([first, second])
    one, other = (_load_checked(source, defaults=not as_written) for source in (first, second))
    found = list(find_differences(one, other))
    if as_json:
        print_json([asdict(difference) for difference in found])
    else:
        for difference in found:
            click.echo(str(difference))
    if exit_code and found:
        ctx.exit(1)


@click.command(
    help=f"""Print the fingerprint of a document's contents.

    It does not depend on the format (YAML or JSON), the order of keys, the spelling of names, or the machine. A field
    set to its default counts as left out.

    {_FILE} {_OVERRIDES}
    """
)
@click.argument("file")
@_overrides
@_as_json
def fingerprint(file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print the fingerprint of a document."""
    from bridge.config.documents.document import Document

    document = Document.load(file, overrides)
    with _collect_omissions() as omissions:
        found = document.fingerprint()
    notes = document.notes + omissions
    if as_json:
        print_json({"source": file, "fingerprint": found, "notes": notes})
    else:
        print_notes(file, notes)
        click.echo(found)


@click.command()
@click.argument("target", required=False)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the schema to this file.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@_as_json
def schema(target: str | None, output: Path | None, force: bool, as_json: bool) -> None:
    """Print the JSON Schema for documents of TARGET, for use in editors.

    TARGET is the dotted name of a config class; without it, the classes that have a schema are listed. A YAML file
    names its schema in the line "# yaml-language-server: $schema=FILE".
    """
    from bridge.config.schema.jsonschema import list_schema_targets, make_json_schema

    if target is None:
        if output is not None:
            raise click.UsageError("--output requires TARGET")
        known = list_schema_targets()
        if as_json:
            print_json(known)
        else:
            for name, doc in known.items():
                click.echo(f"{name}\n    {doc}")
        return
    check_output(output, force=force)
    write_output(json.dumps(make_json_schema(target), indent=2, ensure_ascii=False), output)


@click.command(
    help=f"""Convert a document to the current format, print it, and report the changes.

    The document may have an older schema version. It may also come from megatron.training or Megatron Bridge (the
    output of as_dict, or the run_config.yaml of a checkpoint), or hold the arguments from a Megatron-LM checkpoint,
    exported as JSON.

    {_FILE}
    """
)
@click.argument("file")
@click.option(
    "--write", is_flag=True, help="Change FILE in place. Comments stay, except on the lines of moved or removed values."
)
@click.option(
    "--to",
    "to_form",
    type=click.Choice(["run-config"]),
    help="Print it as a run_config.yaml, which megatron.training and Megatron Bridge read.",
)
@_as_json
def migrate(file: str, write: bool, to_form: str | None, as_json: bool) -> None:
    """Print a document in the current format."""
    from bridge.config.documents.document import Document

    if write and to_form:
        raise click.UsageError("--write and --to cannot be combined: use one of them")
    if write and (file == STANDARD_INPUT or is_preset(file)):
        raise click.UsageError(f"--write changes a file, got {file!r}: leave it out and redirect the output")
    document = Document.load(file)
    with _collect_omissions() as omissions:
        document.check()  # first, since migrating stops at the first problems that it meets
    notes = document.migrate() + omissions
    if write:
        document.save()
    if to_form:
        from bridge.config.canonical import canonicalize
        from bridge.config.foreign.run_config import to_run_config

        with _collect_omissions():  # already reported by the check
            converted = to_run_config(canonicalize(document.data))
        document, notes = Document({"model": converted.data}), [*notes, *converted.notes]
    print_notes(file, notes)
    if write:
        print_written(Path(file))
    else:
        click.echo(document.to_json() if as_json else document.to_yaml().rstrip("\n"))


def _split_arguments(arguments: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Split arguments into files and overrides."""
    overrides = [argument for argument in arguments if is_override(argument)]
    sources = [argument for argument in arguments if not is_override(argument)]
    if not sources:
        raise click.UsageError("at least one FILE is required")
    _check_sources(sources)
    for source in sources[1:]:
        if not is_source(source) and (suggestion := suggest_override(source)):
            raise click.UsageError(
                f"{source!r} is neither a file nor a preset: to override a value, write {suggestion}"
            )
    return sources, overrides


def _check_sources(sources: list[str]) -> None:
    """Refuse standard input given twice, since it can be read only once."""
    if sources.count("-") > 1:
        raise click.UsageError("standard input (-) can be read only once: name a file")


def _check_document(source: str, overrides: list[str], checks: list[Check]) -> tuple[list[Problem], list[str]]:
    """Return the problems of a document, and notes about its conversion to the current format."""
    from bridge.config.documents.document import Document

    with _collect_omissions() as omissions:
        try:
            document = Document.load(source, overrides)
            notes = document.notes + document.check().present.notes
            problems = [problem for check in checks for problem in check(document)]
        except DocumentError as error:
            return error.problems, omissions
    return problems, notes + omissions


def _load_layout_checks(layout: dict[str, int], wrap: str | None) -> list[Check]:
    """Load the installed checks of documents against a layout."""
    points = entry_points(group=LAYOUT_CHECKS)
    if not points:
        raise click.UsageError("--layout requires bridge-dist, which is not installed: pip install bridge-dist")
    wrapper = {"wrapper": wrap} if wrap else {}

    def check(document: Document, function: Callable[..., list[Problem]]) -> list[Problem]:
        try:
            return function(document, layout, **wrapper)
        except BridgeError as error:  # an unknown axis or wrapper
            raise click.UsageError(str(error)) from error

    return [partial(check, function=point.load()) for point in points]


def _load_checked(source: str, *, defaults: bool) -> Checked:
    """Load and check a document; print notes about values that it leaves out."""
    from bridge.config.documents.document import Document

    document = Document.load(source)
    with _collect_omissions() as omissions:
        checked = document.check(defaults=defaults)
    print_notes(source, document.notes + omissions)
    return checked


@contextlib.contextmanager
def _collect_omissions() -> Iterator[list[str]]:
    """Collect the OmittedWarnings raised inside into the yielded list, filled on exit; other warnings pass."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", OmittedWarning)
        yield notes
    for warning in caught:
        if issubclass(warning.category, OmittedWarning):
            notes += [text for text in [str(warning.message)] if text not in notes]
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
