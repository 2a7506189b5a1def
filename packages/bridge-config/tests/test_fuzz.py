"""Any input is accepted or refused with a declared error.

The tests draw new examples for 20 s in total, or for BRIDGE_FUZZ_SECONDS.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.config import ConfigError, Document, DocumentError, ModelConfig, OmittedWarning, register
from bridge.config.cli.entry import main

SECONDS = float(os.environ.get("BRIDGE_FUZZ_SECONDS", "20")) / 6
# Not derandomized: hypothesis would repeat the same examples in CI.
FUZZ_SETTINGS = settings(max_examples=200, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck))
COMMANDS = ["validate", "show", "fingerprint", "migrate", "diff"]


class Colour(Enum):
    RED = 1
    BLUE = 2


@dataclass
class Inner:
    size: int = 1
    rate: float = 0.1
    name: str | None = None


@register
def some_function(*args: Any) -> None: ...


@register
def some_hook(*args: Any) -> list[Any]:
    return []


@dataclass
class Fuzzed(ModelConfig):
    """A config with a field of every kind."""

    builder: ClassVar[str] = "nowhere.Builder"
    inner: Inner = field(default_factory=Inner)
    inners: list[Inner] = field(default_factory=list)
    pair: tuple[int, str] | None = None
    numbers: tuple[float, ...] = ()
    names: set[str] = field(default_factory=set)
    table: dict[int, Inner] = field(default_factory=dict)
    colour: Colour = Colour.RED
    colour_or_text: Colour | str = "red"
    choice: Literal["a", 1, None] = None
    function: Callable[..., None] | None = None
    kind: type[Inner] | None = None
    anything: Any = None


HOME = Fuzzed.__module__
FUZZED: list[dict[str, Any]] = [
    Fuzzed().as_dict(),
    Fuzzed(
        inner=Inner(2, 0.5, "x"),
        inners=[Inner(), Inner(3)],
        pair=(1, "a"),
        numbers=(1.0, 2.5),
        names={"a", "b"},
        table={1: Inner()},
        colour=Colour.BLUE,
        colour_or_text=Colour.RED,
        choice="a",
        function=some_function,
        kind=Inner,
        anything=[{"a": (1, 2)}, Inner()],
        extra_checkpoint_metadata={"a": {"b": [1, None, "c"]}},
        pre_wrap_hooks=[functools.partial(some_hook, 1)],
    ).as_dict(),
    {"_target_": f"{HOME}.Fuzzed", "inner": {"size": 4}, "_omitted_": [{"path": "$.function", "reason": "a lambda"}]},
]
CORE = "megatron.core.transformer"
GPT: list[dict[str, Any]] = [
    {
        "_target_": "bridge.models.gpt.GPTModelConfig",
        "_builder_": "bridge.models.gpt.GPTModelBuilder",
        "vocab_size": 256,
        "pre_wrap_hooks": [],
        "transformer": {
            "_target_": f"{CORE}.transformer_config.TransformerConfig",
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "activation_func": "torch.nn.functional.silu",
            "init_method": {"_target_": "torch.nn.init.normal_", "_partial_": True, "std": 0.02},
            "params_dtype": "torch.bfloat16",
            "attention_backend": "flash",
            "window_size": [1, 2],
        },
    }
]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, 2**53, "1e999", "RED", "a", "", "\ud800", "\x00", "torch.float16", "os.system", "$.x"])
)
special = st.sampled_from(
    [
        "_target_",
        "_builder_",
        "_call_",
        "_partial_",
        "_args_",
        "_name_",
        "_omitted_",
        "_version_",
        "__class__",
        "<<",
        "",
    ]
)
names = st.sampled_from(
    [
        f"{HOME}.Fuzzed",
        f"{HOME}.Inner",
        f"{HOME}.Colour",
        f"{HOME}.some_function",
        *(f"builtins.{kind}" for kind in ("list", "tuple", "set", "frozenset", "dict", "float")),
        "torch.float32",
        f"{CORE}.transformer_config.MLATransformerConfig",
        "bridge.models.gpt.GPTModelConfig",
        "os.system",
    ]
)
keys = special | st.sampled_from(["size", "inner", "x", "num_layers"]) | st.text(max_size=4)
values = st.recursive(
    scalars | names,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=4)
        | st.fixed_dictionaries({"_target_": names}, optional={"_args_": st.lists(inner, max_size=2)})
        | st.fixed_dictionaries({"_target_": names}, optional={"_partial_": st.booleans(), "_call_": inner, "x": inner})
    ),
    max_leaves=8,
)


def locations(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in `data` with each of its keys or indices."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield data, key
        yield from locations(value)


@st.composite
def mutated_documents(draw: st.DrawFn, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw a valid document and change a few keys, values and levels of nesting."""
    document: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 4))):
        if not (places := list(locations(document))):
            return document
        holder, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "remove", "rename", "add", "wrap", "move"]))
        if change == "replace":
            holder[key] = draw(values)
        elif change == "remove":
            del holder[key]
        elif change == "rename" and isinstance(holder, dict):
            holder[draw(keys)] = holder.pop(key)
        elif change == "add" and isinstance(holder, dict):
            holder[draw(keys)] = draw(values)
        elif change == "wrap":
            holder[key] = draw(
                st.sampled_from([[holder[key]], {"_target_": "builtins.tuple", "_args_": [holder[key]]}])
            )
        else:
            other, at = draw(st.sampled_from(places))
            with contextlib.suppress(LookupError):  # an earlier change may have removed it
                holder[key] = copy.deepcopy(other[at])
    return document


