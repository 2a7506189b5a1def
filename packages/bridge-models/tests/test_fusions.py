"""Fusions in documents made from config.json: which there are, and that they change no loss and no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from huggingface_cases import MODELS
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from bridge.config import ModelConfig
from bridge.dist.cpu import cpu_runtime
from bridge.models.huggingface import from_hf

ACTIVATION, EXPERTS, DROPOUT, LOSS = FUSIONS = (
    "bias_activation_fusion",
    "use_fused_weighted_squared_relu",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
)
QUICK_GELU = {"hidden_act": "quick_gelu"}
CHOSEN: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "SwiGLU": ("llama 3.2, tied", {}, {ACTIVATION, DROPOUT}),
    "SwiGLU, biases": ("llama 3.2, tied", {"attention_bias": True, "mlp_bias": True}, {ACTIVATION, DROPOUT}),
    "bf16": ("llama 3.2, tied", {"torch_dtype": "bfloat16"}, {ACTIVATION, DROPOUT, LOSS}),
    "fp16": ("llama 3.2, tied", {"torch_dtype": "float16"}, {ACTIVATION, DROPOUT}),
    "gated quick GELU": ("llama 3.2, tied", QUICK_GELU, {DROPOUT}),
    "gated GELU": ("llama 3.2, tied", {"hidden_act": "gelu"}, {DROPOUT}),
    "tanh approximation of GELU": ("gpt2", {}, {DROPOUT}),
    "experts": ("mixtral", {}, {ACTIVATION, DROPOUT}),
    "experts with biases": ("gpt_oss", {}, {ACTIVATION}),
    "quick GELU in experts": ("mixtral", QUICK_GELU, {ACTIVATION, DROPOUT}),
    "quick GELU in shared experts": ("qwen2_moe", QUICK_GELU, {DROPOUT}),
    "Mamba": ("mamba2", {}, {DROPOUT}),
    "squared ReLU": ("nemotron_h", {}, {DROPOUT}),
    "squared ReLU in experts": ("nemotron_h, experts", {}, {EXPERTS, DROPOUT}),
    "ReLU": ("t5, 1.0", {}, {DROPOUT}),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_documents_have_the_fusions_that_compute_the_same_model(case: str) -> None:
    model, changes, expected = CHOSEN[case]
    transformer = from_hf(MODELS[model] | changes).data["transformer"]
    assert {name for name in FUSIONS if transformer.get(name)} == expected


def compute_gradients(data: dict[str, Any], pg_collection: ProcessGroupCollection) -> dict[str, torch.Tensor]:
    """Return the loss of random tokens and its gradients, by parameter, with weights drawn from one seed."""
    config: Any = ModelConfig.from_dict(data)
    config.transformer.use_cpu_initialization = True
    config.finalize()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    model = config.get_builder_cls()(config).build_model(pg_collection)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    tokens = torch.randint(96, (2, 24), generator=generator)
    loss = model(tokens, torch.arange(24).expand_as(tokens), None, labels=tokens.roll(-1)).sum()
    loss.backward()
    return {"loss": loss.detach()} | {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("case", ["llama 3.2, tied", "mixtral", "qwen2_moe", "gpt_oss", "nemotron_h, experts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fusions_keep_loss_and_gradients(case: str, dtype: str, pg_collection: ProcessGroupCollection) -> None:
    fused = from_hf(MODELS[case] | {"torch_dtype": dtype}).data
    chosen = {name for name in FUSIONS if fused["transformer"].get(name)}
    assert (LOSS in chosen) == (dtype == "bfloat16")
    unfused = fused | {"transformer": fused["transformer"] | dict.fromkeys(chosen, False)}
    with cpu_runtime():
        found, expected = (compute_gradients(data, pg_collection) for data in (fused, unfused))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = (1e-5 if dtype == "float32" else 3e-2) * gradient.abs().max()
        assert (found[name] - gradient).abs().max() <= tolerance, name


def test_the_fused_loss_rounds_gradients_to_bf16(pg_collection: ProcessGroupCollection) -> None:
    logits = torch.randn(8, 2, 96, generator=torch.Generator().manual_seed(3), requires_grad=True)
    tokens = torch.arange(16).view(8, 2)
    with cpu_runtime():
        fused_vocab_parallel_cross_entropy(logits * 1, tokens, pg_collection.tp).sum().backward()
    found = logits.grad
    assert found is not None
    expected = torch.softmax(logits.detach(), -1) - torch.nn.functional.one_hot(tokens, 96)
    assert torch.equal(found, found.bfloat16().float())
    assert not torch.allclose(found, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6)
