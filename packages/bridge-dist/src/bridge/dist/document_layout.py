"""Write a layout into a document. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge.config import Document
from bridge.dist.layout import CONFIG_FIELDS

LAYOUT_FIELDS = (
    *CONFIG_FIELDS.values(),
    "sequence_parallel",
    "pipeline_dtype",
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "microbatch_group_size_per_vp_stage",
    "batch_p2p_comm",
    "overlap_p2p_comm",
)
"""Fields whose values belong to one layout: another layout must not inherit them."""

DROPOUT_RATES = ("hidden_dropout", "attention_dropout")
"""The fields of Megatron's TransformerConfig that make losses depend on the layout."""


def apply_layout(document: Document, sizes: Mapping[str, int]) -> None:
    """Write the sizes of a layout into a document, and set unset fields that Megatron requires with them.

    They are written to the document's TransformerConfig: under ``transformer`` if there is such a field, else at the
    top level.
    """
    prefix, fields = find_transformer(document)
    given = fields.get
    for name, size in sizes.items():
        document.set(prefix + CONFIG_FIELDS[name], size)
    if sizes.get("pp", 1) > 1 and given("pipeline_dtype") is None:  # the dtype that stages send to each other
        half = "torch.bfloat16" if given("bf16") else "torch.float16" if given("fp16") else None
        sent = "torch.float32" if given("fp32_residual_connection") else half or given("params_dtype")
        document.set(f"{prefix}pipeline_dtype", sent or "torch.float32")
    if sizes.get("tp", 1) > 1 and given("num_moe_experts") and given("sequence_parallel") is None:
        document.set(f"{prefix}sequence_parallel", True)  # Megatron requires it for training experts
    if sizes.get("vp", 1) > 1 and given("batch_p2p_comm") is None and given("overlap_p2p_comm") is None:
        # Interleaved stages on two pipeline ranks need these (see the pre-flight rules); on more they are faster.
        document.set(f"{prefix}batch_p2p_comm", False)
        document.set(f"{prefix}overlap_p2p_comm", True)


def replace_layout(document: Document, sizes: Mapping[str, int], *, sequence_parallel: bool) -> None:
    """Replace the layout of a document. Sizes that are not given become 1."""
    prefix, fields = find_transformer(document)
    for name in LAYOUT_FIELDS:
        if name in fields:
            document.remove(prefix + name)
    document.set(f"{prefix}sequence_parallel", sequence_parallel)
    apply_layout(document, sizes)


def switch_off_dropout(document: Document) -> None:
    """Set the dropout rates of a document to zero."""
    prefix, _ = find_transformer(document)
    for name in DROPOUT_RATES:
        document.set(prefix + name, 0.0)


def find_transformer(document: Document) -> tuple[str, dict[str, Any]]:
    """Return the path prefix of the document's TransformerConfig fields, and the mapping that holds them."""
    embedded = document.data.get("transformer")
    return ("transformer.", embedded) if isinstance(embedded, dict) else ("", document.data)
