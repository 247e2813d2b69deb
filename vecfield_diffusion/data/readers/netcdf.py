"""netCDF-4 and netCDF-3, and OPeNDAP where xarray has an engine for it: dimensions with names."""

from __future__ import annotations

from pathlib import Path

import h5py
import xarray as xr

from vecfield_diffusion.data.readers.hdf5 import open_file, usual_units
from vecfield_diffusion.data.readers.reader import UNREADABLE, Format
from vecfield_diffusion.data.words import option
from vecfield_diffusion.errors import UserError


def read(path: Path, group: str | None = None) -> xr.Dataset:
    """A file, lazy. Without `group` it is the root, or the one group that has fields where the root has none.

    Raises:
        UserError: The file is damaged, has no such group, or fields in several.
    """
    with path.open("rb") as stream:
        magic = stream.read(4)
    return _classic(path, magic) if magic[:3] == b"CDF" else _modern(path, group)


def _classic(path: Path, magic: bytes) -> xr.Dataset:
    try:
        if magic[3:] not in (b"\x01", b"\x02"):
            raise ValueError("a variety of the format that is not known here")
        return _named(xr.open_dataset(path, engine="scipy", decode_cf=False, cache=False), "netCDF-3")
    except UNREADABLE as error:
        raise UserError(
            f"'{path}' is netCDF-3 that is damaged or cannot be read here: {error}. Download it again, or convert it: "
            "`nccopy -k nc4 in.nc out.nc`"
        ) from error


def _modern(path: Path, group: str | None) -> xr.Dataset:
    open_file(path).close()
    try:
        tree = xr.open_datatree(path, engine="h5netcdf", decode_cf=False, phony_dims="access")
    except UNREADABLE as error:
        raise UserError(f"'{path}' is damaged: {error}. Copy or download it again.") from error
    groups = {node.path.strip("/"): node.to_dataset(inherit=True) for node in tree.subtree}
    if group is None:
        full = [name for name, dataset in groups.items() if any(item.ndim > 1 for item in dataset.data_vars.values())]
        if len(full) > 1 and full[0]:
            options = " | ".join(option("group", name) for name in full)
            raise UserError(f"{path}: fields lie in {len(full)} groups. Choose one: {options}")
        group = full[0] if full else ""
    if group.strip("/") not in groups:
        raise UserError(
            f"{path} has no group '{group}' ({option('group')}). It has: {', '.join(filter(None, groups))}."
        )
    dataset = groups[group.strip("/")]
    dataset.set_close(tree.close)
    return _named(dataset, "netCDF-4")


def _named(dataset: xr.Dataset, kind: str) -> xr.Dataset:
    """The data set with units under their usual name."""
    for variable in dataset.variables.values():
        variable.attrs = usual_units(variable.attrs)
    dataset.encoding["kind"] = kind
    return dataset


def read_url(url: str, group: str | None = None) -> xr.Dataset:
    """A data set of an OPeNDAP server, lazy.

    Raises:
        UserError: No engine for it is installed, or the server does not answer.
    """
    try:
        return _named(xr.open_dataset(url, group=group, decode_cf=False, cache=False), "OPeNDAP")
    except (*UNREADABLE, ImportError) as error:
        raise UserError(
            f"'{url}' cannot be opened: {error}. OPeNDAP needs `pip install netCDF4` or pydap; else download the file."
        ) from error


def _knows(path: Path, magic: bytes) -> bool:
    if magic.startswith(b"CDF"):
        return True
    if not h5py.is_hdf5(path):
        return False
    with open_file(path) as file:
        found: list[bool] = []

        def look(_: str, item: h5py.Group | h5py.Dataset) -> bool | None:
            if isinstance(item, h5py.Dataset) and item.ndim > 1 and "DIMENSION_LIST" in item.attrs:
                found.append(all(len(scales) for scales in item.dims))
            return True if found else None

        file.visititems(look)
        return file.attrs.get("format") not in ("vecfield", b"vecfield") and any(found)


FORMAT = Format("netCDF", (".nc", ".nc4", ".cdf"), _knows, read, 3)
