"""What a reader of a format is: a function from a path to an `xr.Dataset` that is neither decoded nor in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from vecfield_diffusion.data.words import option
from vecfield_diffusion.errors import UserError, nearest
from vecfield_diffusion.memory import available

Boundary = Literal["periodic", "wall", "open"]
#: What the libraries raise for a file that is damaged.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, EOFError, RuntimeError, AssertionError, MemoryError)


@dataclass(frozen=True)
class Format:
    """A format of files. A module of this folder that has one as `FORMAT` is found by itself.

    Arguments:
        name: What it is called.
        suffixes: The endings by which a folder is searched.
        knows: Whether a file is of it, from its path and its first bytes.
        read: `(path, group) -> data set`, lazy where the format allows. Dimensions without a name are called
            `<variable>#<axis>`; `ds.encoding` says `kind` and, where x comes before y, `turned`.
        rank: Formats of a lower rank are asked first.
    """

    name: str
    suffixes: tuple[str, ...]
    knows: Callable[[Path, bytes], bool]
    read: Callable[[Path, str | None], xr.Dataset]
    rank: int = 5


def check_path(path: str | Path) -> Path:
    """The path of an existing file that can be read.

    Raises:
        UserError: No such file, a folder, or a file that cannot be read.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"'{path}' is a folder. Expected a file: {option('path')}")
    if not file.exists():
        siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"no file '{path}'.{nearest(file.name, siblings)} Give an existing one: {option('path')}")
    try:
        file.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}. Check its permissions.") from error
    return file


def check_size(source: str | Path, size: float, what: str) -> None:
    """Raises UserError where `size` bytes are more than the memory that is free, before any of it is taken."""
    free = available()
    if free is not None and size > free:
        raise UserError(
            f"'{source}': {what} needs {size / 1e9:.3g} GB, of {free / 1e9:.3g} GB of free memory. Cut it into smaller "
            "files, or write it as netCDF or HDF5, which are read piece by piece."
        )


def unnamed(arrays: Mapping[str, np.ndarray], kind: str, turned: bool = False) -> xr.Dataset:
    """A data set of arrays whose dimensions have no names."""
    data = {name: ([f"{name}#{axis}" for axis in range(array.ndim)], array) for name, array in arrays.items()}
    dataset = xr.Dataset({name: xr.Variable(*variable) for name, variable in data.items()})
    dataset.encoding = {"kind": kind, "turned": turned}
    return dataset


def rebuilt(dataset: xr.Dataset, variables: Mapping[str, xr.Variable]) -> xr.Dataset:
    """The data set with other variables, of the same file."""
    result = xr.Dataset(variables, attrs=dataset.attrs)
    result.encoding = dataset.encoding
    result.set_close(dataset.close)
    return result


def plain(value: Any) -> Any:  # noqa: ANN401
    """An attribute as text, a number or an array of numbers."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        return str(value) if array.ndim == 0 else ", ".join(str(plain(item)) for item in array.ravel())
    return array.item() if array.size == 1 else array
