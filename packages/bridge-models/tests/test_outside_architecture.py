"""Architectures of other distributions: the example of docs/extending.md, and broken entry points."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from safetensors.torch import load_file
from weight_folders import write

from bridge.config import ModelConfig
from bridge.config.errors import ConfigError, DocumentError
from bridge.dist.cpu import cpu_runtime
from bridge.models.errors import WeightsError
from bridge.models.huggingface import architectures, from_hf, load_weights, save_weights, to_hf

SOURCES = Path(__file__).parents[3] / "tests" / "typing" / "aurora" / "src"
SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
CONFIG: dict[str, Any] = {"model_type": "aurora", **SIZES}
SHAPES = {
    "model.tok_embeddings.weight": (128, 64),
    "model.layers.0.attention_norm.weight": (64,),
    "model.layers.0.attention.wq.weight": (64, 64),
    "model.layers.0.attention.wk.weight": (32, 64),
    "model.layers.0.attention.wv.weight": (32, 64),
    "model.layers.0.attention.wo.weight": (64, 64),
    "model.layers.0.ffn_norm.weight": (64,),
    "model.layers.0.feed_forward.w1.weight": (96, 64),
    "model.layers.0.feed_forward.w3.weight": (96, 64),
    "model.layers.0.feed_forward.w2.weight": (64, 96),
    "model.norm.weight": (64,),
    "lm_head.weight": (128, 64),
}
Declare = Callable[..., None]


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Declare]:
    """Return a function that installs a distribution: declare(name, model_type="module:attribute", ...)."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(SOURCES)
    monkeypatch.syspath_prepend(site)

    def install(distribution: str, **points: str) -> None:
        information = site / f"{distribution}-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (information / "entry_points.txt").write_text("\n".join([f"[{architectures.GROUP}]", *lines]))
        importlib.invalidate_caches()
        architectures._get_declarations.cache_clear()

    yield install
    monkeypatch.undo()
    architectures._get_declarations.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    path = tmp_path / "model"
    path.mkdir()
    return write(path, CONFIG, {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})


def test_its_config_survives_the_round_trip(declare: Declare) -> None:
    llama = to_hf(from_hf(CONFIG | {"model_type": "llama"}).data).data
    declare("aurora", aurora="aurora:AURORA")
    document = from_hf(CONFIG).data
    assert document["extra_checkpoint_metadata"] == {"hf_model_type": "aurora"}
    written = to_hf(document).data
    assert written["architectures"] == ["AuroraForCausalLM"]
    assert written.items() >= CONFIG.items()
    assert to_hf(from_hf(CONFIG | {"model_type": "llama"}).data).data == llama


def test_its_weights_are_loaded_and_saved(
    declare: Declare, folder: Path, tmp_path: Path, pg_collection: ProcessGroupCollection
) -> None:
    declare("aurora", aurora="aurora:AURORA")
    read: Any = ModelConfig.from_dict(from_hf(CONFIG).data)
    read.transformer.use_cpu_initialization = True
    read.finalize()
    stored = load_file(folder / "model.safetensors")
    with cpu_runtime():
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        model = read.get_builder_cls()(read).build_model(pg_collection)
        load_weights([model], folder, pg_collection)
        save_weights([model], tmp_path / "saved", pg_collection, model=read)
    first = model.decoder.layers[0].mlp.linear_fc1.weight
    layer = "model.layers.0."
    gate_and_up = [stored[f"{layer}feed_forward.w1.weight"], stored[f"{layer}feed_forward.w3.weight"]]
    assert torch.equal(first, torch.cat(gate_and_up).to(first.dtype))
    queries, keys, values = (stored[f"{layer}attention.{name}.weight"] for name in ("wq", "wk", "wv"))
    groups = [part for at in (0, 1) for part in (queries[32 * at :][:32], keys[16 * at :][:16], values[16 * at :][:16])]
    assert torch.equal(model.decoder.layers[0].self_attention.linear_qkv.weight, torch.cat(groups))
    saved = load_file(next((tmp_path / "saved").glob("*.safetensors")))
    assert saved.keys() == stored.keys()
    assert [name for name in saved if not torch.equal(saved[name], stored[name])] == []


def test_its_missing_tensor_is_an_error_by_name(
    declare: Declare, tmp_path: Path, pg_collection: ProcessGroupCollection
) -> None:
    declare("aurora", aurora="aurora:AURORA")
    write(tmp_path, CONFIG, {name: torch.zeros(shape) for name, shape in SHAPES.items() if "w3" not in name})
    with pytest.raises(WeightsError, match=r"feed_forward\.w3\.weight: missing"):
        load_weights([], tmp_path, pg_collection)


BROKEN = {
    "cannot be imported": ("gone", "no_such_module:IT", "cannot be imported: ModuleNotFoundError: No module named"),
    "no such attribute": ("gone", "aurora:BOREALIS", "cannot be imported: AttributeError: "),
    "no architecture": ("weights", "aurora:weights", "is a function: expected an Architecture"),
    "another model_type": ("borealis", "aurora:AURORA", "has the model_type 'aurora': name its entry point so"),
}


@pytest.mark.parametrize(("model_type", "value", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_entry_point_is_one_error(model_type: str, value: str, message: str, declare: Declare) -> None:
    declare("northern", **{model_type: value})
    expected = f"the architecture {model_type!r} of northern, {value}, {message}"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}"):
        from_hf({"model_type": model_type})
    from_hf(CONFIG | {"model_type": "llama"})  # nothing else is affected


def test_two_architectures_of_one_name_are_an_error(declare: Declare) -> None:
    declare("aurora", aurora="aurora:AURORA", llama="aurora:AURORA")
    with pytest.raises(ConfigError, match=r"^bridge-models and aurora have an architecture 'llama': uninstall one"):
        from_hf({"model_type": "llama"})
    declare("northern", aurora="aurora:AURORA")
    with pytest.raises(ConfigError, match=r"^(northern and aurora|aurora and northern) have an architecture 'aurora'"):
        from_hf({"model_type": "aurora"})


def test_an_unknown_architecture_lists_outside_ones(declare: Declare) -> None:
    declare("aurora", aurora="aurora:AURORA")
    with pytest.raises(DocumentError, match=r"did you mean .*aurora.*supported are gpt2, .*, t5, aurora$"):
        from_hf({"model_type": "auroro"})


def test_import_reads_no_entry_points_and_no_torch() -> None:
    program = (
        "import importlib.metadata as metadata, sys\n"
        "metadata.entry_points = None\n"
        "import bridge.models.huggingface.folder.folder\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
