"""Configs of megatron-core have a schema version in documents."""

from __future__ import annotations

import pytest
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from bridge.config.schema.versions import Schema, load_declared_schema


@pytest.mark.parametrize("cls", [TransformerConfig, MLATransformerConfig, HeterogeneousTransformerConfig])
def test_transformer_configs_declare_a_version(cls: type) -> None:
    assert load_declared_schema(f"{cls.__module__}.{cls.__qualname__}") == Schema(1)
