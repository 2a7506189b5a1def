"""T5 models have the expected parameters and compute the losses of T5."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend
from ranks import run_ranks
from torch.nn.functional import relu

from bridge.config import Document
from bridge.models.backend import choice
from bridge.models.errors import UnsupportedError
from bridge.models.t5 import T5ModelBuilder, T5ModelConfig

T5Factory = Callable[..., T5ModelConfig]

without_te = pytest.mark.skipif(HAVE_TE, reason="says what happens where Transformer Engine is not installed")

VOCAB = 96


def build(config: T5ModelConfig, pg_collection: ProcessGroupCollection) -> Any:
    return T5ModelBuilder(config).build_model(pg_collection)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("positions", ["learned_absolute", "rope", "relative"])
def test_a_whole_model_has_the_expected_parameters(
    pg_collection: ProcessGroupCollection, t5: T5Factory, positions: str, tied: bool
) -> None:
    outer = {"position_embedding_type": positions, "share_embeddings_and_output_weights": tied, "encoder_num_layers": 1}
    model = build(t5(outer=outer), pg_collection)
    assert type(model) is T5Model
    names = {name for name, _ in model.named_parameters()}
    layers = {name for name in names if ".layers." in name}
    buckets = {f"{stack}_relative_pos_emb.relative_attention_bias.weight" for stack in ("encoder", "decoder")}
    assert names - layers == {
        "embedding.word_embeddings.weight",
        *(["embedding.position_embeddings.weight"] if positions == "learned_absolute" else []),
        *(buckets if positions == "relative" else []),
        *(f"{stack}.final_layernorm.{part}" for stack in ("encoder", "decoder") for part in ("weight", "bias")),
        "lm_head.output_layer.bias" if tied else "lm_head.output_layer.weight",
    }
    stacks = sorted({name.split(".mlp")[0] for name in layers if ".mlp." in name})
    assert stacks == ["decoder.layers.0", "decoder.layers.1", "encoder.layers.0"]


def test_outer_fields_are_passed_to_the_model(pg_collection: ProcessGroupCollection, t5: T5Factory) -> None:
    outer = {
        "vocab_size": 100,
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": 32,
        "seq_length": 24,
        "fp16_lm_cross_entropy": True,
        "parallel_output": False,
    }
    model = build(t5(outer=outer), pg_collection)
    assert model.embedding.word_embeddings.weight.shape == (128, 32)
    assert model.embedding.position_embeddings.weight.shape == (24, 32)
    assert model.fp16_lm_cross_entropy
    assert not model.lm_head.parallel_output
    rotary = {"position_embedding_type": "rope", "rotary_percent": 0.5, "seq_len_interpolation_factor": 2.0}
    model = build(t5(outer=rotary), pg_collection)
    assert model.rotary_pos_emb.inv_freq.shape == (2,)  # half of 8 channels, in pairs
    assert model.rotary_pos_emb.seq_len_interpolation_factor == 2.0
    relative = {"position_embedding_type": "relative", "relative_attention_num_buckets": 8}
    model = build(t5(outer=relative), pg_collection)
    assert model.decoder_relative_pos_emb.relative_attention_bias.weight.shape == (8, 4)


def test_the_encoder_has_its_own_sizes(pg_collection: ProcessGroupCollection, t5: T5Factory) -> None:
    outer = {
        "encoder_num_layers": 3,
        "encoder_ffn_hidden_size": 48,
        "encoder_num_attention_heads": 2,
        "encoder_kv_channels": 5,
    }
    model = build(t5(outer=outer), pg_collection)
    shapes = [
        (tuple(layer.self_attention.linear_qkv.weight.shape), tuple(layer.mlp.linear_fc1.weight.shape))
        for layer in model.encoder.layers
    ]
    assert shapes == [((3 * 2 * 5, 32), (48, 32))] * 3
    assert [tuple(layer.mlp.linear_fc1.weight.shape) for layer in model.decoder.layers] == [(128, 32)] * 2
    tokens = torch.arange(12).view(2, 6)
    assert model(tokens, tokens, None, None, None, lm_labels=tokens).shape == (2, 6)


@pytest.mark.parametrize(("pre", "post"), [(False, False), (False, True), (True, False), (True, True)])
def test_explicit_pre_and_post_process_are_used(
    pg_collection: ProcessGroupCollection, t5: T5Factory, pre: bool, post: bool
) -> None:
    model = T5ModelBuilder(t5()).build_model(pg_collection, pre_process=pre, post_process=post)
    assert (model.pre_process, model.post_process) == (pre, post)
    names = {name for name, _ in model.named_parameters()}
    assert ("embedding.word_embeddings.weight" in names) == pre
    assert ("lm_head.output_layer.bias" in names) == post
    assert ("decoder.final_layernorm.weight" in names) == post


def test_building_twice_gives_equal_models_and_keeps_the_config(
    pg_collection: ProcessGroupCollection, t5: T5Factory
) -> None:
    config = t5(outer={"position_embedding_type": "relative"})
    before = repr(config)
    states = []
    for _ in range(2):
        torch.manual_seed(1234)
        states.append({name: p.tolist() for name, p in build(config, pg_collection).named_parameters()})
    assert states[0] == states[1]
    assert repr(config) == before


def test_virtual_stages_are_refused(pg_collection: ProcessGroupCollection, t5: T5Factory) -> None:
    with pytest.raises(UnsupportedError, match="pass no vp_stage"):
        T5ModelBuilder(t5()).build_model(pg_collection, vp_stage=0)


def t5_losses(
    weights: dict[str, torch.Tensor], source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, *, heads: int
) -> torch.Tensor:
    """Compute the losses of one sample, [sequence], by the paper and code of T5, from weights with Megatron's names.

    This T5 has RMSNorm before each sublayer, biases only in the output layer, ReLU, and 8 buckets up to distance 20.
    """

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]

    def bucket(distance: int, *, both: bool) -> int:
        """Return the bucket of a distance (Raffel et al. 2020): half per direction, and half of these logarithmic."""
        count, first = (4, 4 if distance > 0 else 0) if both else (8, 0)
        away = abs(distance) if both else max(-distance, 0)
        exact = count // 2
        if away < exact:
            return first + away
        logarithmic = exact + int(math.log(away / exact) / math.log(20 / exact) * (count - exact))
        return first + min(logarithmic, count - 1)

    def biases(stack: str, length: int) -> torch.Tensor:
        table = weights[f"{stack}_relative_pos_emb.relative_attention_bias.weight"]
        rows = [[bucket(of - at, both=stack == "encoder") for of in range(length)] for at in range(length)]
        return table[torch.tensor(rows)].permute(2, 0, 1)

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | float, *, causal: bool
    ) -> torch.Tensor:
        scores = torch.einsum("qhc,khc->hqk", query, key) + bias  # not scaled
        if causal:
            scores = scores.masked_fill(torch.ones(len(query), len(key)).triu(1).bool(), -math.inf)
        return torch.einsum("hqk,khc->qhc", scores.softmax(-1), value).flatten(1)

    def layer(x: torch.Tensor, name: str, bias: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        normed = norm(x, f"{name}.input_layernorm.weight")
        mixed = (normed @ weights[f"{name}.self_attention.linear_qkv.weight"].T).view(len(x), heads, -1)
        query, key, value = mixed.chunk(3, dim=-1)
        context = attend(query, key, value, bias, causal=memory is not None)
        x = x + context @ weights[f"{name}.self_attention.linear_proj.weight"].T
        if memory is not None:
            normed = norm(x, f"{name}.pre_cross_attn_layernorm.weight")
            query = (normed @ weights[f"{name}.cross_attention.linear_q.weight"].T).view(len(x), heads, -1)
            both = (memory @ weights[f"{name}.cross_attention.linear_kv.weight"].T).view(len(memory), heads, -1)
            key, value = both.chunk(2, dim=-1)
            context = attend(query, key, value, 0.0, causal=False)
            x = x + context @ weights[f"{name}.cross_attention.linear_proj.weight"].T
        hidden = relu(norm(x, f"{name}.pre_mlp_layernorm.weight") @ weights[f"{name}.mlp.linear_fc1.weight"].T)
        return x + hidden @ weights[f"{name}.mlp.linear_fc2.weight"].T

    def stack(name: str, tokens: torch.Tensor, layers: int, memory: torch.Tensor | None) -> torch.Tensor:
        x = weights["embedding.word_embeddings.weight"][tokens]
        for index in range(layers):
            x = layer(x, f"{name}.layers.{index}", biases(name, len(tokens)), memory)
        return norm(x, f"{name}.final_layernorm.weight")

    memory = stack("encoder", source, 1, None)
    decoded = stack("decoder", target, 2, memory)
    logits = decoded @ weights["embedding.word_embeddings.weight"].T + weights["lm_head.output_layer.bias"]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def small_t5(t5: T5Factory, pg_collection: ProcessGroupCollection) -> Any:
    """Build a small T5 with the published architecture, and with weights large enough that every part matters."""
    config = t5(
        normalization="RMSNorm",
        add_bias_linear=False,
        activation_func=relu,
        softmax_scale=1.0,
        init_method_std=0.3,
        outer={
            "position_embedding_type": "relative",
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
            "encoder_num_layers": 1,
            "encoder_ffn_hidden_size": 48,
        },
    )
    torch.manual_seed(11)
    model = build(config, pg_collection)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def test_losses_and_gradients_match_the_t5_formula(pg_collection: ProcessGroupCollection, t5: T5Factory) -> None:
    """Source and target have different lengths."""
    model = small_t5(t5, pg_collection)
    generator = torch.Generator().manual_seed(2)
    source, target, labels = (torch.randint(VOCAB, (2, length), generator=generator) for length in (30, 12, 12))
    weights = {name: parameter.detach().double().requires_grad_() for name, parameter in model.named_parameters()}
    expected = torch.stack([t5_losses(weights, source[n], target[n], labels[n], heads=4) for n in range(2)])
    found = model(source, target, None, None, None, lm_labels=labels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    found.mean().backward()
    expected.mean().backward()
    for name, parameter in model.named_parameters():
        gradient = weights[name].grad
        assert gradient is not None
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad.double(), gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=name
        )


def test_padding_does_not_affect_the_loss(pg_collection: ProcessGroupCollection, t5: T5Factory) -> None:
    model = small_t5(t5, pg_collection)
    source, target = torch.arange(16).view(2, 8), torch.arange(20, 30).view(2, 5)
    padding = (torch.arange(8) >= 6)[None, None, None].expand(2, -1, -1, -1)
    other = source.masked_fill(padding[:, 0, 0], 77)
    losses = [
        [model(tokens, target, mask, None, mask, lm_labels=target) for tokens in (source, other)]
        for mask in (padding, None)
    ]
    torch.testing.assert_close(losses[0][0], losses[0][1], rtol=0, atol=0)
    assert not torch.allclose(losses[1][0], losses[1][1])


def test_the_encoder_input_hides_every_seventh_token(pg_collection: ProcessGroupCollection, t5: T5Factory) -> None:
    config = t5(outer={"position_embedding_type": "relative"})
    builder = T5ModelBuilder(config)
    model: Any = builder.build_model(pg_collection)
    read: list[torch.Tensor] = []
    model.embedding.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"]), with_kwargs=True)
    tokens = torch.arange(1, 17).expand(2, -1)
    losses = builder.forward_step(model, tokens, pg_collection)
    encoder, decoder = read
    assert encoder[0].tolist() == [1, 2, 3, 4, 5, 6, 0, 8, 9, 10, 11, 12, 13, 0, 15]
    assert decoder[0].tolist() == list(range(1, 16))
    logits = model(encoder, decoder, None, None, None)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(losses, expected)


@without_te
def test_transformer_engine_gets_masks_in_its_shapes(t5: T5Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "HAVE_TE", True)
    seen: list[Any] = []

    def stage(*given: Any, lm_labels: torch.Tensor) -> torch.Tensor:
        seen.extend(given[2:])
        return lm_labels

    for backend in (AttnBackend.auto, AttnBackend.local):
        builder: Any = T5ModelBuilder(t5(attention_backend=backend))
        builder.forward_step(stage, torch.ones(2, 9, dtype=torch.long), None)
    encoder, decoder, cross = seen[:3]
    assert decoder is None
    for mask in (encoder, *cross):
        assert mask.shape == (2, 1, 1, 8)
        assert not mask.any()
    assert seen[3:] == [None, None, None]


def build_in_other_groups() -> str:
    """Build with tensor-parallel groups while Megatron's global groups are of one rank; return the error message."""
    from megatron.core import parallel_state

    from bridge.dist import Layout, create_process_groups

    groups = create_process_groups(Layout(tp=2))
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    config = Document.load("t5-tiny", ["transformer.tensor_model_parallel_size=2"]).config()
    try:
        config.get_builder_cls()(config).build_model(groups)
    except UnsupportedError as error:
        return str(error)
    return "nothing"


def test_groups_that_are_not_the_global_ones_are_refused() -> None:
    for message in run_ranks(build_in_other_groups, 2):
        assert "cross attention uses Megatron's global process groups" in message


def initial_deviations() -> dict[str, float]:
    """Build a model on the meta device; return the standard deviations of its initial weights."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.dist import Layout, create_process_groups

    overrides = ["transformer.init_model_with_meta_device=true", "transformer.init_method_std=0.03"]
    config = Document.load("t5-tiny", overrides).config()
    groups = create_process_groups(Layout())
    model_parallel_cuda_manual_seed(1)
    (model,) = config.get_builder_cls()(config).build_distributed_models(groups, DistributedDataParallelConfig())
    return {name: p.std().item() for name, p in model.module.named_parameters() if p.dim() > 1}


def test_relative_positions_are_initialised_after_the_meta_device() -> None:
    (deviations,) = run_ranks(initial_deviations, 1)
    tables = [std for name, std in deviations.items() if "relative" in name]
    assert tables == pytest.approx([0.03, 0.03], rel=0.25)  # each has 128 numbers
