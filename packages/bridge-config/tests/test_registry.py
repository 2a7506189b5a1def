"""Names in documents: which ones resolve, and that looking them up imports and runs nothing."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bridge.config import DocumentError, ModelConfig, OmittedWarning, TargetError, register
from bridge.config.canonical import canonicalize
from bridge.config.read.decode import check
from bridge.config.schema import registry, registry_state
from bridge.config.schema.names import get_qualified_name

Declare = Callable[..., None]


@dataclass
class Nested:
    size: int = 1


@dataclass
class Guarded(ModelConfig):
    builder: ClassVar[str] = "nowhere.Builder"
    nested: Nested = field(default_factory=Nested)
    function: Callable[[], None] | None = None
    kind: type[Nested] | None = None
    anything: Any = None


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Declare]:
    """Return a function that installs a distribution: declare(module_text, name="module:attribute", ...)."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(module: str, *, dist: str = "extension", group: str = registry.GROUP, **names: str) -> None:
        (tmp_path / f"{dist}_module.py").write_text(module)
        info = tmp_path / f"{dist}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        points = "\n".join(f"{name} = {value}" for name, value in names.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{points}\n")
        importlib.invalidate_caches()
        registry.refresh()

    yield install
    for name in [name for name in sys.modules if name.endswith("_module")]:
        del sys.modules[name]
    monkeypatch.undo()
    registry.refresh()


def test_registered_objects_resolve_by_their_own_or_a_given_name() -> None:
    def function() -> None: ...

    assert register(function) is function
    assert registry.resolve(f"{__name__}.{function.__qualname__}") is function
    value = object()
    register(value, "test_registry.value")
    assert registry.resolve("test_registry.value") is value
    assert registry.find_document_name(value) == "test_registry.value"
    with pytest.raises(TargetError, match="pass one"):
        register(object())
    with pytest.raises(TargetError, match="already refers to"):
        register(object(), "test_registry.value")


def test_registering_a_redefinition_replaces_the_first() -> None:
    def define() -> Any:
        @register
        def same_name() -> None: ...

        return same_name

    define()
    second = define()
    assert registry.resolve(get_qualified_name(second) or "") is second


def test_a_declared_name_and_alias_resolve(declare: Declare) -> None:
    declare("def f(): ...", **{"extension_module.f": "extension_module:f", "shorthand": "extension_module:f"})
    assert "extension_module" not in sys.modules
    found: Any = registry.resolve("shorthand")
    assert found.__name__ == "f"
    assert registry.resolve("extension_module.f") is found
    assert registry.find_document_name(found) == "extension_module.f"


MOVED = """
from dataclasses import dataclass
from typing import ClassVar
from bridge.config import ModelConfig
from bridge.config.schema import registry_state

class Kind: ...

@dataclass
class Part:
    size: int = 1

@dataclass
class Config(ModelConfig):
    builder: ClassVar[str] = "extension_module.Builder"
    part: Part | None = None
    kind: type[Kind] | None = None

class Builder: ...

registry_state.register_builder(Builder, Config)
"""


def test_a_moved_object_keeps_its_declared_name(
    declare: Declare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "extension_module").mkdir()
    (tmp_path / "extension_module/__init__.py").touch()
    (tmp_path / "extension_module/inner.py").write_text(MOVED)
    names = ("Config", "Builder", "Part", "Kind")
    declare("", dist="other", **{f"extension_module.{name}": f"extension_module.inner:{name}" for name in names})
    document = {
        "_target_": "extension_module.Config",
        "_builder_": "extension_module.Builder",
        "part": {"_target_": "extension_module.Part", "size": 2},
        "kind": "extension_module.Kind",
    }
    try:
        for _ in range(2):  # before and after its module is loaded
            config: Any = ModelConfig.from_dict(document)
            assert canonicalize(document) == document | {"_version_": 1}
        module = sys.modules["extension_module.inner"]
        assert type(config) is module.Config
        assert config.as_dict().items() >= document.items()
        assert ModelConfig.from_dict(config.as_dict()) == config
        assert config.get_builder_cls() is module.Builder
        for name in names:
            for name_of in (registry.get_document_name, registry.find_document_name):
                assert name_of(vars(module)[name]) == f"extension_module.{name}"
            # The name of the defining module is never accepted, whether or not the module is loaded.
            assert not registry.is_registered(f"extension_module.inner.{name}")
            with pytest.raises(TargetError, match="is not a name"):
                registry.resolve(f"extension_module.inner.{name}")
        for other in ({"_target_": "extension_module.inner.Config"}, {"_builder_": "extension_module.inner.Builder"}):
            with pytest.raises(DocumentError, match="is not a name"):
                ModelConfig.from_dict(document | other)
    finally:
        for name in [name for name in sys.modules if name.startswith("extension_module")]:
            del sys.modules[name]


