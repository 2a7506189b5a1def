"""Progress on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")

_LINE_EVERY_S = 10.0


def show_progress(
    items: Iterable[ItemT], total: int, *, describe: Callable[[int, ItemT], str], first: str = ""
) -> Iterator[ItemT]:
    """Pass items through, and show on standard error how far they are: a bar on a terminal, else a line now and then.

    Args:
        items: What is being made, one after the other.
        total: How many there will be.
        describe: What to show beside the number once there are so many, of which this is the last.
        first: What to show before there is any.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(escape(first), total=total)
        told = time.monotonic()
        for done, item in enumerate(items, start=1):
            said = describe(done, item)
            progress.update(task, completed=done, description=escape(said))
            if not console.is_terminal and time.monotonic() - told >= _LINE_EVERY_S:
                console.print(f"{done} of {total}: {said}", soft_wrap=True, markup=False, highlight=False)
                told = time.monotonic()
            yield item
