"""Read every document of corpus.yaml with one reader, each in a separate process, and print the outcomes.

    python reading.py READER FOLDER [NAME...] > outcomes.json

READER is a key of READERS. FOLDER receives the trap package and the documents. NAMEs select documents. Harmless and
wrong documents are read first, so that all authorised imports are done: any later import is caused by a document.
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
"""Bytes of address space that reading one document may add."""

SECONDS = 4
"""CPU time limit for reading one document."""

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
# Valid documents: reading them first imports all that valid documents need.
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
# Invalid documents that are not hostile: reading them first imports all that error messages need.
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
# The entry points of the trap's distribution: names of other packages that point to the trap.
DECLARED = """\
[bridge.targets]
json.loads = bridge_trap:run
torch.hub.help = bridge_trap:run
torch.nn.functional.selu = bridge_trap:run
mish = bridge_trap:run
bridge.models.gpt.OtherConfig = bridge_trap:TrapConfig
bridge.models.gpt.OtherBuilder = bridge_trap:Builder
"""


def install_trap(folder: Path) -> None:
    """Install a package that writes a file when its code runs, and declares names of other packages as its own."""
    package, information = folder / "site/bridge_trap", folder / "site/bridge_trap-1.0.dist-info"
    package.mkdir(parents=True)
    information.mkdir()
    (package / "__init__.py").write_text(TRAP.format(canary=str(folder / "canary")))
    (package / "inner.py").write_text("from bridge_trap import Config")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: bridge_trap\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(DECLARED)
    (folder / "secret.json").write_text('{"secret": "opened"}')
    sys.path.insert(0, str(folder / "site"))


def load_corpus() -> list[Entry]:
    """Return all documents of corpus.yaml, in order, each with its `group`."""
    groups = yaml.load((Path(__file__).parent / "corpus.yaml").read_text(), yaml.CSafeLoader)
    return [entry | {"group": group} for group, entries in groups.items() for entry in entries]


def entry_data(entry: Entry, names: dict[str, str]) -> Data | None:
    """Return the data of an entry, or None if the entry is a text."""
    if "document" in entry:
        return dict(_replace_names(entry["document"], names))
    if "gpt" not in entry and "transformer" not in entry:
        return None
    return _gpt_document(entry.get("gpt", {}), entry.get("transformer", {}), names)


def entry_text(entry: Entry, names: dict[str, str]) -> tuple[str, str]:
    """Return an entry as the text of a file, and the file's suffix."""
    if (data := entry_data(entry, names)) is not None:
        return json.dumps(data), ".json"
    form = "yaml" if "yaml" in entry.get("repeat", entry) else "json"
    text: str = _replace_names(entry.get("repeat", entry)[form], names)
    if "repeat" in entry:
        unit, times = entry["repeat"]["text"], entry["repeat"]["times"]
        text = text.replace("TEXT", "".join(unit % i for i in range(times)) if "%d" in unit else unit * times)
    return text, f".{form}"


def _gpt_document(keys: Data, transformer: Data, names: dict[str, str]) -> Data:
    document = GPT | keys
    if transformer:
        document["transformer"] = document["transformer"] | transformer
    return dict(_replace_names(document, names))


