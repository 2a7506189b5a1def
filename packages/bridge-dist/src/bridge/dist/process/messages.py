"""What the processes of a command log: each message once in a run, however many of them have it.

Importing this module imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

_reported: set[str] = set()


def start_run() -> None:
    """From here on print each message of the log once, where nobody has set up logging otherwise."""
    _reported.clear()
    if logging.lastResort is not None:
        logging.lastResort.addFilter(_is_new)


def relay(message: str) -> None:
    """Log a message of another process, unless it was said before."""
    if message not in _reported:
        logger.warning("%s", message)
        _reported.add(message)


def send_messages(send: Callable[[str], object]) -> None:
    """Send what this process would print of its log to another one, which relays it."""
    logging.lastResort = _Sender(send)


def _is_new(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    is_new = message not in _reported
    _reported.add(message)
    return is_new


class _Sender(logging.Handler):
    def __init__(self, send: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(self.format(record))
        except OSError:  # nobody listens any more
            self.handleError(record)
