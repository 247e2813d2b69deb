"""Masks that a user gives: how their files are read, and whether training has seen masks like them."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import torch
import xarray as xr
from PIL import Image
from torch import Tensor

from vecfield_diffusion.data.draws import MaskFunction
from vecfield_diffusion.data.readers.hdf5 import check_file, open_file
from vecfield_diffusion.errors import UserError, nearest


def shares_of(mask: MaskFunction, valid: Tensor, masks: int = 256) -> tuple[float, float]:
    """The least and the largest share of the valid cells that a family of masks observes, in so many draws.

    Arguments:
        mask: The family.
        valid: The domain, boolean `(H, W)`.
        masks: The number of draws, always the same ones.
    """
    observed = mask(masks, valid, torch.Generator().manual_seed(0)).flatten(1)
    shares = observed.sum(1) / valid.sum()
    return shares.min().item(), shares.max().item()


def unlike_training(observed: Tensor, mask: MaskFunction, valid: Tensor) -> str:
    """A sentence where masks `(n, 1, H, W)` observe less than half of what any mask of training does, or hide so.

    Empty where there is nothing to say. A file of the opposite meaning, 1 = hidden, is found out by this.

    Arguments:
        observed: The masks, boolean.
        mask: The family that was trained on.
        valid: The domain, boolean `(H, W)`.
    """
    low, high = shares_of(mask, valid)
    shares = (observed & valid).flatten(1).sum(1) / valid.sum()
    least, most = shares.min().item(), shares.max().item()
    if least >= low / 2 and 1 - most >= (1 - high) / 2:
        return ""
    part = f"{least:.2%}" if most - least < 5e-5 else f"{least:.2%} to {most:.2%}"
    return (
        f"{part} of the valid cells are observed; masks of training observe {low:.2%} to {high:.2%}. In a mask, 1 is "
        "observed and 0 is hidden: is it the other way round?"
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
    file = Path(path).expanduser()
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"the mask '{path}' is of an unknown kind. Expected one of {', '.join(READERS)}")
    if not file.is_file():
        siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"no mask file '{path}'.{nearest(file.name, siblings)} Give an existing one: mask=FILE")
    try:
        arrays = {name: np.squeeze(array) for name, array in reader(file).items()}
    except UNREADABLE as error:
        raise UserError(f"cannot read the mask '{path}': {error}") from error
    flat = {name: array for name, array in arrays.items() if array.ndim == 2 and array.dtype.kind in "fiub"}
    name = next(iter(flat), None) if variable is None else variable
    if name not in flat:
        shapes = {name: array.shape for name, array in arrays.items()}
        wanted = "no array of two dimensions" if variable is None else f"no two-dimensional array '{variable}'"
        raise UserError(f"the mask '{path}' has {wanted}.{nearest(str(name), flat)} It has: {shapes}")
    if flat[name].shape != shape:
        raise UserError(
            f"the mask '{path}' has shape {flat[name].shape}, the field {shape}. Give a mask of the size of the field."
        )
    return torch.from_numpy(np.nan_to_num(flat[name]) != 0)


def _npy(file: Path) -> dict[str, np.ndarray]:
    return {"": np.load(file, allow_pickle=False)}


def _npz(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as archive:
        return dict(archive)


def _hdf5(file: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiub":
            arrays[name] = item[()]

    with open_file(check_file(file)) as stream:
        stream.visititems(note)
    return arrays


def _netcdf(file: Path) -> dict[str, np.ndarray]:
    open_file(check_file(file)).close()
    with xr.open_dataset(file, engine="h5netcdf", decode_times=False, phony_dims="access") as dataset:
        return {str(name): variable.values for name, variable in dataset.data_vars.items()}


def _png(file: Path) -> dict[str, np.ndarray]:
    with Image.open(file) as picture:
        return {"": np.asarray(picture.convert("L")) > 127}


#: What the readers raise for a file that is damaged, of another kind, or too large to be a mask.
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    LookupError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
)
READERS = {".npy": _npy, ".npz": _npz, ".h5": _hdf5, ".hdf5": _hdf5, ".nc": _netcdf, ".png": _png}
