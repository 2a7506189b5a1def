"""The errors of bridge-dist, mistakes of the caller, of the configuration or of the start. Each says what to change."""

from __future__ import annotations

from bridge.config import BridgeError


class DistError(BridgeError):
    """Base of every error that bridge-dist raises."""


class OptionsError(DistError, ValueError):
    """The options of a distributed build contradict each other."""


class LayoutError(DistError, ValueError):
    """A layout does not fit the number of processes, or is not a layout."""


class PreflightError(DistError, ValueError):
    """A configuration cannot be built, or would silently train wrong, under a layout. Lists every problem found."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type[PreflightError], tuple[list[str]]]:
        return PreflightError, (list(self.problems),)


class AgreementError(DistError, RuntimeError):
    """Ranks are about to build different things, or one of them is missing. Names the ranks and the fields."""


class CopyError(DistError, ValueError):
    """Ranks hold, or would train, different things in place of copies of a parameter. Names it, and what to do."""


class BuilderContractError(DistError, TypeError):
    """A builder or a model configuration lacks what the engine needs of it."""


class CpuRuntimeError(DistError, RuntimeError):
    """The CPU runtime cannot be installed, or removed, here."""


class TrainingError(DistError, ValueError):
    """A training run cannot be set up as asked for."""


class LaunchError(DistError, RuntimeError):
    """Local ranks could not be started, or one of them failed. Says which, and why."""


class PlanError(DistError, ValueError):
    """A job cannot be planned: says what, and what to set."""
