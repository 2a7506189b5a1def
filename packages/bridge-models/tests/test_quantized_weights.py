"""Quantized tensors are dequantized as transformers does, to the bit, whole and in the slices of ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_cases import MODELS
from huggingface_models import build_transformers_model
from huggingface_weights import Weights
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from weight_folders import read_weights, write

from bridge.config.errors import DocumentError
from bridge.dist.engine.placement import Placement
from bridge.models.commands.checkpoints import export_hf, import_hf
from bridge.models.huggingface.folder.folder import Folder, open_folder
from bridge.models.huggingface.folder.headers import read_headers
from bridge.models.huggingface.folder.stored import Format, Stored, pair_scales
from bridge.models.huggingface.transfer.regions import find_regions
from bridge.models.huggingface.transfer.tensors import TensorReader, count_bytes
from bridge.models.huggingface.weights.weight import Part

NAME = "x.weight"
ALL = slice(None)


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Stored]:
    """Write tensors to a file, and return them as its headers say."""
    save_file(tensors, folder / "model.safetensors")
    return pair_scales(read_headers(folder))


def draw_fp8(rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw 8-bit floats of all kinds but NaN, and scales for blocks of 128 x 128."""
    numbers = torch.randint(256, (rows, columns), generator=generator, dtype=torch.uint8)
    numbers[(numbers & 127) == 127] = 0  # NaN
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) * 1e-3
    return numbers.view(torch.float8_e4m3fn), scales


