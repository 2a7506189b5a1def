"""Reads every document of corpus.yaml with one reader, each in a process of its own, and tells what it did.

    python reading.py READER FOLDER [NAME...] > outcomes.json

READER is one of READERS; the trap is laid and the documents are written in FOLDER; NAMEs choose documents. Authorised
imports are done before the first of them is read, so that whatever happens while one is read happens on its account.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import pkgutil
import resource
import signal
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

MEMORY = 512 * 2**20
"""Bytes that reading one document may take, beside what was there before."""

SECONDS = 10
"""Time that reading one document may take."""

Data = dict[str, Any]
Entry = dict[str, Any]

NAMES = {
    "CONFIG": "bridge.models.gpt.GPTModelConfig",
    "BUILDER": "bridge.models.gpt.GPTModelBuilder",
    "TRANSFORMER": "megatron.core.transformer.transformer_config.TransformerConfig",
}
GPT: Data = {
    "_target_": "CONFIG",
    "_builder_": "BUILDER",
    "vocab_size": 256,
    "transformer": {"_target_": "TRANSFORMER", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
}
CORE = "megatron.core"
# Documents that are right, so that what they need is there before the first hostile one is read.
HARMLESS: list[Entry] = [
    {"gpt": {}},
    {"gpt": {"pre_wrap_hooks": ["torch.nn.functional.silu"], "post_wrap_hooks": ["torch.nn.functional.silu"]}},
    {"gpt": {"extra_checkpoint_metadata": {"x": {"_target_": "builtins.tuple", "_args_": [[1]]}}}},
    {"transformer": {"activation_func": "torch.nn.functional.silu", "params_dtype": "torch.bfloat16"}},
    {"transformer": {"init_method": {"_target_": "torch.nn.init.normal_", "_partial_": True, "std": 0.1}}},
    {"transformer": {"quant_recipe": {"matchers": [], "config_dict": {}}, "attention_backend": "flash"}},
    {"transformer": {"_target_": f"{CORE}.transformer.transformer_config.MLATransformerConfig"}},
    {
        "transformer": {
            "_target_": f"{CORE}.transformer.heterogeneous.heterogeneous_config.HeterogeneousTransformerConfig",
            "heterogeneous_layers_config_encoded_json": '{"block_configs": []}',
        }
    },
    {
        "gpt": {
            "transformer_layer_spec": {
                "_target_": f"{CORE}.transformer.spec_utils.ModuleSpec",
                "module": {"_target_": "TRANSFORMER", "_call_": False},
            }
        }
    },
    {"gpt": {"generation_config": {"_target_": f"{CORE}.transformer.heterogeneous.heterogeneous_config.MLPConfig"}}},
]
# Documents that are wrong in every ordinary way, so that what it takes to say so is there too.
WRONG: list[Entry] = [
    {"gpt": {"_omitted_": [{"path": "$.x", "reason": "a test"}], "_builder_": "bridge.models.gpt.GPTModelBuilde"}},
    {"gpt": {"_target_": "bridge.models.gpt.GPTModelConfi", "transformer_layer_spec": "BUILDER"}},
    {"gpt": {"_target_": "CONFIG", "transformer_layer_spec": {"_target_": "BUILDER"}}},
    {"document": {"_target_": "bridge.config.model.ModelConfig"}},
    {"gpt": {"vocab_size": "many", "num_layer": 1, "pre_wrap_hooks": [1], "generation_config": {"_target_": "no"}}},
    {"transformer": {"activation_func": "torch.nn.functional.sil", "init_method": {"_target_": "x", "_partial_": 1}}},
    {"yaml": "a: [1, 012]\n"},
    {"yaml": "a: [1\n"},
    {"json": "{"},
]

TRAP = """
from dataclasses import dataclass

def run(*args, **kwargs):
    with open({canary!r}, "a") as stream:
        stream.write("ran\\n")

run()

@dataclass
class Config:
    x: int = 0
    def __post_init__(self):
        run()

