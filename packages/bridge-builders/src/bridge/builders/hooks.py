"""Hooks on the list of model stages, composed into one function."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.transformer import MegatronModule

from bridge.builders.errors import HookError

Hook = Callable[[list[MegatronModule]], list[MegatronModule]]


def compose_hooks(hooks: list[Hook]) -> Hook:
    """Compose hooks into one function that runs them in list order, each on the result of the one before.

    The hooks are taken as they are now: a later change to the list does not change the composed function.

    Args:
        hooks: Functions from the stages of this rank to the stages of this rank.

    Returns:
        One function; the identity (the same list object comes back) when there are no hooks.

    Raises:
        HookError: At once, if a hook is not callable; when run, if a hook returns None or anything else that is not
            a list of stages. The error names the hook.
    """
    chain = tuple(hooks)
    for position, hook in enumerate(chain):
        if not callable(hook):
            raise HookError(
                f"hook {position} is {hook!r}, which is not callable: give a function of the list of stages"
            )

    def composed(stages: list[MegatronModule]) -> list[MegatronModule]:
        for position, hook in enumerate(chain):
            stages = _run(hook, stages, position=position, total=len(chain))
        return stages

    return composed


def _run(hook: Hook, stages: list[MegatronModule], *, position: int, total: int) -> list[MegatronModule]:
    result: object = hook(stages)
    if not isinstance(result, list) or not result:
        raise HookError(
            f"hook {position + 1} of {total}, {hook_name(hook)}, returned {result!r}: "
            "a hook must return the list of stages (add `return stages` at its end)"
        )
    return result


def hook_name(hook: Hook) -> str:
    """Name a hook for a message: module and qualified name where it has them, else its repr."""
    name = getattr(hook, "__qualname__", None)
    return f"{getattr(hook, '__module__', '?')}.{name}" if name else repr(hook)
