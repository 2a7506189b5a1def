#!/usr/bin/env python3
"""Write docs/preflight.md: every pre-flight rule, with its message for the setup in its test.

make_preflight.py            writes the page from the installed packages
make_preflight.py --check    fails if that would change the page
"""

import sys
from pathlib import Path

from bridge.dist.process.imports import import_megatron

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/preflight.md"

import_megatron(with_compiler=True)  # quietly, before the tests import it
sys.path.insert(0, str(ROOT / "tests"))
from test_preflight import EVERY_CASE, find_problems, list_rules  # type: ignore[import-not-found]  # noqa: E402

from bridge.dist.checks.preflight import Rule  # noqa: E402

HEAD = """\
<!-- Written by .github/scripts/make_preflight.py -->

# Pre-flight rules

Setups that are known to fail late, to hang, or to train incorrectly without an error are refused before the build.
Every `DistributedModelBuilder`, `bridge build` and `bridge verify` check these rules. This command checks them without
starting ranks:

```console
$ uv run bridge validate tiny --layout pp=2,dp=2 --wrap megatron-fsdp
```

An error names its rule. For every rule, a test shows that the setting it suggests passes. Unless the page says why
not, the test also shows what happens without the rule: real processes fail, train differently from one process, or
ignore a setting. That test fails when a new version of Megatron fixes the fault.

A model family adds its own rules in the class variable `rules` of its builder. The rules for ModelOpt, Mamba and T5
come last.
"""


def make_section(rule: Rule) -> str:
    """Return the section about a rule."""
    message = find_problems(EVERY_CASE[rule.name].refused, EVERY_CASE[rule.name].world_size)[0].rpartition(" [")[0]
    origin = f"Observed in {rule.observed_in}." if rule.observed_in else "Follows from arithmetic."
    why = " ".join(rule.why.replace("``", "`").split())
    unseen = f" The common test does not reproduce the failure: {rule.no_reproduction}." if rule.no_reproduction else ""
    return f"## {rule.name}\n\n{why} {origin}{unseen}\n\n> {message}\n"


def main(*args: str) -> int:
    """Write the page, or check it."""
    text = "\n".join([HEAD, *map(make_section, list_rules())])
    if args != ("--check",):
        PAGE.write_text(text)
    elif text != PAGE.read_text():
        print(f"{PAGE.name} is out of date: run make_preflight.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
