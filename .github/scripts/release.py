#!/usr/bin/env python3
"""Release one package of the workspace, and no other.

    release.py PACKAGE VERSION            set the version, write the changelog, commit, tag, build and check
    release.py PACKAGE VERSION --dry-run  the same in a clone, which is removed; nothing else changes
    release.py --check-tag TAG            check that a tag names the version of its package (the release workflow)

The wheel is built twice and must be the same to the bit, then installed alone, outside the workspace. Pushing the tag
starts `.github/workflows/release.yml`, which builds again and publishes.
"""

import argparse
import datetime
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PACKAGES = ("bridge-config", "bridge-builders", "bridge-dist", "bridge-models")
UV = os.environ.get("UV") or shutil.which("uv") or "uv"
PLACEHOLDER = "https://bridge.example/"
"""Stands for the address of the repository and of the documentation, which are not decided."""


class ReleaseError(Exception):
    """The release cannot be made; the message says why."""


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command; return its output.

    Raises:
        ReleaseError: It failed; the message has its output.
    """
    # Without the variable, uv uses the environment of the project in `cwd`.
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(command, cwd=cwd, env=kept | (environment or {}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def read_project(root: Path, package: str) -> dict[str, object]:
    """Return the table `project` of a package."""
    project: dict[str, object] = tomllib.loads((root / "packages" / package / "pyproject.toml").read_text())["project"]
    return project


def release(root: Path, package: str, version: str, output: Path) -> None:
    """Make the release in the repository `root`, with the files in `output`."""
    before = str(read_project(root, package)["version"])
    if not is_next(before, version):
        raise ReleaseError(f"{package} has version {before}: expected a later one, got {version}")
    run(UV, "version", version, "--package", package, "--frozen", cwd=root)
    folder = root / "packages" / package
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    towncrier = (sys.executable, "-m", "towncrier", "build", "--yes")
    run(*towncrier, "--version", version, "--date", date, cwd=folder)
    run("git", "add", "--all", "packages", cwd=root)
    run("git", "commit", "--quiet", "--message", f"{package} {version}", cwd=root)
    run("git", "tag", "--annotate", f"{package}-v{version}", "--message", f"{package} {version}", cwd=root)
    check_siblings(root, package)
    check_tag(root, f"{package}-v{version}")
    print(f"version    {before} -> {version}")
    print(f"tag        {package}-v{version}; no other package changed")
    wheel, sdist = build_twice(root, package, output)
    check_wheel(wheel, package, version)
    check_sdist(sdist)
    for file in (wheel, sdist):
        print(f"built      {file.name}, twice, sha256 {hash_file(file)[:16]}...")
    install_alone(root, wheel, package, version)
    print("installed  alone in a new environment, outside the workspace")
    for warning in find_ranges_left(root, package, version):
        print(f"note       {warning}")


def is_next(before: str, version: str) -> bool:
    """Return whether a version may follow another; the first release keeps the version of the tree."""
    return Version(version) > Version(before) or (version == before == "0.1.0")


def check_siblings(root: Path, package: str) -> None:
    """Check that the release commit changes files of one package only.

    Raises:
        ReleaseError: It changes others.
    """
    changed = run("git", "diff", "--name-only", "HEAD~1", "HEAD", cwd=root).splitlines()
    if others := [name for name in changed if not name.startswith(f"packages/{package}/")]:
        raise ReleaseError(f"the release of {package} changes {', '.join(others)}")


def check_tag(root: Path, tag: str) -> tuple[str, str]:
    """Check that a tag names the version of its package, and that its changelog has it; return both.

    Raises:
        ReleaseError: It does not.
    """
    found = re.fullmatch(r"(?P<package>bridge-[a-z]+)-v(?P<version>.+)", tag)
    if found is None or found["package"] not in PACKAGES:
        raise ReleaseError(f"{tag}: expected PACKAGE-vVERSION, with one of {', '.join(PACKAGES)}")
    package, version = found["package"], found["version"]
    if (written := read_project(root, package)["version"]) != version:
        raise ReleaseError(f"{tag}: {package} has version {written}")
    changelog = (root / "packages" / package / "CHANGELOG.md").read_text()
    if re.search(rf"^## {re.escape(version)} \(\d{{4}}-", changelog, re.MULTILINE) is None:
        raise ReleaseError(f"{tag}: the changelog of {package} has no section ## {version} with a date")
    return package, version


def build_twice(root: Path, package: str, output: Path) -> tuple[Path, Path]:
    """Build the wheel and the sdist twice; return them.

    Raises:
        ReleaseError: The builds differ.
    """
    epoch = run("git", "log", "-1", "--format=%ct", cwd=root).strip()
    builds = []
    for folder in (output, output / "again"):
        build = (UV, "build", "--quiet", "--package", package, "--out-dir", folder)
        run(*build, cwd=root, environment={"SOURCE_DATE_EPOCH": epoch})
        builds.append([next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))])
    (wheel, sdist), again = builds
    if differing := [
        one.name for one, other in zip((wheel, sdist), again, strict=True) if hash_file(one) != hash_file(other)
    ]:
        raise ReleaseError(f"two builds differ: {', '.join(differing)}")
    shutil.rmtree(output / "again")
    return wheel, sdist


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_wheel(wheel: Path, package: str, version: str) -> None:
    """Check the metadata of a wheel, and the links of its description.

    Raises:
        ReleaseError: A field is invalid, or a link is relative and works only in the repository.
    """
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")))
    metadata = Metadata.from_email(text, validate=True)
    if (metadata.name, str(metadata.version)) != (package, version):
        raise ReleaseError(f"{wheel.name} is {metadata.name} {metadata.version}")
    description = message_from_bytes(text).get_payload()
    if links := re.findall(r"\]\((?!https://|#)([^)]*)\)", str(description)):
        raise ReleaseError(f"links of {package}'s README work only in the repository: {', '.join(links)}")


def check_sdist(sdist: Path) -> None:
    """Check that an sdist has the changelog, the licence and the tests.

    Raises:
        ReleaseError: It lacks one.
    """
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in ("CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml") if name not in names]
    if missing or not any(name.startswith("tests/test_") for name in names):
        raise ReleaseError(f"{sdist.name} lacks {', '.join(missing) or 'tests'}")


def install_alone(root: Path, wheel: Path, package: str, version: str) -> None:
    """Install a wheel in a new environment outside the workspace, with what it requires, and run `bridge`.

    Siblings that it requires are built from the repository, as they are not published before the first release.

    Raises:
        ReleaseError: It cannot be installed, or does not start.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        siblings = PACKAGES[: PACKAGES.index(package)]
        for sibling in siblings:
            run(UV, "build", "--quiet", "--wheel", "--package", sibling, "--out-dir", folder / "siblings", cwd=root)
        run(UV, "venv", "--quiet", "--no-project", "--python", sys.executable, folder / "venv", cwd=root)
        built = [str(one) for one in (folder / "siblings").glob("*.whl")]
        install = (UV, "pip", "install", "--quiet", "--no-config", "--python", folder / "venv")
        run(*install, wheel, *built, cwd=root)
        run(UV, "pip", "check", "--python", folder / "venv", cwd=root)
        module = package.replace("-", ".")
        run(folder / "venv/bin/python", "-c", f"import {module}", cwd=folder)
        versions = run(folder / "venv/bin/bridge", "--version", cwd=folder).splitlines()
        if f"{package} {version}" not in versions:
            raise ReleaseError(f"the installed bridge has {', '.join(versions)}")
        run(folder / "venv/bin/bridge", "doctor", cwd=folder)


