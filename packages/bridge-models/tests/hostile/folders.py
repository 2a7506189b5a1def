"""Make hostile folders of weights, open each in a separate process, and print the outcomes.

    python folders.py FOLDER > outcomes.json

FOLDER receives the folders. None of them is a file of the repository, because weights are binary.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[4] / "packages/bridge-config/tests/hostile"))
import reading  # type: ignore[import-not-found]

Header = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Dtypes = Mapping[str, str]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
}
LAYER = "model.layers.0."
NORM = "model.norm.weight"
QUERIES = f"{LAYER}self_attn.q_proj.weight"
SHAPES: Shapes = {
    "model.embed_tokens.weight": (16, 8),
    **{f"{LAYER}self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
    **{f"{LAYER}mlp.{name}_proj.weight": (12, 8) for name in ("gate", "up")},
    f"{LAYER}mlp.down_proj.weight": (8, 12),
    f"{LAYER}input_layernorm.weight": (8,),
    f"{LAYER}post_attention_layernorm.weight": (8,),
    NORM: (8,),
    "lm_head.weight": (16, 8),
}
BF16: Dtypes = {}
NO_CHANGES: Mapping[str, str | None] = {}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
ITEM_SIZES = {"BF16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def make_header(shapes: Shapes, dtypes: Dtypes = BF16) -> Header:
    """Return the header of a safetensors file; tensors are BF16 unless ``dtypes`` says otherwise."""
    header: Header = {}
    end = 0
    for name, shape in shapes.items():
        dtype = dtypes.get(name, "BF16")
        start, end = end, end + prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return header


def write_tensors(file: Path, header: Header | bytes, *, size: int | None = None, length: int | None = None) -> None:
    """Write a safetensors file of zeros: the header, its ``length`` and the ``size`` of the data may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if size is None:
        assert not isinstance(header, bytes)
        size = max(one["data_offsets"][1] for one in header.values())
    with file.open("wb") as stream:
        stream.write((len(text) if length is None else length).to_bytes(8, "little") + text)
        os.truncate(stream.fileno(), 8 + len(text) + size)


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def write_folder(folder: Path, shapes: Shapes = SHAPES, dtypes: Dtypes = BF16, **changes: Any) -> None:
    """Write a folder with one file."""
    write_config(folder, **changes)
    write_tensors(folder / SINGLE, make_header(shapes, dtypes))


def write_index(folder: Path, listed: Mapping[str, Any] | str) -> None:
    text = listed if isinstance(listed, str) else json.dumps({"weight_map": listed})
    (folder / INDEX).write_text(text)


def write_shards(folder: Path, changes: Mapping[str, str | None] = NO_CHANGES) -> None:
    """Write a folder with two shards and an index; ``changes`` are those to the index, None removes a tensor."""
    write_config(folder)
    names = list(SHAPES)
    listed: dict[str, str | None] = {}
    for file, part in zip(SHARDS, (names[:6], names[6:]), strict=True):
        write_tensors(folder / file, make_header({name: SHAPES[name] for name in part}))
        listed |= dict.fromkeys(part, file)
    write_index(folder, {name: file for name, file in {**listed, **changes}.items() if file is not None})


def drop(*names: str) -> Shapes:
    return {name: shape for name, shape in SHAPES.items() if name not in names}


@dataclass
class Hostile:
    """A folder, what it tries, and the places of the problems; it must be accepted if there are none."""

    group: str
    tries: str
    at: tuple[str, ...]
    write: Callable[[Path], None]


FOLDERS: dict[str, Hostile] = {}


def hostile(group: str, tries: str, *at: str) -> Callable[[Callable[[Path], None]], None]:
    """Add a folder to the corpus, under the name of the function that writes it."""

    def add(write: Callable[[Path], None]) -> None:
        FOLDERS[write.__name__.strip("_").replace("_", "-")] = Hostile(group, tries, at, write)

    return add


# --- Code

CODE = "Code in a folder"


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['CANARY']}",)


