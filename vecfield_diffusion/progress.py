"""How long work says how far it is: a bar where there is a terminal, a line a minute where there is none.

A log of a batch job is no place for a bar that is drawn anew ten times a second, and silence for an hour looks like a
program that hangs. The line is printed by a thread of its own: it comes also while a single step takes minutes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TextIO, TypeVar

from tqdm import tqdm

#: Seconds between two lines.
EVERY = 60.0
#: By how much a share may exceed that of the count and still be the same: a step or two.
_SAME = 0.005

Part = TypeVar("Part")


class Progress:
    """How far some work is. It is a context manager: the bar is drawn, or lines are printed, while the block runs.

    Arguments:
        total: All that there is to do; None where that is not known.
        unit: What is counted, in the plural.
        label: What the work is called.
        done: What was done before.
        leave: Whether the bar stays on the terminal when the work is done. One that does not is for work that may be
            short, and is first drawn after two seconds.
        stream: Where the bar or the lines go; standard error if None.
        every: Seconds between two lines.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        total: float | None,
        unit: str,
        label: str = "",
        *,
        done: float = 0,
        leave: bool = True,
        stream: TextIO | None = None,
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.unit, self.label, self.done = total, unit, label, done
        self.stream, self.every, self.clock = sys.stderr if stream is None else stream, every, clock
        self.leave = leave
        self.values: dict[str, str] = {}
        self._share: float | None = None
        self._bar: tqdm | None = None
        self._ended = threading.Event()
        self._begin()

    def __enter__(self) -> Self:
        self._begin()
        if self.stream.isatty():
            scale = dict(unit=f" {self.unit}", unit_scale=True, smoothing=0.05)
            shown = dict(desc=self.label or None, leave=self.leave, delay=0.0 if self.leave else 2.0)
            self._bar = tqdm(total=self.total, initial=self.done, file=self.stream, **scale, **shown)
        else:
            threading.Thread(target=self._report, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.close()

    def update(self, count: float = 1, share: float | None = None, **values: str) -> None:
        """Takes in that `count` more is done.

        Arguments:
            count: In units of the work.
            share: The share of the work that is done, where something else than the count decides, such as a limit in
                minutes.
            values: What is shown beside, such as a loss.
        """
        self.done += count
        self._share = share
        self.values |= values
        if self._bar is not None:
            self._bar.set_postfix(self.values, refresh=False)
            self._bar.total = self._total()
            self._bar.update(count)

    def write(self, text: str) -> None:
        """Prints a line on standard output, above the bar where there is one."""
        print(text, flush=True) if self._bar is None else self._bar.write(text)

    def line(self) -> str:
        """Returns one line: how far the work is, how fast it went since the last line, how long it will take."""
        now, share = self.clock(), self._part()
        speed = (self.done - self._before) / max(now - self._said, 1e-9)
        self._said, self._before = now, self.done
        total = self._total()
        about = "" if total is None else f" of {total:.0f}" if total == self.total else f" of about {total:.0f}"
        percent = "" if share is None else f" ({share:.0%})"
        parts = [f"{self.done:.0f}{about} {self.unit}{percent}"]
        parts += [f"{name} {value}" for name, value in self.values.items()]
        parts.append(f"{speed:.3g} per s" if speed >= 0.1 or speed == 0 else f"{1 / speed:.3g} s each")
        gained = None if share is None else share - self._first
        if gained:
            parts.append(f"{_duration((now - self._begun) * (1 - share) / gained)} left")
        return (f"{self.label}: " if self.label else "") + ", ".join(parts)

    def _begin(self) -> None:
        self._begun = self._said = self.clock()
        self._before, self._first = self.done, self._part() or 0.0

    def _total(self) -> float | None:
        """Returns all that there will be: as much as the share makes of it, where a limit in minutes comes first."""
        if not self.total or not self._share or self._share <= self.done / self.total + _SAME:
            return self.total
        return self.done / min(1.0, self._share)

    def _part(self) -> float | None:
        """Returns the share of the work that is done."""
        if self._share is not None:
            return min(1.0, self._share)  # a limit in minutes is met in the middle of a step
        return min(1.0, self.done / self.total) if self.total else None

    def _report(self) -> None:
        while not self._ended.wait(self.every):
            print(self.line(), file=self.stream, flush=True)


def bar(total: float | None, unit: str, label: str = "", *, done: float = 0, leave: bool = True) -> Progress:
    """Returns a bar on a terminal, a line a minute elsewhere, on standard error; see `Progress`."""
    return Progress(total, unit, label, done=done, leave=leave)


def over(parts: Sequence[Part], unit: str, label: str) -> Iterator[Part]:
    """Yields the parts of some work, one after another, with a bar that does not stay."""
    with bar(len(parts), unit, label, leave=False) as work:
        for part in parts:
            yield part
            work.update()


def _duration(seconds: float) -> str:
    """Returns seconds in words: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
