"""How a program is stopped: SIGTERM and Ctrl-C become an exception, so that what is finished is kept and said."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn


class Interrupted(BaseException):
    """The program was asked to stop by the signal `number`; like `KeyboardInterrupt`, no handler of errors takes it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def code(self) -> int:
        """The exit code of a program that ends so: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block SIGTERM and Ctrl-C raise `Interrupted`; afterwards they do what they did before.

    In a thread that is not the main one signals belong to whoever started it, and stay as they are.
    """
    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, _interrupt)
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """Within the block a signal ends the program, which says what `kept` returns and how to go on.

    Raises:
        SystemExit: A signal came.
    """
    try:
        with interruptible():
            yield
    except Interrupted as stop:
        print(f"{stop}: {kept()}; the same command goes on", file=sys.stderr)
        raise SystemExit(stop.code) from None


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)