@hostile(CODE, "pickled weights that run a command when they are loaded", ".")
def pickled(folder: Path) -> None:
    write_config(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


@hostile(CODE, "the same, named as safetensors", SINGLE)
def pickled_as_safetensors(folder: Path) -> None:
    write_config(folder)
    (folder / SINGLE).write_bytes(pickle.dumps(Payload()))


@hostile(CODE, "a model's own Python code, with weights that fit")
def remote_code(folder: Path) -> None:
    write_folder(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (folder / "modeling.py").write_text("import os\n\nopen(os.environ['CANARY'], 'w').close()\n")


# --- Files

FILES = "Files"


@hostile(FILES, "no config.json", "config.json: $")
def no_config(folder: Path) -> None:
    write_tensors(folder / SINGLE, make_header(SHAPES))


@hostile(FILES, "a config.json that is a pipe", "config.json: $")
def config_pipe(folder: Path) -> None:
    write_tensors(folder / SINGLE, make_header(SHAPES))
    os.mkfifo(folder / "config.json")


@hostile(FILES, "a config.json that is a list", "config.json: $")
def config_list(folder: Path) -> None:
    write_tensors(folder / SINGLE, make_header(SHAPES))
    (folder / "config.json").write_text("[]")


@hostile(FILES, "no weights", ".")
def no_weights(folder: Path) -> None:
    write_config(folder)


@hostile(FILES, "weights of GGUF", ".")
def gguf(folder: Path) -> None:
    write_config(folder)
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")


@hostile(FILES, "shards without an index", ".")
def no_index(folder: Path) -> None:
    write_shards(folder)
    (folder / INDEX).unlink()


@hostile(FILES, "a link to itself for the weights", ".")
def link_to_itself(folder: Path) -> None:
    write_config(folder)
    (folder / SINGLE).symlink_to(SINGLE)


@hostile(FILES, "a shard that is a link to itself", SHARDS[1])
def shard_link(folder: Path) -> None:
    write_shards(folder)
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to(SHARDS[1])


@hostile(FILES, "a folder for the weights", ".")
def weights_folder(folder: Path) -> None:
    write_config(folder)
    (folder / SINGLE).mkdir()


@hostile(FILES, "a pipe for the weights", ".")
def weights_pipe(folder: Path) -> None:
    write_config(folder)
    os.mkfifo(folder / SINGLE)


@hostile(FILES, "a shard that is a pipe", SHARDS[0])
def shard_pipe(folder: Path) -> None:
    write_shards(folder)
    (folder / SHARDS[0]).unlink()
    os.mkfifo(folder / SHARDS[0])


@hostile(FILES, "a shard that is a device without an end", SHARDS[0])
def shard_device(folder: Path) -> None:
    write_shards(folder)
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to("/dev/zero")


# --- The index

LIST = "The index"


@hostile(LIST, "an index that names a file that is not there", SHARDS[1])
def index_missing_file(folder: Path) -> None:
    write_shards(folder)
    (folder / SHARDS[1]).unlink()


@hostile(LIST, "an index that names a file outside the folder", INDEX)
def index_outside(folder: Path) -> None:
    write_shards(folder, {NORM: f"../{folder.name}/{SHARDS[1]}"})


@hostile(LIST, "the same, by an absolute path", INDEX)
def index_absolute(folder: Path) -> None:
    write_shards(folder, {NORM: f"{folder}/{SHARDS[1]}"})


@hostile(LIST, "a NUL in the name of a file", INDEX)
def index_nul(folder: Path) -> None:
    write_shards(folder, {NORM: f"{SHARDS[1]}\0.safetensors"})


@hostile(LIST, "a name that forges a line of the log", INDEX)
def index_newline(folder: Path) -> None:
    write_shards(folder, {NORM: "x\nERROR forged.safetensors"})


@hostile(LIST, "a pickle for a shard", INDEX)
def index_pickle(folder: Path) -> None:
    write_shards(folder, {NORM: "pytorch_model.bin"})


@hostile(LIST, "a tensor that is not in the file that the index names", SHARDS[0], SHARDS[1])
def index_wrong_file(folder: Path) -> None:
    write_shards(folder, {NORM: SHARDS[0]})


@hostile(LIST, "a tensor that the index does not list", SHARDS[1])
def index_unlisted(folder: Path) -> None:
    write_shards(folder, {NORM: None})


@hostile(LIST, "a tensor that is in no file", SHARDS[0])
def index_extra(folder: Path) -> None:
    write_shards(folder, {"model.norm.bias": SHARDS[0]})


@hostile(LIST, "an index that is no JSON", INDEX)
def index_text(folder: Path) -> None:
    write_shards(folder)
    write_index(folder, "weights: here")


@hostile(LIST, "an index that is a list", INDEX)
def index_list(folder: Path) -> None:
    write_shards(folder)
    write_index(folder, json.dumps(list(SHAPES)))


@hostile(LIST, "a list for the file of a tensor", INDEX)
def index_file_list(folder: Path) -> None:
    write_shards(folder)
    write_index(folder, {NORM: SHARDS})


@hostile(LIST, "an index without tensors", INDEX)
def index_empty(folder: Path) -> None:
    write_shards(folder)
    write_index(folder, {})


@hostile(LIST, "a tensor twice, in different files", INDEX)
def index_duplicate(folder: Path) -> None:
    write_shards(folder)
    write_index(folder, f'{{"weight_map": {{"{NORM}": "{SHARDS[1]}", "{NORM}": "other.safetensors"}}}}')


@hostile(LIST, "a million lists in each other", INDEX)
def index_deep(folder: Path) -> None:
    write_shards(folder)
    write_index(folder, "[" * 1_000_000)


@hostile(LIST, "100 MB of an index", INDEX)
def index_large(folder: Path) -> None:
    write_shards(folder)
    os.truncate(folder / INDEX, 100_000_000)


@hostile(LIST, "an index that is a pipe", INDEX)
def index_pipe(folder: Path) -> None:
    write_shards(folder)
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)


# --- Headers

HEADERS = "Headers"


@hostile(HEADERS, "a file that was cut off", SINGLE)
def truncated(folder: Path) -> None:
    write_config(folder)
    header = make_header(SHAPES)
    write_tensors(folder / SINGLE, header, size=header["lm_head.weight"]["data_offsets"][1] - 1)


@hostile(HEADERS, "a file that goes on after its tensors", SINGLE)
def extended(folder: Path) -> None:
    write_config(folder)
    write_tensors(folder / SINGLE, make_header(SHAPES), size=2**20)


@hostile(HEADERS, "an empty file", SINGLE)
def empty(folder: Path) -> None:
    write_config(folder)
    (folder / SINGLE).touch()


@hostile(HEADERS, "a header that is longer than the file", SINGLE)
def header_long(folder: Path) -> None:
    write_config(folder)
    write_tensors(folder / SINGLE, make_header(SHAPES), length=50_000_000)


@hostile(HEADERS, "a header of 2**63 bytes", SINGLE)
def header_huge(folder: Path) -> None:
    write_config(folder)
    write_tensors(folder / SINGLE, make_header(SHAPES), length=2**63)


@hostile(HEADERS, "a header that ends too early", SINGLE)
def header_short(folder: Path) -> None:
    write_config(folder)
    write_tensors(folder / SINGLE, make_header(SHAPES), length=100)


@hostile(HEADERS, "a header that is no text", SINGLE)
def header_binary(folder: Path) -> None:
    write_config(folder)
    write_tensors(folder / SINGLE, b"\xff" * 100, size=100)


@hostile(HEADERS, "a million lists in each other for a header", SINGLE)
def header_deep(folder: Path) -> None:
    write_config(folder)
    write_tensors(folder / SINGLE, b'{"x":' + b"[" * 1_000_000, size=100)


def write_header(folder: Path, name: str, **changes: Any) -> None:
    """Write a folder whose header lies about one tensor."""
    write_config(folder)
    header = make_header(SHAPES)
    size = header["lm_head.weight"]["data_offsets"][1]
    write_tensors(folder / SINGLE, header | {name: header[name] | changes}, size=size)


@hostile(HEADERS, "a tensor beyond the end of the file", SINGLE)
def offsets_beyond(folder: Path) -> None:
    write_header(folder, "lm_head.weight", data_offsets=[2**40, 2**40 + 256])


@hostile(HEADERS, "two tensors in the same bytes", SINGLE)
def offsets_shared(folder: Path) -> None:
    write_header(folder, NORM, data_offsets=[0, 16])


@hostile(HEADERS, "a tensor that ends before it starts", SINGLE)
def offsets_backwards(folder: Path) -> None:
    write_header(folder, NORM, data_offsets=[16, 0])


@hostile(HEADERS, "a tensor before the start of the file", SINGLE)
def offsets_negative(folder: Path) -> None:
    write_header(folder, NORM, data_offsets=[-16, 0])


@hostile(HEADERS, "a shape whose size overflows to that of the data", SINGLE)
def shape_overflow(folder: Path) -> None:
    write_header(folder, NORM, shape=[2**61, 2**3])


@hostile(HEADERS, "a dtype that does not exist", SINGLE)
def dtype_unknown(folder: Path) -> None:
    write_header(folder, NORM, dtype="F7")


@hostile(HEADERS, "a pointer of Git LFS for the weights", SINGLE)
def git_lfs(folder: Path) -> None:
    write_config(folder)
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4976698672\n")


# --- Tensors

TENSORS = "Tensors"


def in_single(*names: str) -> tuple[str, ...]:
    return tuple(f"{SINGLE}: {name}" for name in names)


@hostile(TENSORS, "a tensor missing", NORM)
def missing(folder: Path) -> None:
    write_folder(folder, drop(NORM))


@hostile(TENSORS, "a tensor too many", *in_single("model.norm.bias"))
def unknown(folder: Path) -> None:
    write_folder(folder, {**SHAPES, "model.norm.bias": (8,)})


@hostile(TENSORS, "a tensor under another name", NORM, *in_single("model.norn.weight"))
def renamed(folder: Path) -> None:
    write_folder(folder, {**drop(NORM), "model.norn.weight": (8,)})


@hostile(TENSORS, "a name that clears the terminal", *in_single(r"'\x1b[2J'"))
def name_escape(folder: Path) -> None:
    write_folder(folder, {**SHAPES, "\x1b[2J": (8,)})


@hostile(TENSORS, "a name of a million letters", *in_single(f"'{'a' * 200}'..."))
def name_long(folder: Path) -> None:
    write_folder(folder, {**SHAPES, "a" * 1_000_000: (8,)})


@hostile(TENSORS, "a tensor under two names", *in_single("lm_head.weight"))
def two_names(folder: Path) -> None:
    write_folder(folder, {**SHAPES, "language_model.lm_head.weight": (16, 8)})


@hostile(TENSORS, "a wrong shape", *in_single(QUERIES))
def shape(folder: Path) -> None:
    write_folder(folder, {**SHAPES, QUERIES: (8, 9)})


@hostile(TENSORS, "a shape with as many numbers", *in_single(f"{LAYER}mlp.down_proj.weight"))
def shape_transposed(folder: Path) -> None:
    write_folder(folder, {**SHAPES, f"{LAYER}mlp.down_proj.weight": (12, 8)})


@hostile(TENSORS, "fewer rows than tokens", *in_single("lm_head.weight"))
def few_rows(folder: Path) -> None:
    write_folder(folder, {**SHAPES, "lm_head.weight": (15, 8)})


@hostile(TENSORS, "no dimensions", *in_single(NORM))
def shape_scalar(folder: Path) -> None:
    write_folder(folder, {**SHAPES, NORM: ()})


@hostile(TENSORS, "64-bit floats", *in_single(NORM))
def dtype_f64(folder: Path) -> None:
    write_folder(folder, dtypes={NORM: "F64"})


@hostile(TENSORS, "8-bit integers", *in_single(QUERIES))
def dtype_i8(folder: Path) -> None:
    write_folder(folder, dtypes={QUERIES: "I8"})


@hostile(TENSORS, "8-bit floats without scales", *in_single(QUERIES))
def fp8_without_scales(folder: Path) -> None:
    write_folder(folder, dtypes={QUERIES: "F8_E4M3"})


@hostile(TENSORS, "8-bit floats with one scale", *in_single(QUERIES))
def fp8_one_scale(folder: Path) -> None:
    scales = f"{QUERIES}_scale_inv"
    write_folder(folder, {**SHAPES, scales: (1,)}, {QUERIES: "F8_E4M3", scales: "F32"})


@hostile(TENSORS, "other 8-bit floats", *in_single(QUERIES))
def fp8_e5m2(folder: Path) -> None:
    scales = f"{QUERIES}_scale_inv"
    write_folder(folder, {**SHAPES, scales: (1, 1)}, {QUERIES: "F8_E5M2", scales: "F32"})


@hostile(TENSORS, "scales of a tensor that is not quantized", *in_single(QUERIES))
def scales_without_fp8(folder: Path) -> None:
    scales = f"{QUERIES}_scale_inv"
    write_folder(folder, {**SHAPES, scales: (1, 1)}, {scales: "F32"})


@hostile(TENSORS, "scales of a tensor that is not there", QUERIES, *in_single(f"{QUERIES}_scale_inv"))
def scales_alone(folder: Path) -> None:
    write_folder(folder, {**drop(QUERIES), f"{QUERIES}_scale_inv": (1, 1)})


@hostile(TENSORS, "MXFP4 for a model that has none", *in_single(f"{QUERIES}_blocks"))
def mxfp4_elsewhere(folder: Path) -> None:
    blocks, scales = f"{QUERIES}_blocks", f"{QUERIES}_scales"
    write_folder(folder, {**drop(QUERIES), blocks: (1, 8, 1, 16), scales: (1, 8, 1)}, {blocks: "U8", scales: "U8"})


@hostile(TENSORS, "weights of GPT-2", *in_single("model.embed_tokens.weight"))
def other_architecture(folder: Path) -> None:
    write_folder(folder, {"wte.weight": (16, 8), "wpe.weight": (16, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)})


# --- config.json

SETTINGS = "config.json"


def add_quantization(method: str) -> None:
    @hostile(SETTINGS, f"weights quantized by {method}", "config.json: $.quantization_config.quant_method")
    def write(folder: Path) -> None:
        write_folder(folder, quantization_config={"quant_method": method, "bits": 4})

    FOLDERS[f"quantized-{method}"] = FOLDERS.pop("write")


for method in ("gptq", "awq", "bitsandbytes"):
    add_quantization(method)


@hostile(SETTINGS, "FP8 with other blocks", "config.json: $.quantization_config.weight_block_size")
def fp8_blocks(folder: Path) -> None:
    write_folder(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 128]})


