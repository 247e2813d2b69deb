"""Blocks of the members of one snapshot, kept until all of them are there.

Where an ensemble is larger than what is computed at once, several processes make its blocks, and one that is killed
loses no more than one of them.
"""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.inference.locks import reported

#: What numpy raises on reading something else than a whole file.
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


class MemberBlocks:
    """The blocks of a file that is being filled.

    Arguments:
        path: The file.
        folder: Where they are kept.
        key: What the fields depend on; a block of another key is not there.
    """

    def __init__(self, path: Path, folder: Path, key: str) -> None:
        self.path, self.folder, self.key = path, folder, key

    def add(self, position: int, first: int, members: NDArray) -> None:
        """Keeps members `(m, 1, 2, H, W)` of a position, from the number `first` on. Raises UserError."""
        with reported(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._file(position, first)) as temporary, temporary.open("wb") as stream:
                np.savez(stream, key=np.array(self.key), members=members)

    def find(self, position: int, first: int) -> NDArray | None:
        """Returns a block; None where it is not there, damaged or of another key."""
        with contextlib.suppress(*UNREADABLE), np.load(self._file(position, first)) as block:
            return block["members"] if block["key"].item() == self.key else None
        return None

    def remove(self, position: int, first: int) -> None:
        """Removes a block that is used."""
        self._file(position, first).unlink(missing_ok=True)

    def _file(self, position: int, first: int) -> Path:
        return self.folder / f"{position:08d}-{first:06d}.npz"
