"""Who may write a file: one process, or all that run one command.

A process that writes a file holds a lock beside it, which dies with the process. Processes of the same command share
it, and the work (`inference/work_items.py`); another command finds the file in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.work_items import FINISHED, POLL, SharedWork, note, noted

#: Seconds that the first of several processes may take to begin.
STARTING = 2.0
#: Where claims are kept among the parts of a file.
CLAIMS = "claims"


def parts_of(path: Path) -> Path:
    """Returns the folder of the parts of a file."""
    return path.parent / ".parts" / path.name


@contextlib.contextmanager
def owned(path: Path, *beside: Path) -> Iterator[None]:
    """Holds the lock of a file, which no other process then writes, and removes what killed ones left.

    Arguments:
        path: The file.
        beside: Further files that its owner alone writes.

    Raises:
        UserError: Another process holds it, or the folder cannot be written.
    """
    lock = _lock_of(path)
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(lock)
    try:
        _clean(path, *beside)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def in_use(path: Path) -> bool:
    """Returns whether another process, or another part of this one, holds the lock of a file; see `owned`."""
    try:
        descriptor = os.open(_lock_of(path), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def shared(path: Path, key: str, *beside: Path) -> Iterator[SharedWork]:
    """Holds a share in the lock of a file, which processes of the same command write together, and gives their work.

    Arguments:
        path: The file.
        key: What the command makes, in short; see `FieldsWriter`.
        beside: Further files that they alone write; see `owned`.

    Raises:
        UserError: A process of another command holds it, or the folder cannot be written.
    """
    lock = _lock_of(path)
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _joined(lock, key, lambda: _clean(path, *beside))
    try:
        yield SharedWork(descriptor, parts_of(path) / CLAIMS)
    finally:
        with contextlib.suppress(BlockingIOError):  # the last one tidies up
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _tidy(parts_of(path))
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def _lock_of(path: Path) -> Path:
    """Returns the lock of a file."""
    return path.with_name(f".{path.name}.lock")


def _tidy(parts: Path) -> None:
    """Removes the claims among the parts of a file, and the folders that are then empty."""
    shutil.rmtree(parts / CLAIMS, ignore_errors=True)
    with contextlib.suppress(OSError):
        parts.rmdir()
        parts.parent.rmdir()


def _clean(path: Path, *beside: Path) -> None:
    """Removes what killed processes left half written."""
    for left in [*parts_of(path).glob(".*.tmp"), *(left for file in (path, *beside) for left in _temporary(file))]:
        left.unlink(missing_ok=True)


def _temporary(path: Path) -> Iterator[Path]:
    """Returns the temporary files that `replacing` makes of a file."""
    return path.parent.glob(f".{glob.escape(path.name)}.*.tmp")


def _locked(lock: Path) -> int:
    """Returns the descriptor of a lock file that this process holds. Raises UserError where another one does."""
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _in_use(lock) from None
        # The last owner may have removed the file between opening and locking: then it is nobody's any more.
        if _is(lock, descriptor):
            return descriptor
        os.close(descriptor)


def _joined(lock: Path, key: str, begin: Callable[[], None]) -> int:
    """Returns the descriptor of a lock file in which this process has a share with all others of the same key.

    The first of them calls `begin`. Raises UserError where a process of another key has it.
    """
    until = time.monotonic() + STARTING
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(lock, descriptor):
                begin()
                note(descriptor, key)
        except BlockingIOError:
            pass
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if _is(lock, descriptor) and noted(descriptor).removesuffix(FINISHED) == key:
                return descriptor
            until = min(until, time.monotonic() + POLL) if noted(descriptor) else until
        os.close(descriptor)
        if time.monotonic() > until:
            raise _in_use(lock)
        time.sleep(POLL / 4)


def _is(lock: Path, descriptor: int) -> bool:
    """Whether a lock file is still the one that was opened."""
    with contextlib.suppress(FileNotFoundError):
        return os.fstat(descriptor).st_ino == lock.stat().st_ino
    return False


def _in_use(lock: Path) -> UserError:
    """What to say where a lock is another's."""
    return UserError(
        f"another process is writing {lock.name[1:-5]} in {lock.parent}: wait for it, or give another name=..."
    )


@contextlib.contextmanager
def reported(path: Path, hint: str = "") -> Iterator[None]:
    """Reports what the system refuses in the block."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path.name} into {path.parent}: {error.strerror or error}. "
            f"Free some space or choose another folder with hydra.run.dir=...{hint}"
        ) from error