def test_a_class_is_written_under_its_registered_name() -> None:
    @dataclass
    class Part:
        size: int = 1

    before = Guarded(anything=Part(3))
    with pytest.warns(OmittedWarning, match="is not a name that documents may use"):
        before.as_dict()
    register(Part, "test_targets.Part")
    data = Guarded(anything=Part(3)).as_dict()
    assert data["anything"] == {"_target_": "test_targets.Part", "size": 3}
    assert ModelConfig.from_dict(data) == before


def test_looking_up_an_unknown_name_imports_nothing(declare: Declare) -> None:
    declare("raise SystemExit", **{"extension_module.f": "extension_module:f"})
    assert registry.find_document_name(len) == "builtins.len"
    assert "extension_module" not in sys.modules


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"json.loads": "extension_module:f"}, "that name is reserved for 'json.loads'"),
        ({"extension_module.missing": "extension_module:missing"}, "cannot be loaded"),
        ({"gone.f": "gone:f"}, "cannot be loaded"),
    ],
)
def test_false_or_broken_declarations_are_errors(declare: Declare, names: dict[str, str], message: str) -> None:
    declare("def f(): ...", **names)
    with pytest.raises(TargetError, match=message):
        registry.resolve(next(iter(names)))


def test_conflicting_declarations_are_an_error(declare: Declare) -> None:
    declare("def f(): ...", alias="extension_module:f")
    declare("def f(): ...", dist="other", alias="other_module:f")
    with pytest.raises(TargetError, match="declared differently"):
        registry.resolve("alias")


