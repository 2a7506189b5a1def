"""A release of one package: a dry run of the script, its checks, and the metadata of all packages."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from environments import PACKAGES, build_wheels

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".github/scripts/release.py"
RELEASE = runpy.run_path(str(SCRIPT))
ReleaseError = RELEASE["ReleaseError"]


def git(*arguments: str, cwd: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_a_dry_run_releases_one_package_and_changes_nothing() -> None:
    before = git("rev-parse", "HEAD"), git("tag", "--list"), git("status", "--porcelain")
    command = [sys.executable, str(SCRIPT), "bridge-config", "0.9.0", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "version    0.1.0 -> 0.9.0\ntag        bridge-config-v0.9.0; no other package changed\n" in done.stdout
    assert "bridge_config-0.9.0-py3-none-any.whl, twice, sha256 " in done.stdout
    assert "bridge_config-0.9.0.tar.gz, twice, sha256 " in done.stdout
    assert "installed  alone in a new environment, outside the workspace\n" in done.stdout
    assert "bridge-models requires bridge-config<0.2,>=0.1: widen its range and release it too" in done.stdout
    assert (git("rev-parse", "HEAD"), git("tag", "--list"), git("status", "--porcelain")) == before


def test_two_builds_of_every_wheel_are_equal(wheels: dict[str, Path], tmp_path: Path) -> None:
    again = build_wheels(tmp_path)
    assert [name for name in PACKAGES if wheels[name].read_bytes() != again[name].read_bytes()] == []


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a repository with two packages and one commit."""
    for package in PACKAGES[:2]:
        folder = tmp_path / "packages" / package
        folder.mkdir(parents=True)
        (folder / "pyproject.toml").write_text(f'[project]\nname = "{package}"\nversion = "1.2.0"\n')
        (folder / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0 (2026-11-28)\n\n- A change.\n")
    git("init", "--quiet", cwd=tmp_path)
    commit(tmp_path)
    return tmp_path


def commit(repository: Path) -> None:
    git("add", "--all", cwd=repository)
    who = ("-c", "user.name=test", "-c", "user.email=test@test.example")
    git(*who, "commit", "--quiet", "--message", "change", cwd=repository)


def test_a_tag_names_the_version_and_its_changelog(repository: Path) -> None:
    check_tag = RELEASE["check_tag"]
    assert check_tag(repository, "bridge-config-v1.2.0") == ("bridge-config", "1.2.0")
    with pytest.raises(ReleaseError, match=r"bridge-config has version 1\.2\.0"):
        check_tag(repository, "bridge-config-v1.2.1")
    with pytest.raises(ReleaseError, match="expected PACKAGE-vVERSION"):
        check_tag(repository, "v1.2.0")
    (repository / "packages/bridge-config/CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0 (unreleased)\n")
    with pytest.raises(ReleaseError, match=r"no section ## 1\.2\.0 with a date"):
        check_tag(repository, "bridge-config-v1.2.0")


def test_a_release_that_changes_a_sibling_is_refused(repository: Path) -> None:
    (repository / "packages/bridge-config/CHANGELOG.md").write_text("more\n")
    commit(repository)
    RELEASE["check_siblings"](repository, "bridge-config")
    (repository / "packages/bridge-builders/CHANGELOG.md").write_text("more\n")
    commit(repository)
    with pytest.raises(ReleaseError, match=re.escape("changes packages/bridge-builders/CHANGELOG.md")):
        RELEASE["check_siblings"](repository, "bridge-config")


def test_versions_only_grow() -> None:
    is_next = RELEASE["is_next"]
    assert is_next("0.1.0", "0.1.1")
    assert is_next("0.1.0", "0.1.0"), "the first release"
    assert not is_next("0.2.0", "0.2.0")
    assert not is_next("0.2.0", "0.2.0rc1")


@pytest.mark.parametrize("package", PACKAGES)
def test_metadata_is_complete_and_links_work_anywhere(package: str) -> None:
    folder = ROOT / "packages" / package
    project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert {"description", "readme", "license", "license-files", "authors", "keywords", "classifiers"} <= project.keys()
    assert project["urls"].keys() == {"Documentation", "Repository", "Issues", "Changelog"}
    assert project["requires-python"] == ">=3.12"
    assert all(url.startswith("https://") for url in project["urls"].values())
    links = re.findall(r"\]\(([^)]*)\)", (folder / "README.md").read_text())
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_links_of_the_packages_name_files_of_the_repository() -> None:
    """The address is a placeholder until the repository has one; what follows it must exist."""
    files = [*ROOT.glob("packages/*/README.md"), *ROOT.glob("packages/*/pyproject.toml")]
    pattern = re.escape(RELEASE["PLACEHOLDER"]) + r"repository/(?:blob|tree)/main/([^\s)\"#]+)"
    linked = {path for file in files for path in re.findall(pattern, file.read_text())}
    assert len(linked) > 4
    assert [path for path in linked if not (ROOT / path).exists()] == []


def test_no_file_names_the_host_of_a_registry() -> None:
    hosts = ("py" + "pi.org", "pythonhosted" + ".org")
    listed = subprocess.run(
        ["git", "grep", "--name-only", *(part for host in hosts for part in ("-e", host))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert listed.stdout == ""
