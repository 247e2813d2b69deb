"""MATLAB files of version 5 to 7; those of version 7.3 are HDF5. Both store x before y."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
    found = dict(_numbers(variables))
    arrays = {name: array.T for name, array in found.items() if array.dtype.kind in "fiub"}
    dataset = unnamed(arrays, "MATLAB", turned=True)
    units = re.findall(r"\[(.*?)\]", " ".join(map(str, np.ravel(found.get("units", "")))))
    if len(units) == 2:  # as PIVlab has them: "[px] respectively [px/frame]"
        for name, variable in dataset.variables.items():
            variable.attrs |= {"units": units[0]} if name in ("x", "y") else {}
            variable.attrs |= {"units": units[1]} if re.match(r"[uv](_|$)", str(name)) else {}
    return dataset


def _numbers(variables: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays by name: those in a structure too, and those in cells of one shape as one along a last dimension."""
    for name, array in variables.items():
        if not isinstance(array, np.ndarray):
            continue
        if array.dtype.names and array.size == 1:
            yield from _numbers({field: array.flat[0][field] for field in array.dtype.names})
        elif array.dtype.kind == "O" and len({np.shape(cell) for cell in array.flat}) == 1:
            cells = np.stack([np.asarray(cell) for cell in array.flat], axis=-1)
            # Coordinates that are the same in every cell are one.
            yield name, cells[..., 0] if cells.dtype.kind == "f" and (cells == cells[..., :1]).all() else cells
        else:
            yield name, array


FORMAT = Format("MATLAB", (".mat",), lambda path, magic: magic.startswith(b"MATLAB 5.0"), read)