CHARACTERS = "[]{},:\n-?|>'\"#&*!%@`\t ~<=.\\\0\x85\u2028\ufeffé"
TOKENS = """\
- |: |? |  |&a |*a|!!str |!<x>|---\n|...|%YAML 1.1\n|_target_|a|012|0x1f|1_0|1e999|-0|.nan|Infinity|<<|null|\
true|\\ud800|2001-01-01|12:30:00"""
yaml_like_text = st.lists(st.sampled_from([*CHARACTERS, *TOKENS.split("|")]), max_size=40).map("".join)
texts = st.one_of(
    st.binary(max_size=80),
    st.text(max_size=80).map(lambda text: text.encode(errors="surrogatepass")),
    yaml_like_text.map(str.encode),
    yaml_like_text.map(lambda text: text.encode("utf-16")),
    values.map(json.dumps).map(str.encode),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def repeat(test: Callable[..., None], *args: Any) -> None:
    """Repeat a hypothesis test until the time is up."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        test(*args)


def call_or_none(action: Callable[[], Any], error: type[Exception] = DocumentError) -> Any:
    """Return the result of `action`, or None if it raises `error`; other errors and undeclared warnings propagate."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", OmittedWarning)
        with contextlib.suppress(error):
            return action()
    return None


def serialize(config: ModelConfig) -> str:
    return json.dumps(config.as_dict(), sort_keys=True)


def check_round_trip(config: ModelConfig, folder: Path) -> None:
    """Check that `config` is read back equal from data, JSON and YAML."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OmittedWarning)
        assert serialize(ModelConfig.from_dict(config.as_dict())) == serialize(config)
        document = Document.of(config)
        for name, text in [("again.json", document.to_json()), ("again.yaml", document.to_yaml())]:
            (folder / name).write_bytes(text.encode(errors="surrogatepass"))
            assert serialize(Document.load(folder / name).config()) == serialize(config)


def run(*arguments: str) -> int:
    """Run a `bridge` command and return its exit code; a traceback or output that is not UTF-8 raises."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as left:
            code = left.code or 0
    for stream in (out, err):
        stream.flush()
    assert isinstance(code, int)
    return code


