"""Tables that map the fields of a config.json to those of a document, in both directions.

An architecture is a tuple of rows. A row names fields of config.json and fields of the document, and has a function for
each direction. A field that no row handles is an error, in either direction, so nothing is lost silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from bridge.models.huggingface.fields.row import Row
from bridge.models.huggingface.targets import TRANSFORMER
from bridge.models.huggingface.translation import Name
from bridge.models.huggingface.weights.sizes import Sizes
from bridge.models.huggingface.weights.weight import Entry


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The mapping of one ``model_type`` of transformers."""

    model_type: str
    model_class: str
    """The class of transformers with the output layer, as in ``architectures``."""

    target: str
    """The config class of the document."""

    transformers: tuple[str, ...] = (TRANSFORMER,)
    """The config classes allowed for ``transformer`` in the document."""

    rows: tuple[Row, ...]
    weights: Callable[[Sizes], Iterator[Entry]]
    """Yields the weights of the whole model."""

    base: str = "model."
    """The prefix of the tensors of the base model, which folders without an output layer leave out."""

    unused_tensors: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    """Patterns of tensors that old versions of transformers saved and no version reads."""

    aliases: Mapping[str, str] = field(default_factory=dict)
    """Aliases of fields of config.json: alias -> usual name."""

    yields_to: tuple[str, ...] = ()
    """Architectures preferred over this one where both can express a document, usually simpler ones."""

    ignored: Set[str] = frozenset()
    """Fields of config.json that do not affect the model, in addition to ``IGNORED``."""

    @property
    def names(self) -> dict[str, Name]:
        """The fields of config.json that rows read."""
        return {name: known for row in self.rows for name, known in row.names.items()}

    @property
    def fields(self) -> set[str]:
        """The fields of the document that rows read."""
        return {path for row in self.rows for path in row.fields}