@hostile(SETTINGS, "a text for the quantization", "config.json: $.quantization_config.quant_method")
def quantization_text(folder: Path) -> None:
    write_folder(folder, quantization_config="fp8")


@hostile(SETTINGS, "10,000 layers with a million experts each", "config.json")
def many_experts(folder: Path) -> None:
    changes: dict[str, Any] = {"model_type": "mixtral", "num_hidden_layers": 10_000, "num_local_experts": 1_000_000}
    changes |= {"num_key_value_heads": 2, "num_experts_per_tok": 2}
    write_folder(folder, **changes)


@hostile(SETTINGS, "a billion heads", "config.json")
def many_heads(folder: Path) -> None:
    write_folder(folder, num_attention_heads=10**9, num_key_value_heads=10**9, hidden_size=4 * 10**9)


@hostile(SETTINGS, "sizes beyond 64 bits", "config.json")
def huge_sizes(folder: Path) -> None:
    write_folder(folder, hidden_size=2**70, intermediate_size=2**70)


# --- Reading


def open_folder(data: object, folder: Path) -> list[tuple[str, str]]:
    """Open a folder with Bridge; problems are at ``file: tensor``, and the file is relative to the folder."""
    from bridge.config import DocumentError
    from bridge.models.errors import WeightsError
    from bridge.models.huggingface.folder.folder import open_folder

    try:
        open_folder(folder)
    except (DocumentError, WeightsError) as error:
        return [
            (
                ": ".join(_relate(one, folder) for one in (problem.file, problem.path) if one is not None),
                problem.message,
            )
            for problem in error.problems
        ]
    return []


