"""Progress display on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")

_LINE_EVERY_S = 10.0


def show_progress(
    items: Iterable[ItemT], total: int, *, describe: Callable[[int, ItemT], str], first: str = ""
) -> Iterator[ItemT]:
    """Yield items and show progress on standard error: a bar on a terminal, else a line every few seconds.

    Args:
        items: Items, yielded as they are made.
        total: Expected number of items.
        describe: Returns the text to show, from the number of items so far and the last item.
        first: Text to show before the first item.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(escape(first), total=total)
        last_printed = time.monotonic()
        for done, item in enumerate(items, start=1):
            message = describe(done, item)
            progress.update(task, completed=done, description=escape(message))
            if not console.is_terminal and time.monotonic() - last_printed >= _LINE_EVERY_S:
                console.print(f"{done} of {total}: {message}", soft_wrap=True, markup=False, highlight=False)
                last_printed = time.monotonic()
            yield item
