"""Find a repository of the Hugging Face Hub in its cache on this machine. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path as FilePath

from bridge.config.documents.sources import SUFFIXES, make_source_error, suggest_source

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_repository(source: str) -> str:
    """Return the folder in the cache that holds the branch main of a repository, such as `org/name`.

    Anything that is no such name, or an existing path, is returned as it is.

    Raises:
        DocumentError: the repository is not in the cache.
    """
    if not _REPOSITORY.fullmatch(source) or FilePath(source).suffix in SUFFIXES or os.path.lexists(source):
        return source
    cache = _find_cache()
    repository = cache / f"models--{source.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = ""
    snapshot = repository / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        message = f"no such file or folder{suggest_source(source)}; nor is it in the Hugging Face cache, {cache}: "
        raise make_source_error(source, f"{message}if it is a repository, download it with `hf download {source}`")
    return str(snapshot)


def _find_cache() -> FilePath:
    """Return the folder in which huggingface_hub 2.4 keeps repositories, from the same environment variables."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given is None:
        parent = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        home = os.environ.get("HF_HOME") or os.path.join(parent, "huggingface")
        given = os.path.join(home, "hub")
    return FilePath(os.path.expandvars(given)).expanduser()
