"""Pre-flight checks: refuse setups that are known to fail late, to hang or to train incorrectly, before the build.

A rule reads a configuration, a layout and the build options, and reports conflicts and what to set. Importing this
module does not import torch: rules read a live configuration and the view of a document in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import cleandoc
from typing import TYPE_CHECKING, Protocol

from bridge.config import ModelConfig
from bridge.dist.errors import PreflightError
from bridge.dist.layout import Layout
from bridge.dist.wrapper import Wrapper

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

MEGATRON = "megatron-core 0.19.2"
"""The version in which the behaviour behind Megatron's rules was observed."""

CONSTRUCTOR = "the constructor of TransformerConfig refuses it too"
"""Reason that the common test does not reproduce a failure, for ``no_reproduction``."""


SOURCE = "it needs Transformer Engine, and was read in the source"
"""The same for a rule about layers that need a GPU."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine and the process of a build; the defaults mean no GPU and nothing set."""

    compute_capability: tuple[int, int] | None = None
    """The compute capability of the GPU, (9, 0) for Hopper; None without a GPU."""

    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables."""

    has_user_buffers: bool = False
    """Whether Transformer Engine has the buffers that ``tp_comm_overlap`` communicates through."""

    is_batch_invariant: bool = False
    """Whether Megatron's batch-invariant kernels are switched on."""

    has_ring_exchange: bool = False
    """Whether torch was built with ``torch.distributed.ring_exchange``."""


class Options(Protocol):
    """The build options that rules read: see ``bridge.dist.BuildOptions``."""

    @property
    def wrapper(self) -> Wrapper: ...

    @property
    def ddp_config(self) -> DistributedDataParallelConfig | None: ...

    @property
    def use_layer_wise_distributed_optimizer(self) -> bool: ...

    @property
    def has_layer_wise_layout(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The input of a rule: model configuration, layout, build options and environment.

    The configurations are live objects, or views of a document with the same attributes. In a view dtypes are strings
    such as ``torch.bfloat16``: compare them by ``str``.
    """

    transformer: TransformerConfig
    layout: Layout
    options: Options
    model: ModelConfig | None = None
    """The whole configuration of the model, if there is one."""
    groups: ProcessGroupCollection | None = None
    """The process groups; None before ``create_process_groups`` has made them."""
    embedding_ranks: list[int] | None = None
    """The pipeline ranks in the embedding group; None before the groups are made."""
    environment: Environment = field(default_factory=Environment)

    @property
    def ddp(self) -> DistributedDataParallelConfig:
        """The configuration of the wrapper. Without a wrapper there is none: check ``is_wrapped`` first."""
        assert self.options.ddp_config is not None
        return self.options.ddp_config

    @property
    def is_wrapped(self) -> bool:
        """Whether stages get a wrapper."""
        return self.options.wrapper is not Wrapper.NONE

    @property
    def shards_optimizer(self) -> bool:
        """Whether DDP reduces to each rank only the gradients of the parameters that it updates."""
        return self.ddp.use_distributed_optimizer or self.options.has_layer_wise_layout

    @property
    def has_virtual_pipeline(self) -> bool:
        """Whether a rank holds several stages."""
        return self.layout.vp > 1

    @property
    def is_fsdp(self) -> bool:
        """Whether stages get a wrapper that shards them."""
        return self.options.wrapper in (Wrapper.MEGATRON_FSDP, Wrapper.TORCH_FSDP2)

    def is_wrapped_with(self, wrapper: Wrapper) -> bool:
        """Return whether stages get this wrapper."""
        return self.options.wrapper is wrapper


Problems = Callable[[Setup], Iterator[str]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A combination that is known not to work.

    ``name`` is short and stable. ``why`` says what happens without the rule, ``observed_in`` in which version (None: it
    follows by arithmetic). ``problems`` yields the conflicts of a setup, each with what to set.
    ``no_reproduction`` says why the common test does not reproduce the failure, if it does not.
    """

    name: str
    why: str
    problems: Problems
    observed_in: str | None = None
    no_reproduction: str | None = None
    is_first: bool = False
    """Whether the rules after this one rely on it: they are skipped if it finds a problem."""


def rule(
    *, observed_in: str | None = None, no_reproduction: str | None = None, is_first: bool = False
) -> Callable[[Problems], Rule]:
    """Turn a function into a rule, named like the function with dashes; its docstring is the rule's ``why``."""

    def make_rule(problems: Problems) -> Rule:
        return Rule(
            name=problems.__name__.replace("_", "-"),
            why=cleandoc(problems.__doc__ or ""),
            problems=problems,
            observed_in=observed_in,
            no_reproduction=no_reproduction,
            is_first=is_first,
        )

    return make_rule


def check(setup: Setup, rules: Sequence[Rule]) -> None:
    """Check a setup against rules: ``bridge.dist.checks.rules`` for every model, and the rules of its family.

    Raises:
        PreflightError: With every problem found, each with the name of its rule.
    """
    problems: list[str] = []
    for rule in rules:
        problems += [f"{problem} [{rule.name}]" for problem in rule.problems(setup)]
        if problems and rule.is_first:
            break
    if problems:
        raise PreflightError(problems)
