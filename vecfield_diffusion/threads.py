"""How many threads to compute with, on a machine that others use as well.

Threads of one program that share fewer cores with other programs wait for each other at the end of each operation: one
that has lost its core holds up all. Waiting actively, as OpenMP does unless asked otherwise, they take the very cores
that they wait for; two programs of two threads on two cores were measured at a seventieth of their speed. So programs
wait passively (`wait_passively`), start with the cores that are free (`free`), and those that work for long try out
what is fastest (`Tuner`). A number that the user has set, OMP_NUM_THREADS, is kept.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

#: A number of threads that the user chose.
CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CGROUP, STAT, LOAD = Path("/sys/fs/cgroup"), Path("/proc/stat"), Path("/proc/self/cgroup")


def wait_passively() -> None:
    """Lets threads sleep while they wait. Works before the library of OpenMP is loaded, so before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def chosen() -> bool:
    """Returns whether the user has chosen the number of threads."""
    return any(os.environ.get(name) for name in CHOSEN)


def allowed(root: Path = CGROUP, own: Path = LOAD) -> int:
    """Returns the cores that this process may use: its affinity, and the quota of its control group, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = quota(root, own)
    return max(1, min(cores, int(limit))) if limit else cores


def quota(root: Path = CGROUP, own: Path = LOAD) -> float:
    """Returns the cores that the control groups of this process, version 1 or 2, leave it.

    0 where they set no limit.
    """
    limits = []
    for group in control_groups(root, own):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            try:
                share, period = " ".join((group / name).read_text() for name in files).split()
                limits += [float(share) / float(period)] if share != "max" and float(share) > 0 else []
            except (OSError, ValueError):
                continue
    return max(1.0, min(limits)) if limits else 0.0


def control_groups(root: Path, own: Path) -> list[Path]:
    """Returns the folders of the control groups that may limit the processor: the root and those above this process."""
    try:
        paths = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        paths = []
    folders = {root, root / "cpu"}
    for _, controllers, path in (parts for parts in paths if len(parts) == 3):
        base = root if not controllers else root / "cpu"
        if not controllers or "cpu" in controllers.split(","):
            below = base / path.strip("/")
            folders |= {folder for folder in (below, *below.parents) if folder.is_relative_to(base)}
    return sorted(folders)


def free(most: int | None = None, seconds: float = 0.2, stat: Path = STAT) -> int:
    """Returns the cores that had nothing to do for the last moment, from 1 to `most`, by default all allowed."""
    most = allowed() if most is None else most
    before = ticks(stat)
    if most == 1 or before is None:
        return most if most == 1 else max(1, min(most, round(most - os.getloadavg()[0])))
    time.sleep(seconds)
    idle, total = (now - then for now, then in zip(ticks(stat) or before, before, strict=True))
    return max(1, min(most, round((os.cpu_count() or 1) * idle / total))) if total > 0 else most


def ticks(stat: Path) -> tuple[int, int] | None:
    """Returns `(idle, all)` ticks of all cores since the start of the machine; None where nothing says so."""
    try:
        values = [int(value) for value in stat.read_text().partition("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return values[3] + values[4], sum(values)


class Tuner:
    """Finds the number of threads with which a step takes the least time, and finds it anew when steps grow slower.

    It goes down from the largest number by halves as long as that is hardly slower. Then it compares two in turn: the
    fastest, and the smallest that was as fast, else the second. Of two within a tenth of each other the smaller is
    taken: the rest of the machine has the better of it. Call `start` before a step and `stop` after it; the time in
    between is not counted.

    Arguments:
        most: The largest number of threads.
        apply: Sets the number of threads.
        clock: The time in seconds.

    Attributes:
        threads: The number in use.
    """

    #: Steps that are not counted: at the start, and after each change.
    WARM, CHANGED = 3, 1
    #: Measurements of each of the best two.
    ROUNDS = 3
    #: A step so many times slower than when last measured asks for another measurement.
    SLOWER = 1.5
    #: Seconds of steps that one looks back on.
    WINDOW = 10.0
    #: Seconds until the next measurement in any case: at first, at most; and in durations of the last one.
    FIRST, LAST, SHARE = 60.0, 900.0, 20.0

    def __init__(self, most: int, apply: Callable[[int], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.apply, self.clock = most, apply, clock
        self.threads = most
        self.seconds: dict[int, float] = {}  # of a step, as last measured
        self.wait, self.skip = self.FIRST, self.WARM
        self.begin()

    def begin(self) -> None:
        """Begins a measurement."""
        self.times: dict[int, list[float]] = {}
        self.pair: list[int] = []
        self.recent: deque[float] = deque(maxlen=1000)
        self.measuring, self.since = True, self.clock()
        self.use(self.most)

    def use(self, threads: int) -> None:
        """Works with so many threads from the next step on."""
        if threads != self.threads:
            self.skip = max(self.skip, self.CHANGED)
        self.threads = threads
        self.apply(threads)

    def start(self) -> None:
        """A step begins."""
        self.began = self.clock()

    def stop(self) -> str:
        """Ends a step.

        Returns what was found, where a measurement is over that changed the number; else ''.
        """
        seconds = self.clock() - self.began
        if self.skip > 0:
            self.skip -= 1
            return ""
        return self.measured(seconds) if self.measuring else self.watched(seconds)

    def measured(self, seconds: float) -> str:
        """Takes in a step of a measurement."""
        self.times.setdefault(self.threads, []).append(seconds)
        if not self.pair:
            if self.threads > 1 and seconds <= 1.3 * min(times[0] for times in self.times.values()):
                self.use(self.threads // 2)
                return ""
            ranked = sorted(self.times, key=lambda threads: self.times[threads][0])
            least = self.times[ranked[0]][0]
            close = min(threads for threads in ranked if self.times[threads][0] <= 1.1 * least)
            self.pair = ranked[:2] if close == ranked[0] else [ranked[0], close]
        left = [threads for threads in self.pair if len(self.times[threads]) < self.ROUNDS]
        # What is twice as slow need not be measured again.
        left = [threads for threads in left if self.times[threads][0] < 2 * min(min(t) for t in self.times.values())]
        if left:
            self.use(min(left, key=lambda threads: len(self.times[threads])))
            return ""
        return self.end()

    def end(self) -> str:
        """Ends a measurement."""
        before = self.best() if self.seconds else self.most
        self.seconds = {threads: median(self.times[threads]) for threads in self.pair}
        best, now = self.best(), self.clock()
        self.wait = self.FIRST if best != before else min(2 * self.wait, self.LAST)
        self.measuring, self.next = False, now + max(self.wait, self.SHARE * (now - self.since))
        self.use(best)
        if best == before:
            return ""
        said = ", ".join(f"{seconds:.3g} s with {threads}" for threads, seconds in sorted(self.seconds.items()))
        return f"threads: {best} of {self.most}, a step takes {said}"

    def best(self) -> int:
        """Returns the smallest number of threads within a tenth of the fastest."""
        least = min(self.seconds.values())
        return min(threads for threads, seconds in self.seconds.items() if seconds <= 1.1 * least)

    def watched(self, seconds: float) -> str:
        """Takes in a step between measurements."""
        self.recent.append(seconds)
        if len(self.recent) >= 3 and sum(self.recent) >= self.WINDOW:
            slower = median(self.recent) > self.SLOWER * self.seconds[self.threads]
            self.recent.clear()
            if slower:
                self.begin()
        if not self.measuring and self.clock() > self.next:
            self.begin()
        return ""


class Fixed:
    """In the place of a `Tuner` where the number of threads stays as it is."""

    def start(self) -> None:
        """A step begins."""

    def stop(self) -> str:
        """Ends a step."""
        return ""
