"""How much memory is left to this process, and whether an error says that it is full."""

from __future__ import annotations

from pathlib import Path

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
#: Of a control group, versions 2 and 1: the limit, the use, and what of the use the system would give up.
FILES = [
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
]


def available(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Returns the bytes that can be taken without swapping, of the machine and its control group.

    None where nothing says so.

    What the system keeps of files and could give up counts as free.
    """
    found = []
    if (free := entry(meminfo, "MemAvailable:")) is not None:
        found.append(1024 * free)
    for limit, use, stat, inactive in FILES:
        try:
            left = int((cgroup / limit).read_text()) - int((cgroup / use).read_text())
        except (OSError, ValueError):  # the text "max" is no limit
            continue
        found.append(left + (entry(cgroup / stat, inactive) or 0))
    return max(0, min(found)) if found else None


def entry(path: Path, name: str) -> int | None:
    """Returns the number beside a name in a file of lines `name number`; None where there is none."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
        return next((int(words[1]) for words in lines if words[:1] == [name] and len(words) > 1), None)
    except (OSError, ValueError):
        return None


def readable(count: float) -> str:
    """Returns a number of bytes for messages, such as 1.2 GB."""
    for unit in ("bytes", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


#: What torch and Python raise where memory is full; a RuntimeError may be anything else, see `is_full`.
FULL = (MemoryError, RuntimeError)


def is_full(error: BaseException) -> bool:
    """Returns whether an error says that the memory of the machine or of its GPU is full."""
    text = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text
