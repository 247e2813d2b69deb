"""How a program is stopped by SIGTERM or Ctrl-C: at once or after the step under way, with a word on what is kept."""

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
        super().__init__(f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")
        self.number = number

    @property
    def code(self) -> int:
        """The exit code of a program that ends so: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number


@contextlib.contextmanager
def interruptible(stop: Callable[[int], None] | None = None) -> Iterator[None]:
    """Within the block SIGTERM and Ctrl-C raise `Interrupted`; afterwards they do what they did before.

    In a thread that is not the main one signals belong to whoever started it, and stay as they are.

    Arguments:
        stop: Is called with the number of the signal instead, so that a step under way can end; a second Ctrl-C raises
            at once.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stop is None:
            _interrupt(number, frame)
        stop(number)
        signal.signal(signal.SIGINT, _interrupt)

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """Where a signal stops the block, ends the program with the exit code of the signal and prints what `kept` returns.

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