def _relate(place: str, folder: Path) -> str:
    return str(Path(place).relative_to(folder)) if place.startswith(str(folder)) else place


HARMLESS: list[Callable[[Path], None]] = [write_folder, write_shards]
WRONG = ("missing", "renamed", "index-text", "quantized-awq", "no-config")
"""Folders that are opened first, because messages import modules."""


def read_all(place: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the outcome of each folder; harmless ones come first."""
    os.environ["CANARY"] = str(place / "canary")
    sys.addaudithook(reading._audit)
    warnings.simplefilter("ignore")
    for number, write in enumerate([*HARMLESS, *(FOLDERS[name].write for name in WRONG)]):
        (folder := place / f"warm{number}").mkdir()
        write(folder)
        result = reading.read_once(open_folder, None, folder)
        if number < len(HARMLESS):
            yield f"harmless {number}", result
    for name, entry in FOLDERS.items():
        (folder := place / name).mkdir()
        entry.write(folder)
        result = reading.read_in_child(open_folder, None, folder)
        # A reader may list the folder and open its files.
        result["events"] = [one for one in result["events"] if str(folder) not in one or one.endswith("for writing")]
        yield name, result | {"ran": (place / "canary").exists()}


if __name__ == "__main__":
    json.dump(dict(read_all(Path(sys.argv[1]))), sys.stdout, indent=1)