def test_any_bytes_as_a_file_give_a_config_or_a_declared_error(folder: Path) -> None:
    @FUZZ_SETTINGS
    @given(texts)
    def attempt(raw: bytes) -> None:
        for name in ("any.yaml", "any.json"):
            (folder / name).write_bytes(raw)
            document = call_or_none(lambda file=folder / name: Document.load(file))  # type: ignore[misc]
            if document is not None:
                call_or_none(document.config)

    repeat(attempt)


def test_any_mutated_document_gives_a_config_or_a_declared_error(folder: Path) -> None:
    @FUZZ_SETTINGS
    @given(mutated_documents(FUZZED))
    def attempt(data: dict[str, Any]) -> None:
        before = repr(data)
        config = call_or_none(lambda: ModelConfig.from_dict(data))
        assert repr(data) == before, "reading does not change the data"
        if config is not None:
            check_round_trip(config, folder)

    repeat(attempt)


def test_any_mutated_document_on_the_command_line_gives_no_traceback(folder: Path) -> None:
    @FUZZ_SETTINGS
    @given(mutated_documents(GPT), st.sampled_from(COMMANDS), st.sampled_from([(), ("--json",)]))
    def attempt(data: dict[str, Any], command: str, options: tuple[str, ...]) -> None:
        (folder / "gpt.json").write_text(json.dumps(data))
        files = [str(folder / "gpt.json")] * (2 if command == "diff" else 1)
        assert run(command, *files, *options) in (0, 1)

    repeat(attempt)


def test_any_override_gives_a_document_or_a_declared_error(folder: Path) -> None:
    (folder / "base.json").write_text(json.dumps(FUZZED[1]))
    paths = (
        st.sampled_from(["inner.size", "inners[0].size", "table", "anything[0].a", "$", "", "_target_"])
        | yaml_like_text
        | st.text()
    )

    @FUZZ_SETTINGS
    @given(
        st.lists(
            st.tuples(st.sampled_from(["", "+", "++", "~"]), paths, st.sampled_from(["=", ""]), yaml_like_text),
            max_size=3,
        )
    )
    def attempt(parts: list[tuple[str, str, str, str]]) -> None:
        overrides = ["".join(part) for part in parts]
        document = call_or_none(lambda: Document.load(folder / "base.json", overrides))
        if document is not None and (config := call_or_none(document.config)) is not None:
            check_round_trip(config, folder)

    repeat(attempt)


def test_any_path_gives_a_value_or_a_declared_error(folder: Path) -> None:
    known = st.sampled_from([*FUZZED[1], "[", "]", "0", ".", "$", '"', "\\", "size"])

    @FUZZ_SETTINGS
    @given(st.lists(known | st.text(max_size=3), max_size=6).map("".join), values)
    def attempt(path: str, value: Any) -> None:
        document = Document(copy.deepcopy(FUZZED[1]))
        call_or_none(lambda: document.get(path), ConfigError)
        call_or_none(lambda: document.set(path, value), ConfigError)
        call_or_none(lambda: document.remove(path), ConfigError)
        call_or_none(document.config)

    repeat(attempt)


def test_any_argument_gives_no_traceback(folder: Path) -> None:
    (folder / "base.json").write_text(json.dumps(GPT[0]))
    # Command-line arguments cannot contain NUL.
    words = (yaml_like_text | st.text(max_size=20) | st.sampled_from(["vocab_size=", "~vocab_size"])).map(
        lambda text: text.replace("\0", "")
    )

    @FUZZ_SETTINGS
    @given(st.sampled_from(COMMANDS), st.lists(words, max_size=2))
    def attempt(command: str, arguments: list[str]) -> None:
        assert run(command, str(folder / "base.json"), *arguments) in (0, 1, 2)

    repeat(attempt)


# Regressions that the tests above found.


@pytest.mark.parametrize("argument", ["\udcff", "\udcff.yaml"])
def test_an_argument_that_is_not_utf8_gives_no_traceback(folder: Path, argument: str) -> None:
    (folder / "base.json").write_text(json.dumps(GPT[0]))
    assert run("validate", str(folder / "base.json"), argument) == 1