def find_ranges_left(root: Path, package: str, version: str) -> Iterator[str]:
    """Yield the siblings whose range of versions does not have the released one."""
    for sibling in PACKAGES:
        dependencies = read_project(root, sibling)["dependencies"]
        assert isinstance(dependencies, list)
        for requirement in map(Requirement, dependencies):
            if requirement.name == package and not requirement.specifier.contains(version, prereleases=True):
                yield f"{sibling} requires {requirement}: widen its range and release it too"


def check_repository() -> None:
    """Check that a real release can be made here.

    Raises:
        ReleaseError: There are uncommitted changes, or addresses are placeholders.
    """
    if run("git", "status", "--porcelain", cwd=ROOT):
        raise ReleaseError("commit all changes before a release")
    if files := run("git", "grep", "--files-with-matches", PLACEHOLDER, "--", "packages", cwd=ROOT).split():
        raise ReleaseError(f"replace {PLACEHOLDER} by the address of the repository in {', '.join(files)}")


def main() -> int:
    """Release a package, or check a tag."""
    parser = argparse.ArgumentParser(description="Release one package of the workspace, and no other.")
    parser.add_argument("package", nargs="?", choices=PACKAGES)
    parser.add_argument("version", nargs="?")
    parser.add_argument("--dry-run", action="store_true", help="do everything in a clone, which is removed")
    parser.add_argument("--check-tag", metavar="TAG", help="check that a tag names the version of its package")
    options = parser.parse_args()
    try:
        if options.check_tag:
            package, _ = check_tag(ROOT, options.check_tag)
            print(package)
        elif options.version is None:
            parser.error("PACKAGE and VERSION are required")
        elif options.dry_run:
            with tempfile.TemporaryDirectory() as name:
                clone = Path(name) / "clone"
                run("git", "clone", "--quiet", "--shared", ROOT, clone, cwd=Path(name))
                for setting in ("user.name", "user.email"):  # CI has none
                    run("git", "config", setting, "dry-run@bridge.example", cwd=clone)
                release(clone, options.package, options.version, Path(name) / "dist")
            print("dry run: the clone is removed, nothing else has changed")
        else:
            check_repository()
            release(ROOT, options.package, options.version, ROOT / "dist")
            print(f"push it with: git push origin HEAD {options.package}-v{options.version}")
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
