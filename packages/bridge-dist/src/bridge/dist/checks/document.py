"""Check a document against a layout without ranks and without torch, as `bridge validate --layout` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, cast

from bridge.config import BridgeError, Document, DocumentError, Problem
from bridge.config.canonical import canonicalize_checked
from bridge.config.read.view import View
from bridge.config.schema.ranges import TRANSFORMER
from bridge.config.schema.registry import get_declarations, import_builder
from bridge.config.schema.table import get_shipped
from bridge.config.schema.values import ParsedConfig
from bridge.dist.checks.preflight import Rule, Setup, check
from bridge.dist.checks.rules import MODEL_RULES
from bridge.dist.document_layout import apply_layout
from bridge.dist.errors import LayoutError, OptionsError, PreflightError
from bridge.dist.layout import CONFIG_FIELDS, Layout
from bridge.dist.wrapper import ShardingStrategy, Wrapper, make_default_ddp_options

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    from bridge.config import ModelConfig
    from bridge.config.read.decode import Checked

RULES_GROUP = "bridge.rules"
"""The entry-point group of model families' rules: maps the name of a builder to a tuple of rules.

The module of the rules should not import torch, so that documents of the family are checked in a fraction of a second.
"""


def check_document(document: Document, layout: Mapping[str, int], *, wrapper: str = "ddp") -> list[Problem]:
    """Return the known problems of building a document's model under a layout.

    The build itself also finds problems that depend on the machine or that only megatron-core's constructors check.

    Args:
        document: Describes the model; it is not changed.
        layout: Sizes by axis: tp, pp, vp, cp, ep, etp, dp. They override those of the document, as in `bridge build`.
            dp defaults to 1.
        wrapper: The data-parallel wrapper, with the options that `bridge build` gives it: ddp, megatron-fsdp,
            torch-fsdp2 or none.

    Raises:
        LayoutError: An axis is unknown.
        OptionsError: The wrapper is unknown.
    """
    known = (*CONFIG_FIELDS, "dp")
    if unknown := [axis for axis in layout if axis not in known]:
        raise LayoutError(f"unknown layout axes: {', '.join(unknown)}; choose from {', '.join(known)}")
    if wrapper not in list(Wrapper):
        raise OptionsError(f"unknown wrapper {wrapper!r}: choose one of {', '.join(Wrapper)}")
    document = deepcopy(document)
    try:
        document.migrate()
        apply_layout(document, {axis: size for axis, size in layout.items() if axis != "dp"})
        _check(document.check(), Wrapper(wrapper), dp=layout.get("dp", 1), rules=find_rules)
    except DocumentError as error:
        return error.problems
    except PreflightError as error:
        return [Problem("$", problem, document.source) for problem in error.problems]
    except BridgeError as error:
        return [Problem("$", str(error), document.source)]
    return []


def refuse_before_imports(
    document: Document,
    *,
    wrapper: Wrapper,
    world_size: int | None = None,
    dp: int | None = None,
    distributed_optimizer: bool = False,
    sharding_strategy: ShardingStrategy | None = None,
) -> Setup | None:
    """Run the checks that need no heavy import, to fail early; the build repeats them and runs the rest.

    Documents with targets of other distributions are skipped, because reading them would import those distributions.
    Return what was checked, for more checks; None if nothing was.

    Args:
        document: In its current version, with its layout.
        wrapper: The data-parallel wrapper.
        world_size: Number of ranks; None for as many as the layout needs.
        dp: The expected data-parallel size, if any.
        distributed_optimizer: Whether DDP shards the optimizer's state.
        sharding_strategy: What Megatron-FSDP shards; None for its default.

    Raises:
        DocumentError: The document has invalid or contradictory values.
        LayoutError: The layout does not fit the ranks.
        PreflightError: The configuration is known to fail under the layout or with the wrapper.
    """
    if not _names_only_shipped_targets(document.data):
        return None
    return _check(
        document.check(),
        wrapper,
        world_size=world_size,
        dp=dp,
        distributed_optimizer=distributed_optimizer,
        sharding_strategy=sharding_strategy,
        rules=_load_declared_rules,
    )


def _names_only_shipped_targets(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_names_only_shipped_targets, value.values()))
    if isinstance(value, list):
        return all(map(_names_only_shipped_targets, value))
    return not isinstance(value, str) or value not in get_declarations() or get_shipped(value) is not None


def _check(
    checked: Checked,
    wrapper: Wrapper,
    *,
    rules: Callable[[str | None], tuple[Rule, ...]],
    world_size: int | None = None,
    dp: int | None = None,
    distributed_optimizer: bool = False,
    sharding_strategy: ShardingStrategy | None = None,
) -> Setup | None:
    model, transformer = _make_views(checked)
    if transformer is None:  # its builder keeps it elsewhere, so only a build can check it
        return None
    # A view has the attributes of what it stands for.
    config = cast("TransformerConfig", transformer)
    setup = Setup(
        transformer=config,
        layout=Layout.of(config, world_size, dp=dp),
        options=_DefaultOptions.of(
            wrapper, config, distributed_optimizer=distributed_optimizer, sharding_strategy=sharding_strategy
        ),
        model=cast("ModelConfig", model),
    )
    check(setup, (*MODEL_RULES, *rules(checked.builder)))
    return setup


def _make_views(checked: Checked) -> tuple[View, View | None]:
    """Return views of the whole configuration and of its TransformerConfig, if there is one."""
    # In the canonical form every value has one spelling, which rules can compare.
    parsed, data = checked.parsed, canonicalize_checked(checked)
    if TRANSFORMER in parsed.target.bases:
        view = View(data, parsed.target)
        return view, view
    inner = parsed.values.get("transformer")
    if not isinstance(inner, ParsedConfig):
        return View(data, parsed.target), None
    transformer = View(data["transformer"], inner.target)
    return View({**data, "transformer": transformer}, parsed.target, transformer), transformer


def find_rules(builder: str | None) -> tuple[Rule, ...]:
    """Return the rules of a model family by the dotted name of its builder.

    Rules that an installed distribution declares are preferred; otherwise the builder is imported, which takes seconds.
    """
    if builder is None or builder in _load_rule_entry_points():
        return _load_declared_rules(builder)
    return tuple(getattr(import_builder(builder), "rules", ()))


def _load_declared_rules(builder: str | None) -> tuple[Rule, ...]:
    point = _load_rule_entry_points().get(builder or "")
    return () if point is None else tuple(point.load())


@cache
def _load_rule_entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=RULES_GROUP)}


@dataclass(frozen=True, kw_only=True)
class _DefaultOptions:
    """The default options of `bridge build`, as far as rules read them."""

    wrapper: Wrapper
    ddp_config: DistributedDataParallelConfig | None
    use_layer_wise_distributed_optimizer: bool = False
    has_layer_wise_layout: bool = False

    @classmethod
    def of(
        cls,
        wrapper: Wrapper,
        config: Any,
        *,
        distributed_optimizer: bool,
        sharding_strategy: ShardingStrategy | None,
    ) -> _DefaultOptions:
        if wrapper is Wrapper.NONE:
            return cls(wrapper=wrapper, ddp_config=None)
        usual = make_default_ddp_options(
            wrapper,
            config,
            distributed_optimizer=distributed_optimizer,
            sharding_strategy=sharding_strategy,
            on_gpu=True,
        )
        return cls(wrapper=wrapper, ddp_config=cast("DistributedDataParallelConfig", _Defaults(usual)))


class _Defaults:
    """A stand-in for DistributedDataParallelConfig without torch: fields that are not given are False, or 1."""

    num_distributed_optimizer_instances = 1
    outer_dp_sharding_strategy = "no_shard"

    def __init__(self, given: Mapping[str, Any]) -> None:
        vars(self).update(given)

    def __getattr__(self, name: str) -> bool:
        return False
