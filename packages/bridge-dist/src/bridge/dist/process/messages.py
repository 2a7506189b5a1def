"""Log messages of a command's processes: each message is printed once per run, however many processes log it.

Importing this module does not import torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

_reported: set[str] = set()


def start_run() -> None:
    """Print each log message once from now on, unless the application has configured logging."""
    _reported.clear()
    if logging.lastResort is not None:
        logging.lastResort.addFilter(_is_new)


def relay(message: str) -> None:
    """Log a message of another process unless it was already reported."""
    if message not in _reported:
        logger.warning("%s", message)
        _reported.add(message)


def send_messages(send: Callable[[str], object]) -> None:
    """Send the log messages of this process to another one, which relays them."""
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
        except OSError:  # the other process has ended
            self.handleError(record)
