"""The `bridge` command as a process, with an installed extension."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bridge.config.cli.entry import bridge as bridge_command

MODULE = """
from dataclasses import dataclass
from typing import ClassVar

import click

from bridge.config import ConfigError, ModelConfig


@dataclass
class Model(ModelConfig):
    builder: ClassVar[str] = "extension.Builder"
    size: int = 1


@click.command()
def complain():
    "Say that something is wrong."
    raise ConfigError("something is wrong: change it")


@click.command()
def crash():
    "Have a fault."
    [None][0].layers


not_a_command = 3
"""
POINTS = """
[bridge.targets]
extension.Model = extension:Model
[bridge.commands]
complain = extension:complain
crash = extension:crash
odd = extension:not_a_command
broken = extension_without_module:command
[bridge.presets]
any = extension_presets
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return a folder with an installed extension: a config, two presets, a working command and two broken ones."""
    (tmp_path / "extension.py").write_text(MODULE)
    presets = tmp_path / "extension_presets"
    presets.mkdir()
    (presets / "__init__.py").touch()
    (presets / "small-extension.yaml").write_text("_target_: extension.Model\nsize: 3  # three\n")
    (presets / "wrong-extension.yaml").write_text("_target_: extension.Model\nsize: three\nsiz: 1\n")
    info = tmp_path / "extension-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extension\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    return tmp_path


def bridge(site: Path, *arguments: str, given: str | None = None, path: str = ".") -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:0] = ['.', {path!r}]; from bridge.config.cli.entry import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=site, input=given, capture_output=True, text=True, check=False
    )


def test_help_lists_the_commands_of_every_distribution(site: Path) -> None:
    done = bridge(site, "--help")
    assert done.returncode == 0
    for line in ("validate", "show", "complain", "Say that something is wrong."):
        assert line in done.stdout
    assert "broken" in done.stdout
    assert "(cannot be loaded: ModuleNotFoundError" in done.stdout


def test_help_imports_neither_torch_nor_yaml() -> None:
    code = (
        "import sys; from bridge.config.cli.entry import bridge; bridge(['--help'], standalone_mode=False);"
        "print([name for name in ('torch', 'megatron', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "cannot be loaded" not in done.stdout


def test_validate(site: Path) -> None:
    (site / "mine.yaml").write_text("_target_: extension.Model\n")
    done = bridge(site, "validate", "small-extension", "mine.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "small-extension: ok\nmine.yaml: ok\n", "")


def test_validate_reports_every_problem_in_every_file(site: Path) -> None:
    done = bridge(site, "validate", "wrong-extension", "small-extension", "absent.yaml")
    assert done.returncode == 1
    assert done.stdout == "small-extension: ok\n"
    assert done.stderr.splitlines() == [
        "wrong-extension:2:1: $.size: expected an integer, got 'three'",
        "wrong-extension:3:1: $.siz: unknown key of Model; did you mean 'size'?",
        "absent.yaml: no such file",
    ]


def test_validate_as_json(site: Path) -> None:
    done = bridge(site, "validate", "--json", "small-extension", "wrong-extension", "~siz")
    assert done.returncode == 1
    small, wrong = json.loads(done.stdout)
    assert small["ok"] is False, "there is nothing to remove in this one"
    assert wrong == {
        "source": "wrong-extension",
        "ok": False,
        "notes": [],
        "problems": [
            {
                "path": "$.size",
                "message": "expected an integer, got 'three'",
                "file": "wrong-extension",
                "line": 2,
                "column": 1,
            }
        ],
    }


def test_overrides(site: Path) -> None:
    assert bridge(site, "validate", "wrong-extension", "~siz", "size=3").returncode == 0
    done = bridge(site, "validate", "small-extension", "size=big")
    assert done.stderr == "override 'size=big': $.size: expected an integer, got 'big'\n"


def test_show(site: Path) -> None:
    done = bridge(site, "show", "small-extension", "size=1e-5", "+hf_model_id=yes")
    assert done.stdout == "_target_: extension.Model\nsize: 1.0e-05  # three\nhf_model_id: 'yes'\n"
    done = bridge(site, "show", "--json", "small-extension")
    assert json.loads(done.stdout) == {"_target_": "extension.Model", "size": 3}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["complain"], 1, "something is wrong: change it\n"),
        (["broken"], 1, "the command 'broken' of extension cannot be loaded: ModuleNotFoundError"),
        (["odd", "--any", "thing"], 1, "it is not a click command"),
        (["show", "nothing"], 1, "nothing: no such file or preset"),
        (["show", "smal-extension"], 1, "did you mean 'small-extension'?"),
        (["show", "small-extensio.5"], 1, "no such file or preset; did you mean 'small-extension'?"),
        (["show", "small-extension", "b.yaml"], 1, "or ~path to remove (one FILE at a time)"),
        (["show", "small-extension", "size:3"], 1, "malformed: write size=3, or ~path to remove"),
        (["show", "wrong-extensions.yaml"], 1, "no such file; did you mean 'wrong-extension'?"),
        (["show", "./mine.json"], 1, "no such file; did you mean './mine.yaml'?"),
        (["nonsense"], 2, "no such command 'nonsense'"),
        (["valdate"], 2, "no such command 'valdate'; did you mean 'validate'?"),
        (["biuld"], 2, "no such command 'biuld'; did you mean 'build'?"),
        (["validate", "small-extension", "size", "3"], 2, "to override a value, write size=VALUE"),
        (["diff", "-", "-"], 2, "standard input (-) can be read only once: name a file"),
        (["validate", "-", "-"], 2, "standard input (-) can be read only once: name a file"),
        (["validate"], 2, "Missing argument"),
        (["validate", "a=1"], 2, "at least one FILE is required"),
        (["show"], 2, "Missing argument 'FILE'"),
    ],
)
def test_errors_give_a_message_and_an_exit_code(site: Path, arguments: list[str], code: int, message: str) -> None:
    (site / "mine.yaml").write_text("_target_: extension.Model\n")
    done = bridge(site, *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_megatron_lm_arguments_are_read_as_a_document(site: Path) -> None:
    given = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 32, "lr": 0.1}
    args = given | {"padded_vocab_size": 128, "swiglu": True, "params_dtype": "torch.bfloat16", "my_path": None}
    (site / "args.json").write_text(json.dumps(args))
    run = bridge(site, "migrate", "args.json", "--json")
    assert run.returncode == 0
    document = json.loads(run.stdout)
    assert (document["vocab_size"], document["transformer"]["params_dtype"]) == (128, "torch.bfloat16")
    assert run.stderr.splitlines() == [
        "args.json: note: left out, no effect on the model: lr",
        "args.json: note: left out, disabled and unknown to Bridge: my_path",
    ]
    (site / "args.json").write_text(json.dumps(args | {"my_path": "x"}))
    assert "$.my_path: unknown to Bridge" in bridge(site, "validate", "args.json").stderr


def test_migrate_does_not_overwrite_a_megatron_file(site: Path) -> None:
    text = "train: {train_iters: 5}\nmodel:\n  _target_: megatron.bridge.models.gpt_provider.GPTModelProvider\n"
    text += "  num_layers: 2\n  hidden_size: 8\n  num_attention_heads: 2\n"
    (site / "run_config.yaml").write_text(text)
    done = bridge(site, "migrate", "run_config.yaml", "--write")
    assert done.returncode == 1
    assert "the file has other sections, which saving would drop: save to a new file" in done.stderr
    assert (site / "run_config.yaml").read_text() == text
    assert bridge(site, "migrate", "run_config.yaml").returncode == 0


def test_migrate_reports_the_same_problems_as_validate(site: Path) -> None:
    arguments = {
        "num_layers": 4,
        "hidden_size": "64",
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "padded_vocab_size": 256,
        "swiglu": True,
        "squared_relu": True,
    }
    (site / "args.json").write_text(json.dumps(arguments))
    found = [bridge(site, command, "args.json").stderr for command in ("validate", "migrate")]
    assert "hidden_size: expected an integer" in found[0]
    assert "squared_relu: conflicts with swiglu" in found[0]
    assert found[1] == found[0]


def test_an_ambiguous_preset_name_is_refused_and_others_work(site: Path) -> None:
    others = site / "other_presets"
    others.mkdir()
    (others / "__init__.py").touch()
    (others / "small-extension.yaml").write_text("_target_: extension.Model\n")
    (others / "other.yaml").write_text("_target_: extension.Model\n")
    points = site / "extension-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"{POINTS}other = other_presets\n")
    assert bridge(site, "validate", "other").stdout == "other: ok\n"
    done = bridge(site, "show", "small-extension")
    assert done.returncode == 1
    assert "two presets have the name 'small-extension':" in done.stderr
    assert "extension_presets" in done.stderr
    assert "other_presets" in done.stderr


def test_a_broken_distribution_does_not_stop_the_presets_of_others(site: Path) -> None:
    family = site / "broken_family"
    (family / "presets").mkdir(parents=True)
    (family / "__init__.py").write_text("raise ImportError('torch is too old')\n")
    (family / "presets" / "of-broken-family.yaml").write_text("_target_: extension.Model\n")
    info = site / "half_installed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: half-installed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bridge.presets]\na = broken_family.presets\nb = broken_family.absent\n")
    done = bridge(site, "validate", "small-extension", "of-broken-family")
    assert (done.returncode, done.stdout) == (0, "small-extension: ok\nof-broken-family: ok\n"), "neither is imported"
    reason = "the presets of half-installed (broken_family.absent) cannot be read: ImportError: torch is too old"
    assert done.stderr.count(reason) == 1
    done = bridge(site, "validate", "elsewhere")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("elsewhere: no such file or preset; ")
    assert done.stderr.splitlines()[-1].endswith(f"; {reason}")


def test_presets_in_a_zip_file_are_found(site: Path) -> None:
    with zipfile.ZipFile(site / "zipped.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "")
        archive.writestr("zipped/presets/__init__.py", "")
        archive.writestr("zipped/presets/of-zip.yaml", "_target_: extension.Model\n")
    points = site / "extension-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"{POINTS}zipped = zipped.presets\n")
    done = bridge(site, "validate", "of-zip", path="zipped.zip")
    assert (done.returncode, done.stdout, done.stderr) == (0, "of-zip: ok\n", "")


def test_omitted_values_give_a_note(site: Path) -> None:
    omitted = "_target_: extension.Model\n_omitted_: [{path: $.size, reason: a number of the moment}]\n"
    (site / "a.yaml").write_text(omitted)
    said = "the document was written without $.size (a number of the moment): defaults are used"
    note = f"a.yaml: note: {said}\n"
    done = bridge(site, "validate", "a.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "a.yaml: ok\n", note)
    (verdict,) = json.loads(bridge(site, "validate", "--json", "a.yaml").stdout)
    assert verdict["notes"] == [said]
    assert bridge(site, "validate", "a.yaml", "siz=1").stderr.endswith(note)
    assert bridge(site, "diff", "small-extension", "a.yaml").stderr == note
    assert bridge(site, "migrate", "a.yaml").stderr == note
    done = bridge(site, "fingerprint", "a.yaml")
    assert done.stderr == note
    result = json.loads(bridge(site, "fingerprint", "--json", "a.yaml").stdout)
    assert result == {"source": "a.yaml", "fingerprint": done.stdout.strip(), "notes": [said]}


def test_a_schema_replaces_no_file_unasked(site: Path) -> None:
    (site / "model.yaml").write_text("_target_: extension.Model\n")
    write = ("schema", "bridge.models.gpt.GPTModelConfig", "-o", "model.yaml")
    assert bridge(site, *write).stderr == "model.yaml: file exists: give --force to overwrite it, or another name\n"
    assert (site / "model.yaml").read_text() == "_target_: extension.Model\n"
    assert bridge(site, *write, "--force").returncode == 0
    assert json.loads((site / "model.yaml").read_text())["title"] == "GPTModelConfig"
    assert "`bridge schema` lists those that have one" in bridge(site, "schema", "gpt").stderr


def test_a_command_without_a_note_of_its_own_says_once_what_was_left_out(site: Path) -> None:
    (site / "gpt.yaml").write_text(
        "_target_: bridge.models.gpt.GPTModelConfig\nvocab_size: 8\n"
        "transformer: {num_layers: 1, hidden_size: 8, num_attention_heads: 1}\n"
        "_omitted_: [{path: $.transformer.init_method, reason: a lambda}]\n"
    )
    done = bridge(site, "to-megatron-lm", "gpt.yaml")
    said = "the document was written without $.transformer.init_method (a lambda): defaults are used"
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == f"note: {said}"
    assert done.stderr.count(said) == 1


def test_infinity_is_shown_as_readable_json(site: Path) -> None:
    done = bridge(site, "show", "--json", "small-extension", "extra_checkpoint_metadata.a=.inf")
    (site / "a.json").write_text(done.stdout)
    assert bridge(site, "validate", "a.json").returncode == 0
    prints = [
        bridge(site, "fingerprint", *arguments).stdout
        for arguments in (["a.json"], ["small-extension", "extra_checkpoint_metadata.a=.inf"])
    ]
    assert prints[0] == prints[1] != ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["show", "validate"])
def test_a_full_disk_gives_a_message_and_an_exit_code(site: Path, command: str, unbuffered: str) -> None:
    code = "import sys; sys.path.insert(0, '.'); from bridge.config.cli.entry import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, command, "small-extension"],
            cwd=site,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "the output cannot be written: No space left on device\n")


@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        (">&-", "standard output is closed: redirect it to a file or to /dev/null\n"),
        ("<&-", "-: cannot be read: standard input is closed\n"),
        ("0>written", "-: cannot be read: Bad file descriptor\n"),
    ],
)
def test_a_closed_stream_gives_a_message_and_an_exit_code(site: Path, redirection: str, message: str) -> None:
    code = "import sys; from bridge.config.cli.entry import main; main(['validate', '-'])"
    line = f'exec "$0" -c "$1" {redirection}'
    done = subprocess.run(["sh", "-c", line, sys.executable, code], cwd=site, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, message)


def test_output_is_utf_8_in_any_locale(site: Path) -> None:
    code = "import sys; sys.path.insert(0, '.'); from bridge.config.cli.entry import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "show", "small-extension", "hf_model_id=\u2192"],
        cwd=site,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().endswith("hf_model_id: \u2192\n")


@pytest.mark.parametrize("size", ["9" * 5000, "9" * 10, "0", "-1", "1.5", "", "٣"])
def test_invalid_layout_sizes_are_refused(size: str) -> None:
    done = CliRunner().invoke(bridge_command, ["validate", "tiny", "--layout", f"tp={size}"])
    assert (done.exit_code, "expected sizes such as tp=2,pp=2" in done.output) == (2, True)
    assert len(done.output) < 1000


@pytest.mark.parametrize(
    "given", ["_target_: extension.Model\nsize: 4\n", '{"_target_": "extension.Model", "size": 4}']
)
def test_a_document_is_read_from_standard_input(site: Path, given: str) -> None:
    assert bridge(site, "validate", "-", given=given).stdout == "-: ok\n"
    shown = bridge(site, "show", "-", "size=5", "--json", given=given).stdout
    assert json.loads(shown) == {"_target_": "extension.Model", "size": 5}
    assert bridge(site, "fingerprint", "-", given=given).stdout.startswith("sha256:")
    assert bridge(site, "diff", "small-extension", "-", given=given).stdout == "~ size: 3 -> 4\n"
    wrong = bridge(site, "validate", "-", given=given.replace("4", "four"))
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("-:")
    written = bridge(site, "migrate", "-", "--write", given=given)
    assert written.returncode == 2
    assert "--write changes a file, got '-': leave it out and redirect the output" in written.stderr


def test_diff_exit_code_reports_differences_on_request(site: Path) -> None:
    for arguments, code in ([], 0), (["--exit-code"], 1), (["--exit-code", "--json"], 1):
        assert (
            bridge(site, "diff", "small-extension", "-", *arguments, given="_target_: extension.Model").returncode
            == code
        )
    same = bridge(site, "diff", "small-extension", "small-extension", "--exit-code")
    assert (same.returncode, same.stdout) == (0, "")


def test_version_lists_every_package_without_importing_them(site: Path) -> None:
    names = ("bridge-config", "bridge-builders", "bridge-dist", "bridge-models", "megatron-core", "torch")
    done = bridge(site, "--version")
    assert done.stdout.splitlines() == [f"{name} {version(name)}" for name in names]
    code = "import sys; from bridge.config.cli.entry import bridge; bridge(['--version'], standalone_mode=False);"
    code += "print([name for name in ('torch', 'megatron', 'yaml') if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.splitlines()[-1] == "[]"


def test_commands_of_optional_packages_are_known() -> None:
    from bridge.config.cli.entry import COMMAND_PACKAGES

    declared = {point.name: point.dist.name for point in entry_points(group="bridge.commands") if point.dist}
    above = {name: home for name, home in declared.items() if home in ("bridge-dist", "bridge-models")}
    assert above == COMMAND_PACKAGES


def test_an_internal_error_shows_its_location_and_on_request_the_traceback(site: Path) -> None:
    done = bridge(site, "crash")
    assert (done.returncode, done.stdout) == (1, "")
    first, *frames, last = done.stderr.splitlines()
    assert first == "AttributeError: 'NoneType' object has no attribute 'layers'"
    line = 1 + MODULE.splitlines().index("    [None][0].layers")
    assert frames[-2:] == [f'  File "{site}/extension.py", line {line}, in crash', "    [None][0].layers"]
    assert last == "(--traceback prints the full traceback)"
    whole = bridge(site, "crash", "--traceback")
    assert whole.returncode == 1
    assert whole.stderr.startswith("Traceback (most recent call last):")
    assert "--traceback" in bridge(site, "show", "--help").stdout


def test_without_arguments_it_shows_what_to_do_first() -> None:
    done = CliRunner().invoke(bridge_command, [])
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert all(line.isprintable() for line in lines)
    context = click.Context(bridge_command)
    shown = [line.partition("bridge ")[2].split() for line in lines if line.startswith("  ")]
    assert len(shown) > 5
    for name, *words in shown:
        command = bridge_command.get_command(context, name)
        assert command is not None
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options


def test_help_shows_whole_sentences() -> None:
    done = CliRunner().invoke(bridge_command, ["--help"])
    assert "..." not in done.stdout.partition("Commands:")[2]
    assert max(map(len, done.stdout.splitlines())) <= 80
