"""Write and check one document for each combination of settings, and print the command that runs each.

    python sweep.py base.yaml out transformer.num_layers=8,16 transformer.hidden_size=512,768 -- sbatch train.sbatch

Needs bridge-config alone, no torch.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from bridge.config import BridgeError, Document


def main() -> int:
    """Return 1 if a combination is invalid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the document that all combinations share")
    parser.add_argument("folder", type=Path, help="where the documents are written")
    parser.add_argument("settings", nargs="+", metavar="PATH=VALUE,VALUE...", help="values to combine")
    own, command = split_command(sys.argv[1:])
    arguments = parser.parse_args(own)

    arguments.folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}  # by fingerprint
    failed = False
    for overrides in combine(arguments.settings):
        name = "_".join(override.rpartition(".")[2].replace("=", "-") for override in overrides)
        try:
            document = Document.load(arguments.base, overrides)
            fingerprint = document.fingerprint()  # checks the document, too
        except BridgeError as error:
            print(f"{name}: skipped\n{error}", file=sys.stderr)
            failed = True
            continue
        if fingerprint in written:
            print(f"{name}: the same model as {written[fingerprint].name}", file=sys.stderr)
            continue
        written[fingerprint] = arguments.folder / f"{name}.yaml"
        document.save(written[fingerprint])
        print(shlex.join([*command, str(written[fingerprint])]))
    return int(failed)


def split_command(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split arguments at ``--``: this program's own, and the command to print."""
    position = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:position], arguments[position + 1 :] or ["bridge", "build"]


def combine(settings: list[str]) -> Iterator[list[str]]:
    """Yield the overrides of each combination of ``path=value,value...``."""
    choices = []
    for setting in settings:
        path, _, values = setting.partition("=")
        choices.append([f"{path}={value}" for value in values.split(",")])
    for chosen in itertools.product(*choices):
        yield list(chosen)


if __name__ == "__main__":
    sys.exit(main())
