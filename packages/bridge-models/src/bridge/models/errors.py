"""Errors of bridge-models."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.config import BridgeError
from bridge.config.errors import Problem


class ModelError(BridgeError):
    """Base class of all errors that bridge-models raises."""


class ModelConfigError(ModelError, ValueError):
    """A configuration does not describe a model that can be built. The message names the field and what to set."""


class UnsupportedError(ModelError, ValueError):
    """The available layers do not support a valid configuration. The message says what is missing and what to do."""


class LayerSpecError(ModelError, TypeError):
    """A layer spec has the wrong type, or a function that must return one does not."""


class CheckpointError(ModelError, ValueError):
    """A model cannot be restored from a checkpoint. The message says why, and what to pass or set."""


class WeightsError(ModelError, ValueError):
    """Weights on disk are not those of a model; ``problems`` lists everything found, each by the name of its tensor."""

    _MOST = 20
    """Problems that the message lists: one wrong field of config.json can make every tensor wrong."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        lines = [str(problem) for problem in self.problems[: self._MOST]]
        if (more := len(self.problems) - self._MOST) > 0:
            lines.append(f"and {more:,} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[WeightsError], tuple[list[Problem]]]:
        return WeightsError, (self.problems,)


def raise_any(problems: Sequence[Problem]) -> None:
    """Raise problems with weights, each once.

    Raises:
        WeightsError: There are any.
    """
    if problems:
        raise WeightsError(list(dict.fromkeys(problems)))
