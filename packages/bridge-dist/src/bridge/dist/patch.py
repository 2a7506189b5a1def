"""Giving names of torch and megatron-core another meaning for a while: the one way in which this package does so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

_MISSING = object()


class Replacement(NamedTuple):
    """A name of a class, module or object, and what it shall mean."""

    owner: object
    name: str
    value: object


@contextlib.contextmanager
def replace_attributes(*replacements: Replacement) -> Iterator[None]:
    """Give names another meaning until the context is left; what an owner only inherited is inherited again."""
    with contextlib.ExitStack() as undo:
        for owner, name, value in replacements:
            undo.callback(_restore, owner, name, vars(owner).get(name, _MISSING))
            setattr(owner, name, value)
        yield


def _restore(owner: object, name: str, before: object) -> None:
    if before is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, before)