@pytest.mark.parametrize("name", ["torch.nn.functional.silu", "relu"])
def test_a_built_in_name_cannot_be_declared_again(name: str, declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    declare("raise SystemExit", **{name: "extension_module:f"})
    document = {"_target_": f"{__name__}.Guarded", "function": name}
    for read in (ModelConfig.from_dict, check):
        with pytest.raises(DocumentError, match=f"'{name}' is declared differently by several distributions"):
            read(document)
    [alone] = [point for point in registry.get_declarations()[name] if point.value == "extension_module:f"]
    monkeypatch.setattr(
        registry, "get_declarations", lambda: {name: [alone]}
    )  # as if bridge-builders were not installed
    for read in (ModelConfig.from_dict, check):
        with pytest.raises(DocumentError, match=r"that name is reserved for 'torch\.nn\.functional\.[a-z]+'") as error:
            read(document | {"anything": None})
        assert [problem.path for problem in error.value.problems] == ["$.function"]
    assert "extension_module" not in sys.modules


@pytest.mark.parametrize("name", ["torch.nn.functional.silu", "silu", "bridge.models.gpt.GPTModelConfig"])
def test_a_built_in_name_cannot_be_registered_again(name: str) -> None:
    before = registry.is_registered(name)
    with pytest.raises(TargetError, match=f"'{name}' already refers to [a-zA-Z.]+: register"):
        register(lambda: None, name)
    assert registry.is_registered(name) == before


def test_a_class_known_from_an_annotation_is_accepted_only_there() -> None:
    nested = {"_target_": f"{__name__}.Nested", "size": 2}
    for read in (ModelConfig.from_dict, check):
        read({"_target_": f"{__name__}.Guarded", "nested": nested})
        with pytest.raises(DocumentError, match=r"^\$\.anything\._target_: '.*Nested' is not a name"):
            read({"_target_": f"{__name__}.Guarded", "anything": nested})


def test_the_error_for_an_unknown_name_says_what_to_do() -> None:
    register(object(), "test_registry.something")
    with pytest.raises(TargetError, match=r"may use here; did you mean 'test_registry.something'\? Otherwise install"):
        registry.resolve("test_registry.somethin")


def test_the_error_for_an_unknown_name_suggests_a_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    # All packages are installed here; importlib documents this error for a missing one.
    registry.refresh()
    monkeypatch.setattr(registry, "distribution", distribution)
    monkeypatch.setattr(registry, "get_declarations", dict)
    with pytest.raises(TargetError, match="declared by bridge-builders, which is not installed: pip install"):
        registry.resolve("torch.nn.functional.mish")


# Names that would run or import something, deceive the reader, or are used in the wrong field. TRAP is a module that
# fails when it is imported.
HOSTILE_NAMES = [
    "TRAP",
    "TRAP.anything",
    "TRAP:anything",
    "os.system",
    "logging.os.system",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "__main__",
    "subprocess.Popen",
    "importlib.import_module",
    "torch.hub.load",
    "torch.load",
    "torch.os.system",
    "torch._dynamo.config",
    "pickle.loads",
    "bridge.config.schema.registry_state.objects",
    "bridge.config.schema.registry.register",
    "../../etc/passwd",
    "",
    ".",
    "..os.system",
    "os.system\x00",
    "ｏｓ.ｓｙｓｔｅｍ",
    "bridge.cоnfig.Model",  # the second o is Cyrillic
    f"{__name__}.Nested",
    f"{__name__}.Guarded.__init__",
    f"{__name__}.subprocess",
]


def documents_with_name(name: Any) -> dict[str, dict[str, Any]]:
    """Return documents with `name` in every position of a name, by its path."""
    base = {"_target_": f"{__name__}.Guarded"}
    call = {"_target_": name, "_call_": False}
    return {
        "$._target_": {"_target_": name},
        "$._builder_": base | {"_builder_": name},
        "$.nested._target_": base | {"nested": {"_target_": name}},
        "$.function": base | {"function": name},
        "$.function._target_": base | {"function": {"_target_": name, "_partial_": True, "_args_": ["true"]}},
        "$.kind": base | {"kind": name},
        "$.pre_wrap_hooks[0]": base | {"pre_wrap_hooks": [name]},
        "$.post_wrap_hooks[0]._target_": base | {"post_wrap_hooks": [call]},
        "$.anything._target_": base | {"anything": call},
        "$.anything[0].x._target_": base | {"anything": [{"x": {"_target_": name}}]},
        "$.anything._args_[0][0]._target_": base | {"anything": {"_target_": "builtins.tuple", "_args_": [[call]]}},
        "$.extra_checkpoint_metadata.k._target_": base
        | {"extra_checkpoint_metadata": {"k": {"_target_": name, "_name_": "x"}}},
    }


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "bridge_trap.py").write_text("raise SystemExit('the trap was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "bridge_trap"
    assert "bridge_trap" not in sys.modules


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_name_is_refused_everywhere_and_runs_nothing(name: str, trap: str) -> None:
    name = name.replace("TRAP", trap)
    registry.get_declarations()
    for path, document in documents_with_name(name).items():
        fits = name == f"{__name__}.Nested" and path in ("$.nested._target_", "$.kind")
        if fits:
            continue
        events = audit_events(document)
        assert events.pop() == path
        assert events == [], f"{name} at {path}"


WATCHED = ("import", "exec", "open", "os.system", "subprocess.Popen", "socket.connect", "os.exec", "pickle.find_class")
_events: list[str] | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _events is not None and event in WATCHED:
        _events.append(f"{event} {args!r:.80}")


sys.addaudithook(_audit)


def audit_events(document: dict[str, Any]) -> list[str]:
    """Read a document that is refused; return the audit events, followed by the paths of the problems."""
    global _events
    with pytest.raises(DocumentError):
        ModelConfig.from_dict(document)  # loads the modules that reading needs
    before, _events = set(sys.modules), []
    try:
        ModelConfig.from_dict(document)
    except DocumentError as error:
        events, _events = _events, None
        assert set(sys.modules) == before
        return [*events, *(problem.path for problem in error.problems)]
    finally:
        _events = None
    raise AssertionError("the document was accepted")


@pytest.mark.parametrize(
    "value",
    [
        {"_target_": "builtins.tuple", "_args_": [[1]], "_call_": True},
        {"_target_": "builtins.dict", "_args_": [1, 2]},
        {"_target_": "builtins.float", "_args_": ["x"]},
        {"_target_": "builtins.set", "_args_": [[[1]]]},
        {"_target_": "test_registry.value2", "_call_": True},
        {"_target_": "test_registry.value2", "_partial_": True},
        {"_target_": "test_registry.function2", "_partial_": False},
        {"_target_": "test_registry.function2", "_partial_": True, "__class__": 1},
        {"_target_": "test_registry.function2", "_partial_": True, "_args_": 1},
        {"_target_": "test_registry.function2"},
        {"_target_": ["os", "system"]},
        {"_target_": None},
        {"_target_": {"_target_": "os.system"}},
    ],
)
def test_malformed_object_mappings_are_refused(value: Any) -> None:
    registry_state.objects.setdefault("test_registry.value2", object())
    registry_state.objects.setdefault("test_registry.function2", print)
    with pytest.raises(DocumentError):
        ModelConfig.from_dict({"_target_": f"{__name__}.Guarded", "anything": value})


@pytest.mark.parametrize("field", ["function", "kind", "nested"])
def test_an_authorised_name_in_the_wrong_place_is_refused(field: str) -> None:
    register(print, "test_registry.print")
    wrong = f"{__name__}.Guarded" if field != "kind" else "test_registry.print"
    value: Any = {"_target_": "test_registry.print"} if field == "nested" else wrong
    with pytest.raises(DocumentError, match="expected"):
        ModelConfig.from_dict({"_target_": f"{__name__}.Guarded", field: value})


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("bridge.config", ["torch", "megatron", "yaml", "rfc8785", "click", "rich", "importlib.metadata"]),
        ("bridge.config.cli.entry", ["torch", "megatron", "yaml", "rfc8785"]),
    ],
)
def test_importing_loads_no_heavy_library(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
