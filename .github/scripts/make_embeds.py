#!/usr/bin/env python3
"""Write bridge.builders.embeds, which declares the fields of megatron-core's TransformerConfig for type checkers.

make_embeds.py            writes the file from the installed megatron-core
make_embeds.py --check    fails if that would change the file
"""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron.core.transformer.transformer_config import TransformerConfig

FILE = Path(__file__).parents[2] / "packages/bridge-builders/src/bridge/builders/embeds.py"

TEMPLATE = '''\
"""EmbedsTransformer, which declares the fields of an embedded TransformerConfig for type checkers."""

# Written by .github/scripts/make_embeds.py
# ruff: noqa: N815

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge.config import WriteThrough

if TYPE_CHECKING:
    {imports}


class EmbedsTransformer(WriteThrough):
    """Mixin for a dataclass with a required field `transformer: TransformerConfig`, whose fields it exposes.

    At run time this is `WriteThrough`. For type checkers it also declares the fields of megatron-core's
    `TransformerConfig`, so that `config.num_layers` is an int and `config.num_layer` is an error. The constructor takes
    only the fields of the dataclass. Fields that a subclass of `TransformerConfig` adds are typed only on
    `config.transformer`.
    """

    if TYPE_CHECKING:
        {declarations}
'''


class Source:
    """Formats annotations as source text and collects the imports that the text needs."""

    def __init__(self) -> None:
        self._imports: defaultdict[str, set[str]] = defaultdict(set)

    def list_imports(self) -> list[str]:
        """Return the import statements. Top-level packages such as torch are imported as a whole."""
        return [
            f"from {module} import {', '.join(sorted(names))}" if names else f"import {module}"
            for module, names in sorted(self._imports.items())
        ]

    def format_hint(self, hint: Any) -> str:
        """Return the source of a type hint. A generic without arguments gets Any."""
        origin, args = get_origin(hint), get_args(hint)
        if origin in (Union, UnionType):
            return " | ".join(self.format_hint(arg) for arg in args)
        if origin is Literal:
            return f"{self._format_name(Literal)}[{', '.join(map(repr, args))}]"
        if origin is Callable:
            return f"{self._format_name(Callable)}[{self._format_signature(args)}]"
        if origin or hint is list:
            return f"{self._format_name(origin or hint)}[{', '.join(self.format_hint(arg) for arg in args or (Any,))}]"
        return "None" if hint is NoneType else self._format_name(hint)

    def _format_signature(self, args: tuple[Any, ...]) -> str:
        parameters, result = args or (..., Any)
        inputs = "..." if parameters is ... else f"[{', '.join(map(self.format_hint, parameters))}]"
        return f"{inputs}, {self.format_hint(result)}"

    def _format_name(self, named: Any) -> str:
        module, name = named.__module__, named.__qualname__
        if module == "builtins":
            return str(name)
        names = self._imports[module]
        if "." not in module and module != "typing":
            return f"{module}.{name}"
        names.add(name)
        return str(name)


def generate() -> str:
    """Return the text of the module."""
    source, hints = Source(), get_type_hints(TransformerConfig)
    declarations = [
        f"{field.name}: {source.format_hint(hints[field.name])}"
        for field in fields(TransformerConfig)
        if not field.name.startswith("_")
    ]
    text = TEMPLATE.format(imports="\n    ".join(source.list_imports()), declarations="\n        ".join(declarations))
    for command in (["check", "--select", "I", "--fix"], ["format"]):
        text = run_ruff(*command, text=text)
    return text


def run_ruff(*command: str, text: str) -> str:
    """Return a text after a ruff command that changes it."""
    line = [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", str(FILE), "-"]
    return subprocess.run(line, input=text, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(*args: str) -> int:
    """Write the file, or check it."""
    text = generate()
    if args == ("--check",):
        if FILE.read_text() == text:
            return 0
        print(f"{FILE.name} does not match the installed megatron-core: run make_embeds.py")
        return 1
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
