"""zarr: a folder, or a URL where fsspec is installed."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from vecfield_diffusion.data.readers.reader import UNREADABLE, Format
from vecfield_diffusion.data.words import option
from vecfield_diffusion.errors import UserError


def is_store(path: Path) -> bool:
    """Whether a folder is a zarr store."""
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zmetadata"))


def read(path: Path | str, group: str | None = None) -> xr.Dataset:
    """The store, lazy.

    Raises:
        UserError: The store is damaged, or has no such group.
    """
    try:
        dataset = xr.open_zarr(str(path), group=group, chunks=None, decode_cf=False)
    except (*UNREADABLE, ImportError) as error:
        where = "" if group is None else f" in the group '{group}' ({option('group')})"
        raise UserError(f"'{path}' cannot be read as zarr{where}: {error}") from error
    dataset.encoding["kind"] = "zarr"
    return dataset


FORMAT = Format("zarr", (".zarr",), lambda path, magic: path.is_dir() and is_store(path), read)
