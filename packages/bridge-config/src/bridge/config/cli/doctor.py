"""`bridge doctor`.

The packages above add findings in the entry-point group `bridge.doctor`. Versions are read from metadata: importing
torch would take seconds.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, entry_points, version
from itertools import groupby

import click

from bridge.config.cli.entry import BRIDGE_PACKAGES, COMMAND_PACKAGES
from bridge.config.cli.output import print_json
from bridge.config.diagnosis import GROUP, Finding

# Libraries, and what they are for.
_LIBRARIES = {
    "megatron-core": "comes with bridge-builders",
    "torch": "comes with bridge-builders",
    "nvidia-cuda-runtime": "CUDA, as torch brings it",
    "transformer-engine": "layers for GPUs, and FP8",
    "mamba-ssm": "kernels of Mamba layers for GPUs, with causal-conv1d",
    "causal-conv1d": "kernels of Mamba layers for GPUs, with mamba-ssm",
    "nvidia-modelopt": "reads quantised models: pip install 'bridge-models[modelopt]'",
    "transformers": "its models, to compare with",
    "bokeh": "pages of bridge plan and compare: pip install 'bridge-dist[page]'",
    "tokenizers": "tokens of a Hugging Face folder: pip install 'bridge-dist[tokenizers]'",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show what is installed, which devices and launcher variables there are, and what follows.

    The exit code is 1 if something is wrong.
    """
    findings = [*_find_installed(), *_collect_findings()]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print_findings(findings)
    if any(finding.is_problem for finding in findings):
        ctx.exit(1)


def _find_installed() -> Iterator[Finding]:
    yield Finding(section="Python", name="version", value=platform.python_version())
    yield Finding(section="Python", name="program", value=sys.executable)
    for name in BRIDGE_PACKAGES:
        commands = [command for command, package in COMMAND_PACKAGES.items() if package == name]
        adds = f"adds bridge {', '.join(commands)}: pip install {name}" if commands else f"pip install {name}"
        yield _find_distribution("Packages", name, missing=adds)
    for name, purpose in _LIBRARIES.items():
        yield _find_distribution("Libraries", name, missing=purpose)


def _find_distribution(section: str, name: str, *, missing: str) -> Finding:
    try:
        return Finding(section=section, name=name, value=version(name))
    except PackageNotFoundError:
        return Finding(section=section, name=name, value="not installed", meaning=missing)


def _collect_findings() -> Iterator[Finding]:
    """Yield the findings of the packages above; a function that fails is a problem."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            yield from point.load()()
        except Exception as error:  # a plugin may fail in any way
            message = f"{type(error).__name__}: {error}"
            yield Finding(section="Problems", name=point.name, value="failed", meaning=message, is_problem=True)


def _print_findings(findings: Iterable[Finding]) -> None:
    formatter = click.get_current_context().make_formatter()
    for section, members in groupby(findings, key=lambda finding: finding.section):
        with formatter.section(section):
            formatter.write_dl([(finding.name, _format_finding(finding)) for finding in members])
    click.echo(formatter.getvalue().strip("\n"))


def _format_finding(finding: Finding) -> str:
    text = f"{finding.value}: {finding.meaning}" if finding.meaning else finding.value
    return f"PROBLEM: {text}" if finding.is_problem else text
