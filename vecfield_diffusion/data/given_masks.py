"""Masks that a user gives: how their files are read, and whether training has seen masks like them."""

from __future__ import annotations

import tokenize
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from PIL import Image
from torch import Tensor

from vecfield_diffusion.data.readers import open_dataset
from vecfield_diffusion.data.readers.reader import UNREADABLE as DAMAGED
from vecfield_diffusion.errors import UserError, nearest


def shares_of(observed: Tensor, domain: Tensor) -> Tensor:
    """The shares of the cells of a domain that masks observe, `(n,)`, without masks on a domain that has none.

    Arguments:
        observed: The masks, boolean `(n, 1, H, W)`.
        domain: Boolean `(H, W)`, or one for each mask, `(n, H, W)`.
    """
    cells = domain.expand(len(observed), *observed.shape[-2:])
    counts = cells.flatten(1).sum(1)
    return ((observed[:, 0] & cells).flatten(1).sum(1) / counts)[counts > 0]


def unlike_training(share: float, low: float, high: float) -> str:
    """A sentence where a share of observed cells is less than half of that of any mask of training, or hides so.

    Empty where there is nothing to say, as to a network that was trained without observations. A file of the opposite
    meaning, 1 = hidden, is found out by this.

    Arguments:
        share: What is observed.
        low: The smallest share that a mask of training observes.
        high: The largest.
    """
    if high == 0 or (share >= low / 2 and 1 - share >= (1 - high) / 2):
        return ""
    return (
        f"the masks of training observe {low:.1%} to {high:.1%} of the cells: is the mask 1 where a cell is observed, "
        "and 0 where it is not?"
    )


def load_mask(path: str, shape: tuple[int, int], variable: str | None = None) -> Tensor:
    """The mask of a file (npy, npz, h5, nc, png), boolean `(H, W)`.

    What is not 0 (and not NaN) is observed; in a picture, what is brighter than mid grey. Rows come in the order of
    the array in the file; the first row of a picture is its top.

    Arguments:
        path: The file.
        shape: The `(H, W)` that the mask must have.
        variable: The array in an npz, h5 or nc file; by default the first of two dimensions.

    Raises:
        UserError: A file that is missing or cannot be read, no such array, or another size.
    """
    return _load(path, shape, variable, dimensions={2: "two"})[0]


def load_masks(path: str, shape: tuple[int, int], variable: str | None = None) -> Tensor:
    """The masks of a file as `load_mask` reads them, `(T, H, W)`: one for each time where that axis is first, else one.

    `variable` is by default the first of two dimensions, else the first of three.
    """
    return _load(path, shape, variable, dimensions={2: "two", 3: "three"})


def _load(path: str, shape: tuple[int, int], variable: str | None, dimensions: Mapping[int, str]) -> Tensor:
    """The masks `(T, H, W)` of an array of as many dimensions as are allowed, the first ones preferred."""
    arrays = _arrays(path)
    words = " or ".join(dimensions.values())
    fitting = [
        name
        for count in dimensions
        for name, array in arrays.items()
        if array.ndim == count and array.dtype.kind in "fiub"
    ]
    name = next(iter(fitting), None) if variable is None else variable
    if name not in fitting:
        shapes = {name: array.shape for name, array in arrays.items()}
        wanted = f"no array of {words} dimensions" if variable is None else f"no {words}-dimensional array '{variable}'"
        raise UserError(f"the mask '{path}' has {wanted}.{nearest(str(name), fitting)} It has: {shapes}")
    if arrays[name].shape[-2:] != shape:
        raise UserError(
            f"the mask '{path}' has shape {arrays[name].shape}, the field {shape}. "
            "Give a mask of the size of the field."
        )
    return torch.from_numpy(np.nan_to_num(arrays[name]) != 0).view(-1, *shape)


def _arrays(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file, without dimensions of length 1. Raises UserError."""
    file = Path(path).expanduser()
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"the mask '{path}' is of an unknown kind. Expected one of {', '.join(READERS)}")
    if not file.is_file():
        siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"no mask file '{path}'.{nearest(file.name, siblings)} Give an existing one: mask=FILE")
    try:
        return {name: np.squeeze(array) for name, array in reader(file).items()}
    except UNREADABLE as error:
        raise UserError(f"cannot read the mask '{path}': {error}") from error


def _npy(file: Path) -> dict[str, np.ndarray]:
    return {"": np.load(file, allow_pickle=False)}


def _stored(file: Path) -> dict[str, np.ndarray]:
    dataset = xr.decode_cf(open_dataset(file)[0], decode_times=False)
    return {str(name): array.values for name, array in dataset.data_vars.items() if array.dtype.kind in "fiub"}


def _png(file: Path) -> dict[str, np.ndarray]:
    with Image.open(file) as picture:
        return {"": np.asarray(picture.convert("L")) > 127}


#: What is raised for a file that is damaged, of another kind, or too large to be a mask.
UNREADABLE = (*DAMAGED, UserError, SyntaxError, tokenize.TokenError, Image.DecompressionBombError)
READERS = {".npy": _npy, ".npz": _stored, ".h5": _stored, ".hdf5": _stored, ".nc": _stored, ".png": _png}