def dequantize_fp8(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize with transformers, which takes whole blocks only: DeepSeek's last ones are cut off."""
    rows, columns = numbers.shape
    padded = torch.zeros(128 * len(scales), 128 * scales.shape[1], dtype=torch.uint8)
    padded[:rows, :columns] = numbers.view(torch.uint8)
    whole = Fp8Dequantize(None)._dequantize_one(padded.view(torch.float8_e4m3fn), scales, output_dtype=dtype)
    return whole[:rows, :columns]


@pytest.mark.parametrize("shape", [(256, 384), (576, 300), (7, 129), (128, 1)])
@pytest.mark.parametrize("scales_dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_dequantized_as_by_transformers(
    shape: tuple[int, int], scales_dtype: torch.dtype, tmp_path: Path
) -> None:
    numbers, scales = draw_fp8(*shape, torch.Generator().manual_seed(1))
    scales = scales.to(scales_dtype)
    stored = store(tmp_path, {NAME: numbers, f"{NAME}_scale_inv": scales})[NAME]
    reader = TensorReader()
    part = Part(NAME, shape, range(shape[0]))
    with torch.device("meta"):  # a program may have another default device
        read = reader.read(stored, part, part.rows, ALL)
    assert torch.equal(read, dequantize_fp8(numbers, scales, torch.float32))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = dequantize_fp8(numbers, scales, dtype)
        assert torch.equal(reader.read(stored, part, part.rows, ALL).to(dtype), expected)
        rows, columns = range(shape[0] // 3, shape[0]), slice(shape[1] // 3, shape[1])
        assert torch.equal(reader.read(stored, part, rows, columns).to(dtype), expected[rows.start :, columns])
        transposed = Part(NAME, shape, range(shape[1]), transposed=True)
        taken = range(columns.start, columns.stop)
        assert torch.equal(reader.read(stored, transposed, taken, ALL).to(dtype), expected.T[columns])


@pytest.mark.parametrize("shape", [(2, 6, 3, 16), (3, 5, 1, 16)])
def test_mxfp4_is_dequantized_as_by_transformers(shape: tuple[int, ...], tmp_path: Path) -> None:
    """With every byte, and every scale with which transformers computes numbers."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    scales = torch.randint(256, shape[:3], generator=generator, dtype=torch.uint8)
    blocks.view(-1)[:256] = torch.arange(min(256, blocks.numel()))
    scales.view(-1)[:4] = torch.tensor([0, 1, 252, 255])
    stored = store(tmp_path, {"x_blocks": blocks, "x_scales": scales})["x"]
    expected = convert_moe_packed_tensors(blocks, scales)
    assert stored.shape == expected.shape
    reader = TensorReader()
    for expert, matrix in enumerate(expected):
        for step in (1, 2):
            rows = range(step - 1, matrix.shape[1], step)
            part = Part("x", stored.shape, rows, index=expert, transposed=True)
            for columns in (ALL, slice(8, 24)):
                read = reader.read(stored, part, rows, columns).to(torch.bfloat16)
                wanted = matrix.T[rows.start : rows.stop : rows.step, columns]
                assert torch.equal(read.view(torch.int16), wanted.contiguous().view(torch.int16))


DEEPSEEK = MODELS["deepseek_v3"] | {
    # more than one block in each direction, none of them whole
    "hidden_size": 160,
    "intermediate_size": 200,
    "moe_intermediate_size": 136,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 144,
    "kv_lora_rank": 140,
    "qk_nope_head_dim": 40,
    "v_head_dim": 36,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
GPT_OSS = MODELS["gpt_oss"] | {"hidden_size": 64, "intermediate_size": 96}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Folder]:
    """A DeepSeek-V3 in 8-bit floats, and the same dequantized by transformers."""
    state = save_and_read(DEEPSEEK, tmp_path_factory.mktemp("saved"))
    plain = dict(state)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in plain.items():
        if tensor.dim() == 2 and "proj" in name:
            numbers, scales = draw_fp8(*tensor.shape, generator)
            state[name], state[f"{name}_scale_inv"] = numbers, scales
            plain[name] = dequantize_fp8(numbers, scales, torch.float32)
    assert sum(name.endswith("_scale_inv") for name in state) == 2 * 5 + 3 + 5 * 3
    quantized = write(tmp_path_factory.mktemp("fp8"), DEEPSEEK | {"quantization_config": FP8}, state)
    return open_folder(quantized), open_folder(write(tmp_path_factory.mktemp("plain"), DEEPSEEK, plain))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Folder]:
    """A gpt-oss with experts in MXFP4, and the same dequantized by transformers."""
    state = save_and_read(GPT_OSS, tmp_path_factory.mktemp("saved"))
    plain = dict(state)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in plain.items():
        if tensor.dim() == 3:
            experts, columns, rows = tensor.shape
            blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(115, 125, blocks.shape[:3], generator=generator, dtype=torch.uint8)
            del state[name]
            state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales)
    assert sum(name.endswith("_blocks") for name in state) == 2 * 2
    quantized = write(tmp_path_factory.mktemp("mxfp4"), GPT_OSS | {"quantization_config": MXFP4}, state)
    return open_folder(quantized), open_folder(write(tmp_path_factory.mktemp("plain"), GPT_OSS, plain))


def save_and_read(config: dict[str, Any], folder: Path) -> Weights:
    """Return the tensors that transformers saves of a model."""
    build_transformers_model(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def place(name: str, shape: torch.Size, ranks: int, rank: int) -> Placement:
    """Return where a rank's part of a parameter is, as Megatron-Core splits it."""
    if not re.search(r"linear_(qkv|q_up_proj|kv_up_proj|proj|fc[12])|word_embeddings|output_layer", name):
        return Placement(name=name, full_name=name, shape=shape)
    dim = int(re.search(r"linear_(proj|fc2)\.weight", name) is not None)
    if (dim == 0 and "linear_fc2" in name) or "linear_proj.bias" in name:
        return Placement(name=name, full_name=name, shape=shape)
    stride = 2 if "linear_fc1" in name else 1
    mine = torch.Size(size // ranks if index == dim else size for index, size in enumerate(shape))
    return Placement(name=name, full_name=name, shape=mine, shards=ranks, shard=rank, dim=dim, stride=stride)


class CountingReader(TensorReader):
    """A reader that counts the bytes it takes from files."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def _count(self, *taken: torch.Tensor) -> None:
        super()._count(*taken)
        self.bytes += sum(one.nbytes for one in taken)


def read_part(folder: Folder, placement: Placement, reader: CountingReader) -> torch.Tensor:
    """Read a rank's part of a parameter: as many bytes as are counted without reading."""
    _, parts = folder.match.weights[placement.name]
    found = torch.full(placement.shape, torch.nan)
    for region in find_regions(parts, placement):
        stored, before = folder.stored[region.part.tensor], reader.bytes
        found[region.local] = reader.read(stored, region.part, region.rows, region.columns).float()
        assert reader.bytes - before == count_bytes(stored, region.part, region.rows, region.columns)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("model", ["deepseek", "gpt_oss"])
def test_slices_of_ranks(model: str, ranks: int, request: pytest.FixtureRequest) -> None:
    quantized, plain = request.getfixturevalue(model)
    whole = read_weights(plain)
    reader = CountingReader()
    split = 0
    for name, (weight, _) in quantized.match.weights.items():
        for rank in range(ranks):
            placement = place(name, torch.Size(weight.shape), ranks, rank)
            split += placement.shards > 1
            assert placement.full_shape == weight.shape
            assert torch.equal(read_part(quantized, placement, reader), placement.take_shard(whole[name].float())), name
    assert split >= 20 * ranks or ranks == 1


@pytest.mark.parametrize(
    ("model", "note"),
    [
        ("deepseek", "28 tensors stored as FP8 with a scale for each block are dequantized to BF16, also when they"),
        ("gpt_oss", "4 tensors stored as MXFP4 are dequantized to BF16, also when they are exported"),
    ],
)
def test_a_checkpoint_has_the_dequantized_values(
    model: str, note: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """From folder to checkpoint to folder: quantized tensors come back as bf16, the others as they were."""
    quantized, plain = request.getfixturevalue(model)
    done = CliRunner().invoke(import_hf, [str(quantized.path), "-o", str(tmp_path / "checkpoint")])
    assert done.exit_code == 0, done.output
    assert note in done.stderr
    done = CliRunner().invoke(export_hf, [str(tmp_path / "checkpoint"), "-o", str(tmp_path / "exported")])
    assert done.exit_code == 0, done.output
    exported, expected = load_file(tmp_path / "exported" / "model.safetensors"), read_file(plain)
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        if quantized.stored[name].format is not Format.PLAIN:
            tensor = tensor.bfloat16()
        assert exported[name].dtype == tensor.dtype
        assert torch.equal(exported[name], tensor), name
    assert "quantization_config" not in (tmp_path / "exported" / "config.json").read_text()
    open_folder(tmp_path / "exported")


def read_file(folder: Folder) -> Weights:
    return load_file(folder.path / "model.safetensors")


def test_blocks_of_another_size_are_refused(deepseek: tuple[Folder, Folder], tmp_path: Path) -> None:
    config = json.loads((deepseek[0].path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 128]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DocumentError, match=r"weight_block_size: expected \[128, 128\], got \[64, 128\]"):
        open_folder(tmp_path)