TrapConfig = Config
Builder = Config
"""
# What the trap's distribution declares: names of others, pointing at itself.
DECLARED = """\
[bridge.targets]
json.loads = bridge_trap:run
torch.hub.help = bridge_trap:run
torch.nn.functional.selu = bridge_trap:run
mish = bridge_trap:run
bridge.models.gpt.OtherConfig = bridge_trap:TrapConfig
bridge.models.gpt.OtherBuilder = bridge_trap:Builder
"""


def lay_trap(folder: Path) -> None:
    """An importable package that writes a file whenever it is run, with a distribution that declares foreign names."""
    package, information = folder / "site/bridge_trap", folder / "site/bridge_trap-1.0.dist-info"
    package.mkdir(parents=True)
    information.mkdir()
    (package / "__init__.py").write_text(TRAP.format(canary=str(folder / "canary")))
    (package / "inner.py").write_text("from bridge_trap import Config")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: bridge_trap\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(DECLARED)
    (folder / "secret.json").write_text('{"secret": "opened"}')
    sys.path.insert(0, str(folder / "site"))


def corpus() -> list[Entry]:
    """All documents of corpus.yaml, in its order, each with its `group`."""
    groups = yaml.load((Path(__file__).parent / "corpus.yaml").read_text(), yaml.CSafeLoader)
    return [entry | {"group": group} for group, entries in groups.items() for entry in entries]


def data_of(entry: Entry, names: dict[str, str]) -> Data | None:
    """The data of an entry, unless it is a text."""
    if "document" in entry:
        return dict(_named(entry["document"], names))
    if "gpt" not in entry and "transformer" not in entry:
        return None
    return _gpt(entry.get("gpt", {}), entry.get("transformer", {}), names)


def text_of(entry: Entry, names: dict[str, str]) -> tuple[str, str]:
    """An entry as the text of a file, and the file's suffix."""
    if (data := data_of(entry, names)) is not None:
        return json.dumps(data), ".json"
    form = "yaml" if "yaml" in entry.get("repeat", entry) else "json"
    text: str = _named(entry.get("repeat", entry)[form], names)
    if "repeat" in entry:
        unit, times = entry["repeat"]["text"], entry["repeat"]["times"]
        text = text.replace("TEXT", "".join(unit % i for i in range(times)) if "%d" in unit else unit * times)
    return text, f".{form}"


def _gpt(keys: Data, transformer: Data, names: dict[str, str]) -> Data:
    document = GPT | keys
    if transformer:
        document["transformer"] = document["transformer"] | transformer
    return dict(_named(document, names))


