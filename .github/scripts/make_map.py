#!/usr/bin/env python3
"""Write the map in .github/CONTRIBUTING.md: the first sentence of every subpackage and top-level module.

make_map.py            writes the map from the docstrings
make_map.py --check    fails if that would change the page

Both fail if the page mentions a module that does not exist.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / ".github/CONTRIBUTING.md"
BEGIN, END = "<!-- written by .github/scripts/make_map.py -->", "<!-- end -->"
PACKAGES = ("config", "builders", "dist", "models")


def list_modules(package: Path) -> Iterator[Path]:
    """Yield the files on the map: the package, its modules, then its subpackages at any depth."""
    yield package / "__init__.py"
    yield from (file for file in sorted(package.glob("*.py")) if not file.name.startswith("_"))
    yield from sorted(package.glob("*/**/__init__.py"))


def read_first_sentence(file: Path) -> str:
    """Return the first sentence of a file's docstring.

    Raises:
        ValueError: there is no docstring.
    """
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    if not docstring:
        raise ValueError(f"{file}: no docstring")
    paragraph = " ".join(docstring.partition("\n\n")[0].replace("``", "`").split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0]


def make_row(file: Path, source: Path) -> str:
    """Return a row of the table of one package."""
    path = file.parent if file.name == "__init__.py" else file.with_suffix("")
    return f"| `{'.'.join(path.relative_to(source).parts)}` | {read_first_sentence(file).replace('|', r'\|')} |"


def make_table(name: str) -> str:
    """Return the section about one package."""
    source = ROOT / f"packages/bridge-{name}/src"
    rows = [make_row(file, source) for file in list_modules(source / "bridge" / name)]
    return "\n".join([f"### bridge-{name}\n", "| module | what is in it |", "| --- | --- |", *rows])


def find_missing_modules(text: str) -> list[str]:
    """Return the modules that the page mentions outside the map and that do not exist."""
    names = re.findall(r"`(bridge\.(?:config|builders|dist|models)[\w.]*)`", text)
    paths = {name: ROOT / f"packages/bridge-{name.split('.')[1]}/src" / name.replace(".", "/") for name in names}
    return [name for name, path in paths.items() if not (path.is_dir() or path.with_suffix(".py").is_file())]


def main(*args: str) -> int:
    """Write the map, or check it."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    if missing := find_missing_modules(before + after):
        print(f"{PAGE.name} mentions modules that do not exist: {', '.join(missing)}")
        return 1
    made = f"{before}{BEGIN}\n\n{'\n\n'.join(map(make_table, PACKAGES))}\n\n{END}{after}"
    if args != ("--check",):
        PAGE.write_text(made)
    elif made != text:
        print(f"{PAGE.name} is out of date: run make_map.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
