"""Hooks on the list of model stages, composed into one function."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.transformer import MegatronModule

from bridge.builders.errors import HookError
from bridge.config.errors import warn

Hook = Callable[[list[MegatronModule]], list[MegatronModule]]


def compose_hooks(hooks: list[Hook]) -> Hook:
    """Compose hooks into one function that runs them in list order, each on the result of the one before.

    The hooks are taken as they are now: a later change to the list does not change the composed function. The last
    hook may return None, as in the reference: then the list that it was given counts, and a warning names the hook.

    Args:
        hooks: Functions from the stages of this rank to the stages of this rank.

    Returns:
        One function, whose attribute ``hooks`` holds them; the identity when there are none: the same list object comes
        back.

    Raises:
        HookError: At once, if this is no list of functions; when run, if a hook returns anything but a list of stages,
            or one before the last returns None. The error names the hook.
    """
    given: object = hooks
    if not isinstance(given, list):
        hint = f"write [{hook_name(given)}]" if callable(given) else f"got {given!r}"
        raise HookError(f"hooks come in a list: {hint}")
    chain = tuple(hooks)
    for number, hook in enumerate(chain, 1):
        if not callable(hook):
            raise HookError(f"hook {number} is {hook!r}, which is not callable: give a function of the list of stages")

    def composed(stages: list[MegatronModule]) -> list[MegatronModule]:
        for number, hook in enumerate(chain, 1):
            stages = _run(hook, stages, number=number, total=len(chain))
        return stages

    composed.hooks = chain  # type: ignore[attr-defined]
    return composed


def _run(hook: Hook, stages: list[MegatronModule], *, number: int, total: int) -> list[MegatronModule]:
    result: object = hook(stages)
    if isinstance(result, list) and result:
        return result
    said = f"hook {number} of {total}, {hook_name(hook)}, returned"
    if result is None and number == total:
        warn(f"{said} None: the list that it was given is kept (add `return stages` at its end)")
        return stages
    if isinstance(result, tuple):
        raise HookError(f"{said} a tuple: return a list, not a tuple")
    raise HookError(f"{said} {result!r}: a hook must return the list of stages (add `return stages` at its end)")


def hook_name(hook: Hook) -> str:
    """Name a hook for a message: module and qualified name where it has them, else its repr."""
    name = getattr(hook, "__qualname__", None)
    return f"{getattr(hook, '__module__', '?')}.{name}" if name else repr(hook)
