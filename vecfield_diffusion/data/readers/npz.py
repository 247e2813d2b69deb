"""npz: the arrays of an archive of NumPy."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import xarray as xr

from vecfield_diffusion.data.readers.reader import UNREADABLE, Format, check_size, unnamed
from vecfield_diffusion.errors import UserError


def read(path: Path, group: str | None = None) -> xr.Dataset:
    """The arrays of numbers and dates of an archive, in memory; their dimensions have no names.

    Raises:
        UserError: It is damaged, not an archive of arrays, or larger than the memory once it is unpacked.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        check_size(path, size, "what it holds unpacked")
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                try:
                    arrays[name] = archive[name]
                except ValueError:  # an array of objects, which would run code
                    continue
    except (*UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"'{path}' is a damaged npz file, or another archive: {error}. Copy it again.") from error
    return unnamed({name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}, "npz")


FORMAT = Format("npz", (".npz",), lambda path, magic: magic.startswith(b"PK\x03\x04"), read)
