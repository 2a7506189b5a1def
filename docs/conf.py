"""Sphinx configuration: MyST pages, API pages from docstrings. `.ci/run` turns warnings into errors (`-W`)."""

from importlib import metadata

project = "Bridge"
author = "the Bridge maintainers"
release = metadata.version("bridge-config")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Bridge"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
default_role = "code"
