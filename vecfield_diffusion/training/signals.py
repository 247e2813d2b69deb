"""How a run is stopped from outside: after the step under way, with its state saved."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """The run was asked to stop by a signal; its state is saved. `signal` is the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@contextmanager
def signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Within the block SIGTERM and Ctrl-C call `stop` with their number; a second Ctrl-C ends the program at once."""

    def handle(number: int, frame: object) -> None:
        stop(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
    except ValueError:
        before = {}  # not the main thread: signals belong to whoever started us
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
