"""Files that are written whole or not at all.

A file appears under its name only when it is complete: it is written under a temporary name in the same folder, flushed
to the disk and renamed. A full disk, a folder without permission or Ctrl-C leave what was there before, and nothing
else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vecfield_diffusion.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the block a temporary path to write, and puts that file in the place of `path` when the block has ended.

    Arguments:
        path: The file to write, in a folder that exists; an older one is replaced.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        # The renaming itself is safe only when the folder is.
        _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text_atomic(
    path: str | Path,
    text: str,
    advice: str = "Free some space or choose another folder with hydra.run.dir=...",
) -> None:
    """Writes `text` as UTF-8, whole or not at all, in a folder that is made where it is missing.

    Arguments:
        path: The file.
        text: What it is to hold.
        advice: The sentence on what to do where it cannot be written.

    Raises:
        UserError: The file cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            temporary.write_bytes(text.encode())
    except OSError as error:
        raise UserError(
            f"cannot write {target.name} into {target.parent}: {error.strerror or error}. {advice}"
        ) from error


def _sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