def _named(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        for name, stands_for in names.items():
            value = value.replace(name, stands_for)
        return value
    if isinstance(value, dict):
        return {_named(key, names): _named(item, names) for key, item in value.items()}
    return [_named(item, names) for item in value] if isinstance(value, list) else value


# The readers: each reads a document, given as data or as a file, and returns the problems it has with it.
Reader = Callable[[Data | None, Path], list[tuple[str, str]]]


def from_dict(data: Data | None, file: Path) -> list[tuple[str, str]]:
    """`ModelConfig.from_dict` on data, `load_config` on a text, with torch and megatron-core."""
    from bridge.config import DocumentError, ModelConfig, load_config

    try:
        if data is None:
            load_config(file)
        else:
            ModelConfig.from_dict(data)
    except DocumentError as error:
        return [(problem.path, problem.message) for problem in error.problems]
    return []


def validate(data: Data | None, file: Path) -> list[tuple[str, str]]:
    """`bridge validate`."""
    from bridge.config.cli.entry import main

    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(["validate", "--json", str(file)])
    (verdict,) = json.loads(said.getvalue())
    assert verdict["ok"] == (not verdict["problems"])
    return [(problem["path"], problem["message"]) for problem in verdict["problems"]]


def reference(data: Data | None, file: Path) -> list[tuple[str, str]]:
    """The reference, and the builder that it would build with. It reads no files: PyYAML and json do that for it."""
    from megatron.training.models.base import ModelConfig

    if data is None:
        text = file.read_text()
        data = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    assert data is not None
    ModelConfig.from_dict(data).get_builder_cls()
    return []


def naive(data: Data | None, file: Path) -> list[tuple[str, str]]:
    """A reader that does what documents ask for, to show that the watch sees it."""
    target = yaml.unsafe_load(file.read_text())["_target_"]
    called = pkgutil.resolve_name(target)
    if callable(called):
        called("true")
    return []


READERS: dict[str, Reader] = {reader.__name__: reader for reader in (from_dict, validate, reference, naive)}

# Python says these about reading itself: what was allocated, which line is running.
_UNWATCHED = ("object.", "sys._getframe", "builtins.id", "gc.", "sys.unraisablehook", "sys.excepthook", "syntax.")
_events: list[str] | None = None


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _events is not None and not event.startswith(_UNWATCHED):
        _events.append(f"{event} {args[0]!r:.200}" if args else event)
        if event == "open" and any(letter in str(args[1]) for letter in "wax+"):
            _events[-1] += " for writing"


def outcome(reader: Reader, data: Data | None, file: Path) -> Data:
    """What reading one document leads to."""
    global _events
    before, start = set(sys.modules), time.process_time()
    said = io.StringIO()
    told: Data = {"verdict": "accepted", "problems": [], "error": None}
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            _events = []
            told["problems"] = reader(data, file)
        told["verdict"] = "refused" if told["problems"] else "accepted"
    except BaseException as error:
        told |= {"verdict": "failed", "error": f"{type(error).__name__}: {error}"[:300]}
    events, _events = _events or [], None
    return told | {
        # The document itself may be read, and what an installed distribution says of itself.
        "events": [event for event in events if event != f"open {str(file)!r}" and not event.endswith("/METADATA'")],
        "modules": sorted(set(sys.modules) - before),
        "said": said.getvalue()[:1000],
        "seconds": time.process_time() - start,
    }


def isolated(reader: Reader, data: Data | None, file: Path) -> Data:
    """`outcome`, in a process of its own with bounded memory and time."""
    incoming, outgoing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(incoming)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        signal.alarm(SECONDS)
        tracemalloc.start()
        told = outcome(reader, data, file)
        with os.fdopen(outgoing, "w") as stream:
            json.dump(told | {"peak": tracemalloc.get_traced_memory()[1]}, stream)
        os._exit(0)
    os.close(outgoing)
    with os.fdopen(incoming) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    if said:
        return dict(json.loads(said))
    died = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else str(status)
    return {"verdict": "died", "error": died, "problems": [], "events": [], "modules": [], "said": "", "peak": 0}


def outcomes(reader: Reader, folder: Path, chosen: list[str]) -> Iterator[tuple[str, Data]]:
    """What reading each document leads to, by name."""
    names = NAMES | {"CANARY": str(folder / "canary"), "SECRET": str(folder / "secret.json")}
    if reader is reference:
        names |= {"bridge.models.": "megatron.training.models."}
    lay_trap(folder)
    importlib.metadata.version("bridge-config")  # reading what a distribution says of itself needs modules, too
    sys.addaudithook(_watch)
    warnings.simplefilter("ignore")
    for number, entry in enumerate([*HARMLESS, *WRONG]):
        text, suffix = text_of(entry, names)
        file = folder / f"warm{number}{suffix}"
        file.write_text(text)
        told = outcome(reader, data_of(entry, names), file)
        if number < len(HARMLESS):
            yield f"harmless {number}", told
    for entry in corpus():
        if chosen and entry["name"] not in chosen:
            continue
        text, suffix = text_of(entry, names)
        file = folder / f"{entry['name']}{suffix}"
        file.write_text(text)
        told = isolated(reader, data_of(entry, names), file)
        file.unlink()
        canary = folder / "canary"
        told["ran"] = canary.exists()
        canary.unlink(missing_ok=True)
        yield entry["name"], told


if __name__ == "__main__":
    told = dict(outcomes(READERS[sys.argv[1]], Path(sys.argv[2]), sys.argv[3:]))
    told[""] = {"modules": sorted(sys.modules)}
    json.dump(told, sys.stdout, indent=1)
