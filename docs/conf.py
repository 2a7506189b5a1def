"""Sphinx configuration: MyST pages, API pages from docstrings. `.ci/run` turns warnings into errors (`-W`)."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx

project = "Bridge"
author = "the Bridge maintainers"
project_copyright = f"2026, {author}"
release = metadata.version("bridge-config")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build", "jupyter_execute"]
nb_execution_mode = "force"  # every build runs the notebook
nb_execution_raise_on_error = True
nb_execution_timeout = 300
html_theme = "furo"
html_title = "Bridge"
smartquotes = False  # they turn --option into a dash in help texts
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
default_role = "code"

_NOT_PYTHON = re.compile(r"<(?:[^<>]|<[^<>]*>)*>")  # such as <factory> and <function f.<lambda>>


def clean_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Remove private parameters, and write defaults that are not Python, such as `<factory>`, as `...`."""
    if not signature:
        return None
    parameters = [""]
    depth = 0
    for character in _NOT_PYTHON.sub("...", signature.removeprefix("(").removesuffix(")")):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parameters.append("")
        else:
            parameters[-1] += character
    return f"({','.join(one for one in parameters if not one.strip().startswith('_'))})", returns


def skip_numbered(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out fields of named tuples without a text of their own: the signature has them."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def add_output(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    """Show what a command prints, below its usage."""
    name = context.info_name
    if Path(__file__).with_name("outputs").joinpath(f"{name}.txt").exists():
        lines += ["", f".. literalinclude:: outputs/{name}.txt", "   :language: console", ""]


def write_dashes(app: Sphinx, tree: nodes.document) -> None:
    """Write the dash between a parameter and its description, which Sphinx leaves to smartquotes."""
    for text in list(tree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the functions above."""
    app.connect("autodoc-process-signature", clean_signature)
    app.connect("autodoc-skip-member", skip_numbered)
    app.connect("sphinx-click-process-usage", add_output)
    app.connect("doctree-read", write_dashes)
    return {"parallel_read_safe": True}