def _replace_names(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        for name, stands_for in names.items():
            value = value.replace(name, stands_for)
        return value
    if isinstance(value, dict):
        return {_replace_names(key, names): _replace_names(item, names) for key, item in value.items()}
    return [_replace_names(item, names) for item in value] if isinstance(value, list) else value


# A reader reads a document, given as data or as a file, and returns its problems.
Reader = Callable[[Data | None, Path], list[tuple[str, str]]]


def from_dict(data: Data | None, file: Path) -> list[tuple[str, str]]:
    """Read data with `ModelConfig.from_dict`, or a file with `load_config`; torch and megatron-core are imported."""
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
    """Read a file with `bridge validate`."""
    from bridge.config.cli.entry import main

    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(["validate", "--json", str(file)])
    (verdict,) = json.loads(said.getvalue())
    assert verdict["ok"] == (not verdict["problems"])
    return [(problem["path"], problem["message"]) for problem in verdict["problems"]]


def megatron_training(data: Data | None, file: Path) -> list[tuple[str, str]]:
    """Read data with megatron.training and look up its builder; PyYAML or json parse files, which it does not read."""
    from megatron.training.models.base import ModelConfig

    if data is None:
        text = file.read_text()
        data = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    assert data is not None
    ModelConfig.from_dict(data).get_builder_cls()
    return []


def call_target(data: Data | None, file: Path) -> list[tuple[str, str]]:
    """Call whatever the document names, to show that the audit hook detects it."""
    target = yaml.unsafe_load(file.read_text())["_target_"]
    called = pkgutil.resolve_name(target)
    if callable(called):
        called("true")
    return []


READERS: dict[str, Reader] = {
    reader.__name__: reader for reader in (from_dict, validate, megatron_training, call_target)
}

# Audit events of every read, whatever the document says: allocations, frames, garbage collection.
_UNWATCHED = ("object.", "sys._getframe", "builtins.id", "gc.", "sys.unraisablehook", "sys.excepthook", "syntax.")
_events: list[str] | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _events is not None and not event.startswith(_UNWATCHED):
        _events.append(f"{event} {args[0]!r:.200}" if args else event)
        if event == "open" and any(letter in str(args[1]) for letter in "wax+"):
            _events[-1] += " for writing"


def read_once(reader: Reader, data: Data | None, file: Path) -> Data:
    """Read one document and return the verdict, the audit events and the new modules."""
    global _events
    before, start = set(sys.modules), time.process_time()
    said = io.StringIO()
    result: Data = {"verdict": "accepted", "problems": [], "error": None}
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            _events = []
            result["problems"] = reader(data, file)
        result["verdict"] = "refused" if result["problems"] else "accepted"
    except BaseException as error:
        result |= {"verdict": "failed", "error": f"{type(error).__name__}: {error}"[:300]}
    events, _events = _events or [], None
    return result | {
        # A reader may open the document and the metadata of installed distributions.
        "events": [event for event in events if event != f"open {str(file)!r}" and not event.endswith("/METADATA'")],
        "modules": sorted(set(sys.modules) - before),
        "said": said.getvalue()[:1000],
        "seconds": time.process_time() - start,
    }


def read_in_child(reader: Reader, data: Data | None, file: Path) -> Data:
    """Run `read_once` in a forked process with limits on memory and time."""
    incoming, outgoing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(incoming)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        signal.alarm(10 * SECONDS)  # if it waits
        tracemalloc.start()
        result = read_once(reader, data, file)
        with os.fdopen(outgoing, "w") as stream:
            json.dump(result | {"peak": tracemalloc.get_traced_memory()[1]}, stream)
        os._exit(0)
    os.close(outgoing)
    with os.fdopen(incoming) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    if said:
        return dict(json.loads(said))
    died = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else str(status)
    return {"verdict": "died", "error": died, "problems": [], "events": [], "modules": [], "said": "", "peak": 0}


def read_all(reader: Reader, folder: Path, chosen: list[str]) -> Iterator[tuple[str, Data]]:
    """Yield the name and the outcome of each document."""
    names = NAMES | {"CANARY": str(folder / "canary"), "SECRET": str(folder / "secret.json")}
    if reader is megatron_training:
        names |= {"bridge.models.": "megatron.training.models."}
    install_trap(folder)
    importlib.metadata.version("bridge-config")  # imports the modules that read metadata
    sys.addaudithook(_audit)
    warnings.simplefilter("ignore")
    for number, entry in enumerate([*HARMLESS, *WRONG]):
        text, suffix = entry_text(entry, names)
        file = folder / f"warm{number}{suffix}"
        file.write_text(text)
        result = read_once(reader, entry_data(entry, names), file)
        if number < len(HARMLESS):
            yield f"harmless {number}", result
    for entry in load_corpus():
        if chosen and entry["name"] not in chosen:
            continue
        text, suffix = entry_text(entry, names)
        file = folder / f"{entry['name']}{suffix}"
        file.write_text(text)
        result = read_in_child(reader, entry_data(entry, names), file)
        file.unlink()
        canary = folder / "canary"
        result["ran"] = canary.exists()
        canary.unlink(missing_ok=True)
        yield entry["name"], result


if __name__ == "__main__":
    result = dict(read_all(READERS[sys.argv[1]], Path(sys.argv[2]), sys.argv[3:]))
    result[""] = {"modules": sorted(sys.modules)}
    json.dump(result, sys.stdout, indent=1)
