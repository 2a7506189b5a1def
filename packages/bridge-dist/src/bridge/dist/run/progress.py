"""Progress display on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")

_LINE_EVERY_S = 10.0
# The terminal's own colours, which suit its background. Those of rich are fixed, for a dark one.
_BAR_COLOURS = {"bar.complete": "cyan", "bar.finished": "green", "bar.pulse": "cyan", "bar.back": "dim"}


def show_progress(
    items: Iterable[ItemT],
    total: int | None,
    *,
    describe: Callable[[int, ItemT], str],
    first: str = "",
    count: Callable[[ItemT], tuple[int, int]] | None = None,
) -> Iterator[ItemT]:
    """Yield items and show progress on standard error: a bar on a terminal, else a line every few seconds.

    Args:
        items: Items, yielded as they are made.
        total: Expected number of items; None if ``count`` tells.
        describe: Returns the text to show, from the number of items so far and the last item.
        first: Text to show before the first item.
        count: Returns from the last item how much is done and how much there is in total; by default, items are
            counted.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress
    from rich.theme import Theme

    console = Console(stderr=True, theme=Theme(_BAR_COLOURS))
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(escape(first), total=total)
        last_printed = time.monotonic()
        for done, item in enumerate(items, start=1):
            message = describe(done, item)
            if count is not None:
                done, total = count(item)
            progress.update(task, completed=done, total=total, description=escape(message))
            if not console.is_terminal and time.monotonic() - last_printed >= _LINE_EVERY_S:
                console.print(f"{done} of {total}: {message}", soft_wrap=True, markup=False, highlight=False)
                last_printed = time.monotonic()
            yield item
