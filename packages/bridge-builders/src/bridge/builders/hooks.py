"""Compose hooks on the list of stages into one function."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.transformer import MegatronModule

from bridge.builders.errors import HookError
from bridge.config.errors import warn

Hook = Callable[[list[MegatronModule]], list[MegatronModule]]


def compose_hooks(hooks: list[Hook]) -> Hook:
    """Compose hooks into one function that runs them in order, each on the result of the previous one.

    The list of hooks is copied: changing it later does not affect the composed function. As in megatron.training, the
    last hook may return None. Its input list is then returned, with a warning that names the hook.

    Args:
        hooks: Functions that take the list of this rank's stages and return it.

    Returns:
        The composed function, whose attribute ``hooks`` holds the hooks. Without hooks it returns its argument.

    Raises:
        HookError: ``hooks`` is not a list of functions. The composed function raises it, with the name of the hook, if
            a hook does not return a list of stages, or if a hook other than the last returns None.
    """
    given: object = hooks
    if not isinstance(given, list):
        instead = f"a function: write [{get_hook_name(given)}]" if callable(given) else repr(given)
        raise HookError(f"hooks must be a list, got {instead}")
    chain = tuple(hooks)
    for number, hook in enumerate(chain, 1):
        if not callable(hook):
            raise HookError(
                f"hook {number} is {hook!r}, which is not callable: "
                "pass a function that takes and returns the list of stages"
            )

    def composed(stages: list[MegatronModule]) -> list[MegatronModule]:
        for number, hook in enumerate(chain, 1):
            stages = _run(hook, stages, number=number, total=len(chain))
        return stages

    composed.hooks = chain  # type: ignore[attr-defined]
    return composed


def _run(hook: Hook, stages: list[MegatronModule], *, number: int, total: int) -> list[MegatronModule]:
    """Run one hook and check its result."""
    result: object = hook(stages)
    if isinstance(result, list) and result:
        return result
    # Warnings and errors start with the hook, so that the user can find it in a long list.
    prefix = f"hook {number} of {total}, {get_hook_name(hook)}, returned"
    if result is None and number == total:
        warn(f"{prefix} None: its input list is kept (add `return stages` to the end of the hook)")
        return stages
    if isinstance(result, tuple):
        raise HookError(f"{prefix} a tuple: return a list")
    raise HookError(f"{prefix} {result!r}: a hook must return the list of stages (add `return stages` to its end)")


def get_hook_name(hook: Hook) -> str:
    """Return the name of a hook for messages: module and qualified name if it has them, otherwise its repr."""
    name = getattr(hook, "__qualname__", None)
    return f"{getattr(hook, '__module__', '?')}.{name}" if name else repr(hook)
