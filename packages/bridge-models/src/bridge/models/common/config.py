"""What the configurations of all language models share: the vocabulary, the loss, and how they are checked."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.builders import EmbedsTransformer
from bridge.config import ModelConfig
from bridge.config.paths import format_path
from bridge.config.read.rehearsal import check_plain_values
from bridge.config.schema.arithmetic import check_live
from bridge.config.schema.generation import get_settings, wrong_settings
from bridge.models.common.vocab import padded_vocab_size, vocabulary_problem
from bridge.models.errors import ModelConfigError


@dataclass(kw_only=True)
class LanguageModelConfig(EmbedsTransformer, ModelConfig):
    """A language model: a ``TransformerConfig`` between an embedding of tokens and an output layer over them.

    Every field of ``transformer`` is read and written as if it stood here too: ``config.hidden_size = 64`` sets
    ``config.transformer.hidden_size``.
    """

    transformer: TransformerConfig
    """The transformer, and how it is split over ranks."""

    vocab_size: int | None = None
    """Number of tokens, not padded. Must be set before a model is built."""

    make_vocab_size_divisible_by: int = 128
    """With ``should_pad_vocab``, each tensor-parallel rank's share of the vocabulary is a multiple of this."""

    should_pad_vocab: bool = False
    """Pad the vocabulary so that it splits over tensor-parallel ranks."""

    seq_length: int = 1024
    """Longest sequence, in tokens; with learned positions, the number of them."""

    fp16_lm_cross_entropy: bool = False
    """Compute the loss in half precision."""

    parallel_output: bool = True
    """Leave the logits split over tensor-parallel ranks."""

    share_embeddings_and_output_weights: bool = False
    """Tie the output layer's weight to the embedding's."""

    rotary_percent: float = 1.0
    """Share of each head's channels that is rotated, 0 to 1."""

    seq_len_interpolation_factor: float | None = None
    """Divide rotary positions by this, to reach longer sequences."""

    def finalize(self) -> None:
        """Let the transformer finalize itself, if it knows how to, then validate.

        Raises:
            ModelConfigError: See ``validate``.
        """
        finalize = getattr(self.transformer, "finalize", None)
        if callable(finalize):
            finalize()
        self.validate()

    def validate(self) -> None:
        """Check what can be checked without process groups; nothing is changed.

        Raises:
            ModelConfigError: A field lacks a value, has one of the wrong type or contradicts another one.
        """
        if denied := check_plain_values(self):
            raise ModelConfigError("; ".join(f"{format_path(path)}: {message}" for path, message in denied))
        if found := [*check_live(self.transformer, "transformer."), *check_live(self)]:
            raise ModelConfigError("\n".join(f"{path}: {said}" for path, said in found))
        if (problem := vocabulary_problem(self, self.transformer.tensor_model_parallel_size)) is not None:
            raise ModelConfigError(problem)
        _check_cuda_graphs(self.transformer)
        _check_generation(self)

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the whole embedding: ``vocab_size``, padded when ``should_pad_vocab``.

        Raises:
            ModelConfigError: ``vocab_size`` is not set.
        """
        return padded_vocab_size(self, self.transformer.tensor_model_parallel_size)


def _check_generation(config: LanguageModelConfig) -> None:
    sizes = {"vocab_size": config.vocab_size, "seq_length": config.seq_length}
    if found := [f"generation_config.{name}: {said}" for name, said in wrong_settings(get_settings(config), **sizes)]:
        raise ModelConfigError("; ".join(found))


def _check_cuda_graphs(transformer: TransformerConfig) -> None:
    """Check that CUDA graphs have the random number generator that they need.

    Raises:
        ModelConfigError: They do not.
    """
    if transformer.cuda_graph_impl != "none" and not transformer.use_te_rng_tracker:
        raise ModelConfigError(
            f"transformer.cuda_graph_impl {transformer.cuda_graph_impl} needs Transformer Engine's random number "
            "tracker: set transformer.use_te_rng_tracker to true, or cuda_graph_impl to none"
        )
