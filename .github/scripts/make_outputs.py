#!/usr/bin/env python3
"""Write what commands print to docs/outputs and README.md, which show it, and a picture of the page of a plan.

make_outputs.py            runs the commands and writes what they print, where it differs by more than measured values
make_outputs.py --check    fails if it would write something; draws no picture, but compares the page it was made of

Each command runs in a fork of a process that has imported Megatron. Lines of shell with a pipe run as they are.
docs/outputs/search.txt is of November 2026, and not made here: the command takes half a minute.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bridge.config.cli.entry import main as run_bridge
from bridge.dist.plan.layers import Layers, list_first_imports
from bridge.dist.process.imports import import_megatron

ROOT = Path(__file__).parents[2]
OUTPUTS = ROOT / "docs" / "outputs"
PICTURE = OUTPUTS / "plan.png"
SIZE = "1280,1370"  # as far as the schedule of a step
BROWSERS = ("chromium-headless-shell", "chromium")
COMMANDS = {
    "build": "bridge build tiny --nproc 2 --tp 2 --steps 3",
    "verify": "bridge verify tiny --nproc 2 --only tp2",
    "plan": (
        "bridge plan llama-3.1-8b --machine h100 --tp 2 --pp 2 --dp 16 --distributed-optimizer "
        "--global-batch-size 512 transformer.sequence_parallel=true --html plan.html"
    ),
    "compare": "bridge compare tp2.json tp4.json",
    "export-hf": "bridge export-hf checkpoint -o tiny-hf",
    "check-hf": "bridge check-hf tiny-hf --tp 2",
    "import-hf": "bridge import-hf tiny-hf -o imported",
    "validate": "bridge validate tiny transformer.num_layer=8 transformer.bf16=maybe vocab_size=many",
    "diff": "bridge diff llama-3-8b llama-3.1-8b",
    "doctor": "bridge doctor",
    "fingerprint": "bridge fingerprint tiny",
    "from-hf": "bridge to-hf qwen3-0.6b | bridge from-hf -",
    "migrate": "bridge migrate tiny --to run-config",
    "presets": "bridge presets | head -n 9",
    "schema": "bridge schema | head -n 6",
    "show": "bridge show tiny transformer.num_layers=8",
    "to-hf": "bridge to-hf tiny",
    "to-megatron-lm": "bridge to-megatron-lm gpt2-124m",
}
PLAN = "bridge plan llama-3.1-8b --gpus 16 --machine h100 --distributed-optimizer --json"
BEFORE = {
    "compare": [f"{PLAN} --tp 2 --global-batch-size 8 > tp2.json", f"{PLAN} --tp 4 --global-batch-size 4 > tp4.json"],
    "export-hf": ["bridge build tiny --save checkpoint"],
}
"""Commands that make the files of others."""
BUILDS = ("build", "verify")
PLANS = ("plan", "compare")
PROGRESS = re.compile(r"\d+ of \d+: ")
# In a build: resident memory of ranks, times, and what follows from them. In a plan: how long it took. In a comparison:
# rounding.
MEASURED = re.compile(r"(?<= )\d\.\d{3}(?= │$)|[\d.,]+(?= s\b)|(?<=second: )[\d,]+ \([\d,]+|\d\.\de[-+]\d\d", re.M)
SHOWN = re.compile(r"(?<=<!-- docs/outputs/)(\w+)(\.txt -->\n```console\n).*?(?=```)", re.S)


def run_all(folder: Path) -> None:
    """Run all commands in a folder; write what NAME prints to NAME.txt there."""
    os.environ |= {
        "COLUMNS": "80",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    os.chdir(folder)
    builds = start(lambda: run_group(import_for_builds, BUILDS))
    os.waitpid(start(lambda: run_group(import_for_plans, PLANS)), 0)
    others = [name for name in COMMANDS if name not in BUILDS + PLANS]
    os.waitpid(start(lambda: run_group(import_for_builds, others)), 0)
    os.waitpid(builds, 0)


def import_for_builds() -> None:
    """Import Megatron as commands do that compute on the CPU."""
    import_megatron(with_compiler=False)


def import_for_plans() -> None:
    """Import Megatron as commands do that plan layers of Transformer Engine."""
    for module in list_first_imports(Layers.TRANSFORMER_ENGINE):
        import_module(module)


def run_group(import_libraries: Callable[[], None], names: Iterable[str]) -> None:
    """Run commands one after another that need the same imports, which take longer than most of them."""
    import_libraries()
    for name in names:
        run(name)


def run(name: str) -> None:
    """Run a command, and those that it needs."""
    for line in BEFORE.get(name, []):
        command, _, file = line.partition(" > ")
        run_line(command, file or os.devnull)
    run_line(COMMANDS[name], f"{name}.txt")


def run_line(line: str, file: str) -> None:
    """Run a command with its output in a file; what it prints to standard error too, unless it prints JSON."""
    with open(file, "wb") as out, open(os.devnull, "wb") as nowhere:
        err = nowhere if "--json" in line else out
        if "|" in line:
            subprocess.run(line, shell=True, stdout=out, stderr=err)
            return

        def run_forked() -> None:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = line.split()
            with contextlib.suppress(SystemExit):
                run_bridge()

        os.waitpid(start(run_forked), 0)


def start(work: Callable[[], object]) -> int:
    """Do something in a fork of this process; return the number of the fork."""
    if process := os.fork():
        return process
    try:
        work()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


def read_output(name: str) -> str:
    """Return the command line and what the command printed."""
    printed = Path(f"{name}.txt").read_text()
    if name == "doctor":
        printed = printed.replace(str(ROOT), "/home/ada/bridge")
    lines = (line.rstrip() for line in printed.splitlines() if not PROGRESS.match(line))
    # Long lines would scroll sideways.
    command = " \\\n    ".join(textwrap.wrap(f"$ {COMMANDS[name]}", 76, break_on_hyphens=False))
    return "\n".join([command, *lines]) + "\n"


def mask(name: str, text: str) -> str:
    """Replace measured values. Of `bridge doctor` only the names remain: the values are those of a machine."""
    if name == "doctor":
        return "\n".join(re.findall(r"^(?: {2}\S+(?: \S+)*(?= {2})|\w+:$)", text, re.M))
    return MEASURED.sub("#", text)


def identify_page(page: Path) -> str:
    """Return a hash of what the picture shows: style and contents before the tables, without scripts."""
    text = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.S)
    return hashlib.sha256(text.partition('<section id="numbers">')[0].encode()).hexdigest()


def draw(page: Path) -> None:
    """Take the picture of a page in a browser. It holds the hash of what it shows, as its field `page`."""
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--user-data-dir=browser", "--hide-scrollbars", "--virtual-time-budget=5000"]
    command += [f"--window-size={SIZE}", "--screenshot=picture.png", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    field = PngInfo()
    field.add_text("page", identify_page(page))
    Image.open("picture.png").convert("RGB").quantize(
        256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
    ).save(PICTURE, optimize=True, pnginfo=field)


def is_current(page: Path) -> bool:
    """Return whether the picture was made of this page."""
    if not PICTURE.exists():
        return False
    with Image.open(PICTURE) as picture:
        return picture.info.get("page") == identify_page(page)


def show(readme: str) -> str:
    """Return the text of README.md with the current outputs."""
    return SHOWN.sub(lambda found: found[1] + found[2] + (OUTPUTS / f"{found[1]}.txt").read_text(), readme)


def update(*, checks: bool) -> Iterator[str]:
    """Write what is out of date, or only yield what is."""
    for name in COMMANDS:
        page, text = OUTPUTS / f"{name}.txt", read_output(name)
        if page.exists() and mask(name, text) == mask(name, page.read_text()):
            continue
        yield f"{page.name} is out of date, {COMMANDS[name]} prints:\n{text}"
        if not checks:
            page.write_text(text)
    if not is_current(Path("plan.html")):
        yield f"{PICTURE.name} shows another page than bridge plan --html writes"
        if not checks:
            draw(Path("plan.html"))
    readme = ROOT / "README.md"
    if (shown := show(readme.read_text())) != readme.read_text():
        yield "README.md shows other outputs than docs/outputs"
        if not checks:
            readme.write_text(shown)


def main(*args: str) -> int:
    """Write the outputs, or check them."""
    checks = args == ("--check",)
    with tempfile.TemporaryDirectory() as folder:
        run_all(Path(folder))
        problems = list(update(checks=checks))
        os.chdir(ROOT)
    print(*problems, sep="\n")
    if problems and checks:
        print("run make_outputs.py")
    return int(checks and bool(problems))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
