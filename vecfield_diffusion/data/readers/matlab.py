"""MATLAB files of version 5 to 7; those of version 7.3 are HDF5. Both store x before y."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import scipy.io
import xarray as xr

from vecfield_diffusion.data.readers.reader import UNREADABLE, Format, check_size, unnamed
from vecfield_diffusion.errors import UserError


def read(path: Path, group: str | None = None) -> xr.Dataset:
    """The arrays of numbers, in memory, with their dimensions reversed as in version 7.3 and without names.

    Raises:
        UserError: The file is damaged, or larger than the memory once it is unpacked.
    """
    try:
        size = sum(8.0 * np.prod(shape, dtype=float) for _, shape, _ in scipy.io.whosmat(path))
        check_size(path, size, "what it holds unpacked")
        variables = scipy.io.loadmat(path)
    except (*UNREADABLE, zlib.error) as error:
        raise UserError(f"'{path}' is a damaged MATLAB file: {error}. Copy or download it again.") from error
    numbers = {name: array for name, array in variables.items() if isinstance(array, np.ndarray)}
    arrays = {name: array.T for name, array in numbers.items() if array.dtype.kind in "fiub"}
    return unnamed(arrays, "MATLAB", turned=True)


FORMAT = Format("MATLAB", (".mat",), lambda path, magic: magic.startswith(b"MATLAB 5.0"), read)
