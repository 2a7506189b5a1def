"""Errors caused by the caller, the configuration or the launch. Each message says what to change."""

from __future__ import annotations

from bridge.config import BridgeError


class DistError(BridgeError):
    """Base of every error that bridge-dist raises."""


class OptionsError(DistError, ValueError):
    """The options of a distributed build contradict each other."""


class LayoutError(DistError, ValueError):
    """A layout is invalid or does not fit the number of processes."""


class PreflightError(DistError, ValueError):
    """A configuration cannot be built under a layout, or would train incorrectly. Lists every problem found."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type[PreflightError], tuple[list[str]]]:
        return PreflightError, (list(self.problems),)


class AgreementError(DistError, RuntimeError):
    """Ranks would build different models, or a rank is missing. Names the ranks and the fields."""


class CopyError(DistError, ValueError):
    """The copies of a parameter on several ranks differ, or would after training. Names the parameter and a fix."""


class BuilderContractError(DistError, TypeError):
    """A builder or a model configuration lacks something that the engine requires."""


class CpuRuntimeError(DistError, RuntimeError):
    """The CPU runtime cannot be installed or removed in this process."""


class TrainingError(DistError, ValueError):
    """A training run cannot be set up with these options."""


class LoadError(DistError, ValueError):
    """There are no weights to load at a path. Says what is expected."""


class ComparisonError(DistError, RuntimeError):
    """The library that weights come from cannot compute logits to compare with. Says why."""


class CheckpointError(DistError, ValueError):
    """A checkpoint cannot be saved or loaded. Lists every problem, each with the name of a file or a tensor."""


class LaunchError(DistError, RuntimeError):
    """Local ranks could not be started, or one of them failed. Names the rank and the reason."""


class PlanError(DistError, ValueError):
    """A job cannot be planned. Names the reason and what to set."""
