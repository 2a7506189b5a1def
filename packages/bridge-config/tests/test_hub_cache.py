"""A repository id stands for its folder in the Hugging Face cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.config import Document, DocumentError
from bridge.config.documents.hub_cache import resolve_repository

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def put(cache: Path) -> str:
    """Put a repository into a cache, and return its folder."""
    snapshot = cache / "models--some-org--A.model_1" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    return str(snapshot)


@pytest.mark.parametrize(
    ("variables", "cache"),
    [
        ({}, ".cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/huggingface/hub"),
        ({"HF_HOME": "~/home", "XDG_CACHE_HOME": "{}/xdg"}, "home/hub"),
        ({"HF_HUB_CACHE": "$HOME/mine", "HF_HOME": "~/home"}, "mine"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    variables: dict[str, str], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    folder = put(tmp_path / cache)
    assert resolve_repository("some-org/A.model_1") == folder
    with pytest.raises(DocumentError, match=f"nor is it in the Hugging Face cache, {tmp_path / cache}: "):
        resolve_repository("some-org/other")


def test_a_repository_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"no such file or folder; .*download it with `hf download some-org/other`"):
        Document.load("some-org/other")
    put(tmp_path / ".cache/huggingface/hub")
    reference = tmp_path / ".cache/huggingface/hub/models--some-org--A.model_1/refs/main"
    for commit in ("f" * 40, "../../..", ""):  # its download did not end, or the cache is broken
        reference.write_text(commit)
        with pytest.raises(DocumentError, match="hf download"):
            resolve_repository("some-org/A.model_1")


@pytest.mark.parametrize("source", ["-", "tiny", "./org/name", "org/name/", "a/b/c", "org/model.yaml", "/org/name"])
def test_other_sources_are_left_alone(source: str) -> None:
    assert resolve_repository(source) == source


def test_a_folder_of_this_name_comes_first(tmp_path: Path) -> None:
    put(tmp_path / ".cache/huggingface/hub")
    (tmp_path / "some-org" / "A.model_1").mkdir(parents=True)
    assert resolve_repository("some-org/A.model_1") == "some-org/A.model_1"
