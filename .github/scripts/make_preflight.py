#!/usr/bin/env python3
"""Write docs/preflight.md: every pre-flight rule, with what it says of the setup that its test refuses.

make_preflight.py            from the packages that are installed
make_preflight.py --check    fails if that would change the page
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/preflight.md"

sys.path.insert(0, str(ROOT / "tests"))
from test_preflight import EVERY_CASE, every_rule, problems  # type: ignore[import-not-found]  # noqa: E402

from bridge.dist.checks.preflight import Rule  # noqa: E402

HEAD = """\
<!-- Written by .github/scripts/make_preflight.py -->

# Pre-flight rules

What is known to fail late, to hang, or to train silently wrong is refused before anything is built: by every
`DistributedModelBuilder`, by `bridge build` and `bridge verify`, and without any rank by

```console
$ uv run bridge validate tiny --layout pp=2,dp=2 --wrap megatron-fsdp
```

An error names the rule that it comes from. For every rule a test shows that what it says to set passes, and, unless the
page says why not, what happens without the rule: real processes fail, or train otherwise than one process does, or as
if something had not been asked for. When a new version of Megatron mends something, that test says so.

A family of models adds rules of its own in the class variable `rules` of its builder; those of models with a ModelOpt
state, of Mamba and of T5 come last.
"""


def section(rule: Rule) -> str:
    """What the page says of a rule."""
    message = problems(EVERY_CASE[rule.name].refused, EVERY_CASE[rule.name].world_size)[0].rpartition(" [")[0]
    origin = f"Seen in {rule.seen}." if rule.seen else "By arithmetic."
    why = " ".join(rule.why.replace("``", "`").split())
    unseen = f" The common test does not show it: {rule.not_shown}." if rule.not_shown else ""
    return f"## {rule.name}\n\n{why} {origin}{unseen}\n\n> {message}\n"


def main(*args: str) -> int:
    """Write the page, or check it."""
    text = "\n".join([HEAD, *map(section, every_rule())])
    if args != ("--check",):
        PAGE.write_text(text)
    elif text != PAGE.read_text():
        print(f"{PAGE.name} does not tell the rules: run make_preflight.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
