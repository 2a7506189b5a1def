"""Folders of published models without their data: whole headers, and files that take no space on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

Tensor = tuple[str, tuple[int, ...]]
"""The dtype, as safetensors spells it, and the shape."""

ITEM_SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, files: int) -> None:
    """Write config.json, an index, and this many safetensors files whose tensors are holes."""
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    listed = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:06}.safetensors"
        header, end = {}, 0
        for name in names[number::files]:
            dtype, shape = tensors[name]
            start, end = end, end + ITEM_SIZES[dtype] * prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            listed[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            os.truncate(stream.fileno(), 8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def list_deepseek_v3() -> dict[str, Tensor]:
    """Return the 91,991 tensors of DeepSeek-V3, as it is published."""
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": ("BF16", (129280, 7168)),
        "model.norm.weight": ("BF16", (7168,)),
        "lm_head.weight": ("BF16", (129280, 7168)),
    }
    for layer in range(62):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = "BF16", (7168,)
        tensors[f"{prefix}self_attn.q_a_layernorm.weight"] = "BF16", (1536,)
        tensors[f"{prefix}self_attn.kv_a_layernorm.weight"] = "BF16", (512,)
        for name, shape in _list_matrices(layer):
            tensors[f"{prefix}{name}.weight"] = "F8_E4M3", shape
            rows, columns = shape
            tensors[f"{prefix}{name}.weight_scale_inv"] = "F32", (-(-rows // 128), -(-columns // 128))
        if layer >= 3:
            tensors[f"{prefix}mlp.gate.weight"] = "BF16", (256, 7168)
            tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = "F32", (256,)
    second = "model.layers.61."
    tensors |= {
        f"{second}embed_tokens.weight": ("BF16", (129280, 7168)),
        f"{second}enorm.weight": ("BF16", (7168,)),
        f"{second}hnorm.weight": ("BF16", (7168,)),
        f"{second}eh_proj.weight": ("BF16", (7168, 2 * 7168)),
        f"{second}shared_head.norm.weight": ("BF16", (7168,)),
        f"{second}shared_head.head.weight": ("BF16", (129280, 7168)),
    }
    return tensors


def _list_matrices(layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the matrices of a layer that are stored as 8-bit floats."""
    yield "self_attn.q_a_proj", (1536, 7168)
    yield "self_attn.q_b_proj", (128 * 192, 1536)
    yield "self_attn.kv_a_proj_with_mqa", (512 + 64, 7168)
    yield "self_attn.kv_b_proj", (128 * 256, 512)
    yield "self_attn.o_proj", (7168, 128 * 128)
    blocks = [("mlp", 18432)]
    if layer >= 3:
        experts = [(f"mlp.experts.{expert}", 2048) for expert in range(256)]
        blocks = [*experts, ("mlp.shared_experts", 2048)]
    for module, width in blocks:
        yield f"{module}.gate_proj", (width, 7168)
        yield f"{module}.up_proj", (width, 7168)
        yield f"{module}.down_proj", (7168, width)


def list_gpt_oss(layers: int, experts: int) -> dict[str, Tensor]:
    """Return the tensors of gpt-oss, as it is published."""
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": ("BF16", (201088, 2880)),
        "model.norm.weight": ("BF16", (2880,)),
        "lm_head.weight": ("BF16", (201088, 2880)),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = "BF16", (2880,)
        rows = {"self_attn.q_proj": 4096, "self_attn.k_proj": 512, "self_attn.v_proj": 512, "mlp.router": experts}
        for name, count in rows.items():
            tensors[f"{prefix}{name}.weight"] = "BF16", (count, 2880)
            tensors[f"{prefix}{name}.bias"] = "BF16", (count,)
        tensors[f"{prefix}self_attn.o_proj.weight"] = "BF16", (2880, 4096)
        tensors[f"{prefix}self_attn.o_proj.bias"] = "BF16", (2880,)
        tensors[f"{prefix}self_attn.sinks"] = "BF16", (64,)
        for name, count in {"gate_up_proj": 2 * 2880, "down_proj": 2880}.items():
            scales = (experts, count, 2880 // 32)
            tensors[f"{prefix}mlp.experts.{name}_bias"] = "BF16", (experts, count)
            tensors[f"{prefix}mlp.experts.{name}_scales"] = "U8", scales
            tensors[f"{prefix}mlp.experts.{name}_blocks"] = "U8", (*scales, 16)
    return tensors
