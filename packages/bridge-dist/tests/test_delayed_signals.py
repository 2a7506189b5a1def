"""Signals wait while a process is started."""

from __future__ import annotations

import signal

from bridge.dist.process.signals import delay_signals


def test_a_signal_waits_until_the_context_is_left() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    try:
        with delay_signals():
            signal.raise_signal(signal.SIGTERM)
            assert caught == []
        assert caught == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
