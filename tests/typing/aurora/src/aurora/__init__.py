"""Aurora: a Llama whose tensors have other names."""

from collections.abc import Iterator

from bridge.models.huggingface.architecture import Architecture
from bridge.models.huggingface.fields.decoder import decoder
from bridge.models.huggingface.fields.sizes import sizes
from bridge.models.huggingface.targets import ANY_TRANSFORMER, GPT
from bridge.models.huggingface.weights.attention import attention
from bridge.models.huggingface.weights.feed_forward import feed_forward
from bridge.models.huggingface.weights.language_model import embedding
from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Entry, norm


def weights(sizes: Sizes) -> Iterator[Entry]:
    """Yield the weights of the whole model."""
    yield from embedding(sizes, "model.tok_embeddings.weight")
    for index in range(sizes.layers):
        mcore, hf = f"decoder.layers.{index}.", f"model.layers.{index}."
        yield from norm(sizes, f"{mcore}input_layernorm", f"{hf}attention_norm")
        names = ("wq", "wk", "wv", "wo")
        yield from attention(sizes, f"{mcore}self_attention.", f"{hf}attention.", names=names)
        yield from norm(sizes, f"{mcore}pre_mlp_layernorm", f"{hf}ffn_norm")
        yield from feed_forward(sizes, f"{mcore}mlp.", f"{hf}feed_forward.", names=("w1", "w3", "w2"))
    yield from norm(sizes, "decoder.final_layernorm", "model.norm")


AURORA = Architecture(
    model_type="aurora",
    model_class="AuroraForCausalLM",
    target=GPT,
    transformers=ANY_TRANSFORMER,
    rows=decoder(
        sizes(  # the defaults of AuroraConfig
            vocab_size=32000,
            max_position_embeddings=4096,
            num_hidden_layers=24,
            hidden_size=2048,
            intermediate_size=5632,
            num_attention_heads=16,
        )
    ),
    weights=weights,
)
