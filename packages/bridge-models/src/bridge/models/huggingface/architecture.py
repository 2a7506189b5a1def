"""Tables of what the fields of a config.json are in a document, each said once for both directions.

An architecture is a tuple of rows. A row names fields of config.json and fields of the document, and has a function for
each direction. What no row takes is refused by name, in either direction, so that nothing is lost in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from bridge.models.huggingface.fields.row import Row
from bridge.models.huggingface.targets import TRANSFORMER
from bridge.models.huggingface.translation import Name


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What one ``model_type`` of transformers is to Bridge."""

    model_type: str
    causal: str
    """The class of transformers that has the output layer."""

    target: str
    """The config class of the document."""

    transformers: tuple[str, ...] = (TRANSFORMER,)
    """The config classes that the transformer of the document may have."""

    rows: tuple[Row, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of fields of config.json."""

    yields_to: tuple[str, ...] = ()
    """Architectures that a document is written as, in place of this one, if both can say it: usually simpler ones."""

    ignored: Set[str] = frozenset()
    """Fields of config.json that mean nothing to the model, beside those of all architectures."""

    @property
    def names(self) -> dict[str, Name]:
        """All fields of config.json that rows read."""
        return {name: known for row in self.rows for name, known in row.names.items()}

    @property
    def fields(self) -> set[str]:
        """All fields of the document that rows read."""
        return {path for row in self.rows for path in row.fields}
