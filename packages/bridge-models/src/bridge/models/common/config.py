"""LanguageModelConfig, the base class of all model configurations, and its checks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.builders import EmbedsTransformer
from bridge.config import ModelConfig
from bridge.config.paths import format_path
from bridge.config.read.rehearsal import check_plain_values
from bridge.config.schema.arithmetic import check_live
from bridge.config.schema.generation import find_wrong_settings, get_settings
from bridge.models.common.vocab import find_vocabulary_problem, padded_vocab_size
from bridge.models.errors import ModelConfigError


@dataclass(kw_only=True)
class LanguageModelConfig(EmbedsTransformer, ModelConfig):
    """A language model: a ``TransformerConfig`` between a token embedding and an output layer.

    Every field of ``transformer`` can also be read and set here: ``config.hidden_size = 64`` sets
    ``config.transformer.hidden_size``.
    """

    transformer: TransformerConfig
    """The transformer layers, and how they are split over ranks."""

    vocab_size: int | None = None
    """Number of tokens, before padding. Must be set before a model is built."""

    make_vocab_size_divisible_by: int = 128
    """With ``should_pad_vocab``: pad so that each tensor-parallel rank's part is a multiple of this."""

    should_pad_vocab: bool = False
    """Pad the vocabulary so that it divides evenly over tensor-parallel ranks."""

    seq_length: int = 1024
    """Maximum sequence length in tokens; with learned positions, also their number."""

    fp16_lm_cross_entropy: bool = False
    """Compute the loss in half precision."""

    parallel_output: bool = True
    """Keep the logits split over tensor-parallel ranks."""

    share_embeddings_and_output_weights: bool = False
    """Tie the weight of the output layer to that of the embedding."""

    rotary_percent: float = 1.0
    """Fraction of each head's channels that is rotated, from 0 to 1."""

    seq_len_interpolation_factor: float | None = None
    """Divide rotary positions by this factor, to support longer sequences."""

    def finalize(self) -> None:
        """Finalize the transformer if it has a ``finalize`` method, then validate.

        Raises:
            ModelConfigError: See ``validate``.
        """
        finalize = getattr(self.transformer, "finalize", None)
        if callable(finalize):
            finalize()
        self.validate()

    def validate(self) -> None:
        """Run the checks that need no process groups, without changing anything.

        Raises:
            ModelConfigError: A required field is missing, a field has the wrong type, or two contradict each other.
        """
        # Types first, because the other checks compute with the values.
        if denied := check_plain_values(self):
            raise ModelConfigError("; ".join(f"{format_path(path)}: {message}" for path, message in denied))
        if problems := [*check_live(self.transformer, "transformer."), *check_live(self)]:
            raise ModelConfigError("\n".join(f"{path}: {message}" for path, message in problems))
        if (problem := find_vocabulary_problem(self, self.transformer.tensor_model_parallel_size)) is not None:
            raise ModelConfigError(problem)
        _check_cuda_graphs(self.transformer)
        _check_generation(self)

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the full embedding: ``vocab_size``, padded if ``should_pad_vocab``.

        Raises:
            ModelConfigError: ``vocab_size`` is not set.
        """
        return padded_vocab_size(self, self.transformer.tensor_model_parallel_size)


def _check_generation(config: LanguageModelConfig) -> None:
    sizes = {"vocab_size": config.vocab_size, "seq_length": config.seq_length}
    wrong = find_wrong_settings(get_settings(config), **sizes)
    if problems := [f"generation_config.{name}: {message}" for name, message in wrong]:
        raise ModelConfigError("; ".join(problems))


def _check_cuda_graphs(transformer: TransformerConfig) -> None:
    """Check that CUDA graphs have the random number generator that they require.

    Raises:
        ModelConfigError: They do not.
    """
    if transformer.cuda_graph_impl != "none" and not transformer.use_te_rng_tracker:
        raise ModelConfigError(
            f"transformer.cuda_graph_impl {transformer.cuda_graph_impl} requires Transformer Engine's random number "
            "tracker: set transformer.use_te_rng_tracker to true, or transformer.cuda_graph_impl to none"
        )
