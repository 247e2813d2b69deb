"""One door for data: a path, a pattern, a folder or an `xr.Dataset` in, `Fields` out.

    reader.py, npz.py, ...   one file a format, each a function to an `xr.Dataset`
    sizes.py, roles.py       what the variables and their dimensions are
    fields_of.py, joined.py  what is known of a data set, and several as one
    found.py                 the grid and the `Fields` that follow

A new format is a new module here with a `FORMAT`.
"""

from __future__ import annotations

import glob
import importlib
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import xarray as xr

from vecfield_diffusion.data.fields import Fields, Land
from vecfield_diffusion.data.readers.fields_of import understand
from vecfield_diffusion.data.readers.found import Found
from vecfield_diffusion.data.readers.joined import joined, merged
from vecfield_diffusion.data.readers.netcdf import read_url
from vecfield_diffusion.data.readers.quality import QUALITIES, Quality
from vecfield_diffusion.data.readers.reader import Boundary, Format, check_path
from vecfield_diffusion.data.readers.roles import Options, choose_pair
from vecfield_diffusion.data.readers.staggered import collocated
from vecfield_diffusion.data.readers.zarr import is_store, read
from vecfield_diffusion.data.stored import Stamp, reading, stamp
from vecfield_diffusion.data.words import components, option
from vecfield_diffusion.errors import UserError

_MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
FORMATS: list[Format] = sorted((m.FORMAT for m in _MODULES if "FORMAT" in vars(m)), key=lambda known: known.rank)
SUFFIXES = tuple(dict.fromkeys(suffix for known in FORMATS for suffix in known.suffixes))
URL = re.compile(r"[a-z0-9+]+://")


def open_fields(
    path: str | Path | xr.Dataset | tuple[xr.DataArray, xr.DataArray],
    *,
    velocity: str | None = None,
    u: str | None = None,
    v: str | None = None,
    valid: str | None = None,
    invalid: str | None = None,
    level: int | None = None,
    member: int | None = None,
    group: str | None = None,
    x: str | None = None,
    y: str | None = None,
    time: str | None = None,
    dx: float | None = None,
    dy: float | None = None,
    boundary_x: Boundary | None = None,
    boundary_y: Boundary | None = None,
    preload_gb: float = 2.0,
    land: Land = "auto",
    context: Sequence[str] = (),
    history: Sequence[int] = (),
    frames: int = 1,
    stride: int = 1,
    quality: Quality = "all",
) -> Fields:
    """The snapshots of a file of any known format, of a folder, of files that match a pattern, or of a data set.

    Arguments:
        path: A file, a folder or a pattern such as `data/*.nc` (several files are joined along time), the URL of a zarr
            store or an OPeNDAP server, an `xr.Dataset`, in memory or lazy, or two `xr.DataArray`, u and v.
        velocity: The array of both components; by default found by its name.
        u: The array of the component along x; by default found by standard name or usual names.
        v: The array of the component along y.
        valid: A mask `(H, W)` or `(N, H, W)`, 1 = wet.
        invalid: A mask, 1 = solid.
        level: The index along a depth or height of several levels.
        member: The index along the members of an ensemble.
        group: The group of the file that holds the arrays; by default the one that has any.
        x: The coordinate of the columns; by default found by its attributes or its name.
        y: The coordinate of the rows.
        time: The time of the snapshots.
        dx: The spacing of the columns in metres; by default from the coordinates, else 1.
        dy: The spacing of the rows in metres, likewise.
        boundary_x: By default as the file says, else open; a longitude that closes the circle is periodic.
        boundary_y: By default as the file says, else open.
        preload_gb: Sets with less data than this many gigabytes are read into memory.
        land: Whether cells that are exactly 0 in both components at all times are land: `zero`, `nan` (only NaN is),
            `auto` (only NaN is, and a note says how many are 0). With `gap` whatever is 0 in both is a gap.
        context: Further variables that the network is conditioned on.
        history: Earlier snapshots that the network is conditioned on, as lags.
        frames: The frames of a sequence, which is one sample; 1 for single snapshots.
        stride: The steps from one frame of a sequence to the next.
        quality: Which values count by the flags that the components name in `ancillary_variables`: `good` those that
            one calls so and none bad, `good_or_unknown` those that none calls bad, `all` whatever flags say.

    Raises:
        UserError: A file that cannot be read or understood, or files that do not belong together.
        ValueError: A negative `preload_gb`, a boundary or `land` of another name, or less than one frame or step.
    """
    if quality not in QUALITIES:
        raise ValueError(f"quality must be one of {', '.join(QUALITIES)}, got {quality!r}")
    options = Options(velocity, u, v, valid, invalid, x, y, time, level, member, quality=quality)
    if (u is None) != (v is None):
        raise UserError(f"name both components: {components()}, or one array: {option('velocity')}")
    name = "memory"
    if isinstance(path, xr.Dataset):
        found = understand(path, options, name)
    elif isinstance(path, tuple | list):
        found = _pair(*path, options)
    else:
        name = str(path)
        if u is not None and v is not None and group is None:
            group, options = _grouped(name, options)
        found = find_all(files_of(name), options, group)
    spacing = {"dx": dx, "dy": dy, "boundary_x": boundary_x, "boundary_y": boundary_y}
    samples = {"context": context, "history": history, "frames": frames, "stride": stride}
    return collocated(found, name).to_fields(name, land=land, preload_gb=preload_gb, spacing=spacing, **samples)


