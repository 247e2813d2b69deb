"""The work of one command, shared by all processes that were started with it, on one machine or on many.

What is to be done falls into items that do not depend on who does them. A process claims an item by locking a file
beside the results, makes it, and writes it whole; what is written is done. The lock dies with its process: what a
killed one had claimed is claimed by another. Who finds nothing left waits for the others, for one of them may die. The
last thing, putting the results together, is an item as well.

All processes see one folder: that of a machine, or one of a cluster on which `flock` works, as on NFS and on Lustre
mounted with `flock`. torchrun, a SLURM array or a second terminal may start them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar


class Named(Protocol):
    """What has a name that a file can bear."""

    @property
    def name(self) -> str: ...


Item = TypeVar("Item", bound=Named)

#: Seconds between two looks at what others work on.
POLL = 0.2
#: What follows the key in a lock when all is done.
FINISHED = " finished"


class Work:
    """The work of a process that shares it with none."""

    @property
    def finished(self) -> bool:
        """Whether all is done, by others."""
        return False

    @contextlib.contextmanager
    def claim(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Gives whether the item `name` is this process's; within the block it is nobody else's.

        Arguments:
            name: A file can be called so.
            wait: Whether to wait until nobody works on it.
        """
        yield True

    def finish(self) -> None:
        """Says that all is done."""


class SharedWork(Work):
    """The work of a process that holds a share in a lock, as `inference/files.shared` gives it.

    Arguments:
        descriptor: The lock.
        folder: Where claims are kept.
    """

    def __init__(self, descriptor: int, folder: Path) -> None:
        self.descriptor, self.folder = descriptor, folder

    @property
    def finished(self) -> bool:
        """See `Work`."""
        return noted(self.descriptor).endswith(FINISHED)

    @contextlib.contextmanager
    def claim(self, name: str, wait: bool = False) -> Iterator[bool]:
        """See `Work`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / name, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield not self.finished
        except BlockingIOError:
            yield False
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        """See `Work`."""
        if not self.finished:
            note(self.descriptor, noted(self.descriptor) + FINISHED)


def noted(descriptor: int) -> str:
    """Returns what is written in a lock."""
    return os.pread(descriptor, 4096, 0).decode(errors="replace")


def note(descriptor: int, text: str) -> None:
    """Writes into a lock."""
    os.pwrite(descriptor, text.encode(), 0)
    os.ftruncate(descriptor, len(text.encode()))


def shared_out(items: Sequence[Item], done: Callable[[Item], bool], work: Work) -> Iterator[Item]:
    """Yields the items that this process is to do, each of them until it asks for the next, until all are done.

    Arguments:
        items: All of them, the same at all processes.
        done: Whether an item is done, by whomever.
        work: What is shared.
    """
    left = list(items)
    while left and not work.finished:
        taken = []
        for item in left:
            if done(item):
                continue
            with work.claim(item.name) as ours:
                if not ours:
                    taken.append(item)
                elif not done(item):  # it may have been finished between the two
                    yield item
        left = taken
        if left:
            time.sleep(POLL)
