"""Temporary replacement of attributes of torch and megatron-core. All patches of this package go through it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

_MISSING = object()


class Replacement(NamedTuple):
    """An attribute of a class, module or object, and its temporary value."""

    owner: object
    name: str
    value: object


@contextlib.contextmanager
def replace_attributes(*replacements: Replacement) -> Iterator[None]:
    """Replace attributes until the context is left. An attribute that was inherited is inherited again."""
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