def _pair(u: xr.DataArray, v: xr.DataArray, options: Options) -> Found:
    """Two arrays, each with its own coordinates."""
    names = (str(u.name), str(v.name)) if None not in (u.name, v.name) and u.name != v.name else ("u", "v")
    parts = [array.to_dataset(name=name) for name, array in zip(names, (u, v), strict=True)]
    return merged(*(understand(p, replace(options, only=name), name) for name, p in zip(names, parts, strict=True)))


def _grouped(path: str, options: Options) -> tuple[str | None, Options]:
    """The group of files whose dimensions have names that `group/u` and `group/v` lie in, and what is left to say."""
    (group, _, u), (other, _, v) = options.u.rpartition("/"), options.v.rpartition("/")
    if not group or group != other or URL.match(path):
        return None, options
    file = files_of(path)[0]
    named = file.is_file() and format_of(file).name == "netCDF"
    return (group, replace(options, u=u, v=v)) if named else (None, options)


def files_of(path: str | Path | xr.Dataset | Sequence[xr.DataArray]) -> list[Path]:
    """The files of a folder, those that match a pattern, the one that `path` names, or those behind data sets.

    Raises:
        UserError: There is none.
    """
    if not isinstance(path, str | Path):
        parts = [path] if isinstance(path, xr.Dataset) else path
        return [Path(file) for file in dict.fromkeys(part.encoding.get("source") for part in parts) if file]
    path = str(path)
    if URL.match(path):
        return [path]
    place = Path(path).expanduser()
    if place.is_dir() and not is_store(place):
        files = sorted(other for other in place.iterdir() if other.suffix.lower() in SUFFIXES and other.name[0] != ".")
        if not files:
            raise UserError(f"the folder '{path}' holds no file with one of the endings {', '.join(SUFFIXES)}.")
        return files
    if not place.exists() and glob.has_magic(str(place)):
        files = sorted(map(Path, glob.glob(str(place), recursive=True)))
        if not files:
            raise UserError(f"no file matches the pattern '{path}': {option('path')}")
        return files
    return [place]


def format_of(path: Path) -> Format:
    """The format of a file, by its first bytes and what it holds.

    Raises:
        UserError: A file that cannot be read, or of no known format.
    """
    file = path if path.is_dir() and is_store(path) else check_path(path)
    magic = b""
    if file.is_file():
        with file.open("rb") as stream:
            magic = stream.read(32)
    with reading(path):
        found = next((known for known in FORMATS if known.knows(file, magic)), None)
    if found is None:
        names = ", ".join(known.name for known in FORMATS)
        raise UserError(f"'{path}' is no file that can be read here: {option('path')} Expected {names}.")
    return found


def open_dataset(path: str | Path, group: str | None = None) -> tuple[xr.Dataset, dict[str, Stamp]]:
    """A file as its reader gives it, not decoded and lazy where the format allows, and its state."""
    if URL.match(str(path)):
        return (read if ".zarr" in str(path) else read_url)(str(path), group), {}
    file = Path(path).expanduser()
    known = format_of(file)
    with reading(file):
        return known.read(file, group), {str(file): stamp(file)} if file.is_file() else {}


# Several files.


def find_all(paths: Sequence[Path], options: Options, group: str | None = None) -> Found:
    """What the files hold together.

    Raises:
        UserError: One cannot be read or understood, or they do not belong together.
    """
    files = [(str(path), *open_dataset(path, group)) for path in paths]

    def together(own: Options, holding: str | None = None) -> Found:
        parts = []
        for source, dataset, stamps in files:
            if holding is None or holding in dataset.variables:
                with reading(source):
                    parts.append(understand(dataset, own, source, stamps))
        return joined(parts)

    halves = _halves([dataset for _, dataset, _ in files], options, files[0][0]) if len(files) > 1 else None
    if halves is None:
        return together(options)
    return merged(*(together(replace(options, only=name), name) for name in halves))


def _halves(datasets: Sequence[xr.Dataset], options: Options, source: str) -> tuple[str, str] | None:
    """The two components, where no file has both."""
    together = {name: item for dataset in datasets for name, item in dataset.variables.items()}
    try:
        pair, _ = choose_pair(together, options, source)
    except UserError:
        return None
    have = [tuple(name in dataset.variables for name in pair) for dataset in datasets]
    return pair if (True, True) not in have and {(True, False), (False, True)} <= set(have) else None
