"""Ctrl-C and SIGTERM: what is finished is kept, and one line says how to go on."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Terminated(BaseException):
    """SIGTERM came."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextlib.contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """Ends the program with exit code 130 for Ctrl-C and 143 for SIGTERM, and says what `kept` returns.

    Raises:
        SystemExit: A signal came.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if main else None
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        name, code = ("SIGTERM", 143) if isinstance(stop, Terminated) else ("Ctrl-C", 130)
        print(f"stopped by {name}: {kept()}; the same command goes on", file=sys.stderr)
        raise SystemExit(code) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
