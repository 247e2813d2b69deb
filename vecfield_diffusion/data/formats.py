"""Any file or folder of velocities: what it is by its first bytes and contents, and how its files belong together.

    netCDF-3, netCDF-4       dimensions with names                                        `netcdf.find_named`
    native file, plain HDF5  known by their sizes                                         `hdf5.find_arrays`
    npz                      likewise
    MATLAB                   likewise; stored column by column, so that (y, x, t) is (t, x, y) here
    The Well                 t1_fields/velocity (run, time, x, y, 2)   (Ohana et al. 2024, arXiv 2412.00568)
    PDEBench                 Vx, Vy (run, time, x, y)                  (Takamoto et al. 2022, arXiv 2210.07182)

The files of a folder are joined along time; two sets that hold one component each are merged.
"""

from __future__ import annotations

import glob
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import scipy.io

from vecfield_diffusion.data.arrays import (
    Arrays,
    Entry,
    Joined,
    Load,
    Options,
    Stacked,
    View,
    choose_pair,
    plain,
    reading,
)
from vecfield_diffusion.data.fields import Axis, Fields, Found, Land
from vecfield_diffusion.data.hdf5 import Contents, check_path, find_arrays, hdf5_contents
from vecfield_diffusion.data.netcdf import UNREADABLE, classic_contents, find_named, is_classic
from vecfield_diffusion.errors import UserError

Boundary = Literal["periodic", "wall", "open"]
Finder = Callable[[Contents, Options], Found]
SUFFIXES = (".nc", ".nc4", ".cdf", ".h5", ".hdf5", ".hdf", ".npz", ".mat")
READABLE = "netCDF, HDF5 (native, plain, The Well, PDEBench), npz, MATLAB"


def open_fields(
    path: str,
    velocity: str | None = None,
    u: str | None = None,
    v: str | None = None,
    valid: str | None = None,
    invalid: str | None = None,
    level: int | None = None,
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
) -> Fields:
    """The snapshots of a file of any known format, of a folder, or of files that match a pattern.

    Arguments:
        path: A file, a folder or a pattern such as `data/*.nc`; several files are joined along time.
        velocity: The array of both components; by default found by its name.
        u: The array of the component along x; by default found by standard name or usual names.
        v: The array of the component along y.
        valid: A mask `(H, W)` or `(N, H, W)`, 1 = wet.
        invalid: A mask, 1 = solid.
        level: The index along a depth or height of several levels.
        x: The coordinate of the columns; by default found by its name.
        y: The coordinate of the rows.
        time: The time of the snapshots.
        dx: The spacing of the columns in metres; by default from the coordinates, else 1.
        dy: The spacing of the rows in metres, likewise.
        boundary_x: By default as the file says, else open; a longitude that closes the circle is periodic.
        boundary_y: By default as the file says, else open.
        preload_gb: Sets with less data than this many gigabytes are read into memory.
        land: Whether cells that are exactly 0 in both components at all times are land: `zero`, `nan` (only NaN is),
            `auto` (only NaN is, and a note says how many are 0).
        context: Further variables that the network is told.
        history: Earlier snapshots that the network is told, as lags.

    Raises:
        UserError: A file that cannot be read or understood, or files that do not belong together.
        ValueError: A negative `preload_gb`, or a boundary or `land` of another name.
    """
    found = find_all(files_of(path), Options(velocity, u, v, valid, invalid, x, y, time, level))
    spacing = {"dx": dx, "dy": dy, "boundary_x": boundary_x, "boundary_y": boundary_y}
    return found.to_fields(str(path), land, preload_gb, context, history, **spacing)


def files_of(path: str) -> list[Path]:
    """The files of a folder, those that match a pattern, or the one that `path` names.

    Raises:
        UserError: There is none.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(each for each in place.iterdir() if each.suffix.lower() in SUFFIXES and each.name[0] != ".")
        if not files:
            raise UserError(f"the folder '{path}' holds no file with one of the endings {', '.join(SUFFIXES)}.")
        return files
    if not place.exists() and glob.has_magic(str(place)):
        files = sorted(map(Path, glob.glob(str(place), recursive=True)))
        if not files:
            raise UserError(f"no file matches the pattern '{path}': dataset.path=...")
        return files
    return [place]


# One file.


def look(path: Path) -> tuple[Contents, Finder]:
    """What a file holds, and the function that understands it.

    Raises:
        UserError: A file that cannot be read, or of an unknown format.
    """
    file = check_path(path)
    if is_classic(file):
        return classic_contents(file), find_named
    with file.open("rb") as stream:
        magic = stream.read(32)
    if magic.startswith(b"PK\x03\x04"):
        return _whole(file, load_npz, "npz", turned=False), find_arrays
    if magic.startswith(b"MATLAB 5.0"):
        return _whole(file, load_matlab, "MATLAB", turned=True), find_arrays
    if not h5py.is_hdf5(file):
        raise UserError(
            f"'{path}' is no file that can be read here: it begins with {magic[:8]!r}. Expected {READABLE}."
        )
    contents = hdf5_contents(file)
    if magic.startswith(b"MATLAB 7.3") or any("MATLAB_class" in each.attrs for each in contents.entries.values()):
        return replace(contents, kind="MATLAB", turned=True), find_arrays
    if any(name.startswith("t1_fields/") for name in contents.entries):
        return replace(contents, kind="The Well"), find_well
    if {"Vx", "Vy", "x-coordinate", "y-coordinate"} <= set(contents.entries):
        return replace(contents, kind="PDEBench"), find_pdebench
    if not contents.native and any(len(entry.shape) > 1 and entry.dims for entry in contents.entries.values()):
        return replace(contents, kind="netCDF-4"), find_named
    return contents, find_arrays


def _whole(path: Path, load: Load, kind: str, turned: bool) -> Contents:
    """A file that is read as a whole."""
    arrays = Arrays(path, load, most=2)
    entries = {name: Entry(each.shape, each.dtype, {}, (), each.shape, True) for name, each in arrays.all().items()}
    return Contents(str(path), kind, arrays, entries, {}, turned=turned)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of numbers and dates of an npz file.

    Raises:
        UserError: It is damaged, or not an archive of arrays.
    """
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                try:
                    arrays[name] = archive[name]
                except ValueError:  # an array of objects, which would run code
                    continue
    except (*UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"'{path}' is a damaged npz file, or another archive: {error}. Expected {READABLE}.") from error
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}


def load_matlab(path: Path) -> dict[str, np.ndarray]:
    """The arrays of numbers of a MATLAB file (version 5 to 7), with their dimensions reversed as in version 7.3.

    Raises:
        UserError: The file is damaged.
    """
    try:
        variables = scipy.io.loadmat(path)
    except (*UNREADABLE, zlib.error) as error:
        raise UserError(f"'{path}' is a damaged MATLAB file: {error}. Copy or download it again.") from error
    return {
        name: each.T for name, each in variables.items() if isinstance(each, np.ndarray) and each.dtype.kind in "fiub"
    }


def find_well(file: Contents, options: Options) -> Found:
    """What a file of The Well holds: several runs, x before y, component 0 along x.

    Raises:
        UserError: It is not of two Cartesian dimensions.
    """
    dims = [str(plain(dim)) for dim in np.ravel(file.groups.get("dimensions", {}).get("spatial_dims", ["x", "y"]))]
    if dims != ["x", "y"]:
        raise UserError(f"{file.source}: its dimensions are {', '.join(dims)}. Expected x, y: a Cartesian plane.")
    name = file.find("velocity", options.velocity or "t1_fields/velocity")
    runs, times, width, height = file.entries[name].shape[:4]
    views = {}
    for each, entry in file.entries.items():
        axes = _well_axes(each, entry)
        fits = len(axes) == len(entry.shape) and entry.numeric and not each.startswith("dimensions/")
        if (
            fits
            and dict(zip(axes, entry.shape, strict=True)).items()
            <= {"run": runs, "time": times, "x": width, "y": height, "channel": 2}.items()
        ):
            views[each] = View.of(each, entry, axes, times)
    if name not in views:
        raise UserError(f"{file.source}: '{name}' has shape {file.entries[name].shape}, expected (run, time, x, y, 2).")
    return _found_runs(file, options, (name,), views, "dimensions/{}", {"spacing": _well_boundaries(file)})


def _well_axes(name: str, entry: Entry) -> list[str]:
    """The dimensions of an array, as its attributes say."""
    varying = [
        key for key, attr in (("run", "sample_varying"), ("time", "time_varying")) if entry.attrs.get(attr, True)
    ]
    if name.startswith("scalars/"):
        return varying
    along = np.ravel(entry.attrs.get("dim_varying", [True, True])).astype(bool)
    varying += [dim for dim, varies in zip(("x", "y"), along, strict=False) if varies]
    return varying + ["channel"] * name.startswith("t1_fields/")


def _well_boundaries(file: Contents) -> dict[str, str]:
    """The boundary of each axis: periodic, wall if all that is said of it is a wall, else open."""
    kinds: dict[str, set[str]] = {"x": set(), "y": set()}
    for name, attrs in file.groups.items():
        if name.startswith("boundary_conditions/"):
            for dim in map(plain, np.ravel(attrs.get("associated_dims", []))):
                kinds.setdefault(dim, set()).add(str(plain(attrs.get("bc_type", "open"))).lower())
    named = {f"boundary_{dim}": kinds[dim] for dim in ("x", "y") if kinds[dim]}
    return {
        name: "periodic" if "periodic" in found else "wall" if found == {"wall"} else "open"
        for name, found in named.items()
    }


def find_pdebench(file: Contents, options: Options) -> Found:
    """What a file of PDEBench holds: several runs, x before y.

    Raises:
        UserError: It is not of two dimensions.
    """
    shape = file.entries["Vx"].shape
    if len(shape) != 4:
        raise UserError(f"{file.source}: 'Vx' has shape {shape}. Expected (run, time, x, y): a plane.")
    axes = ("run", "time", "x", "y")
    same = {name: entry for name, entry in file.entries.items() if entry.shape == shape and entry.numeric}
    views = {name: View.of(name, entry, axes, shape[1]) for name, entry in same.items()}
    return _found_runs(file, options, ("Vx", "Vy"), views, "{}-coordinate", {})


def _found_runs(
    file: Contents,
    options: Options,
    components: tuple[str, ...],
    views: Mapping[str, View],
    coordinate: str,
    more: dict[str, Any],
) -> Found:
    """Runs one after the other; `coordinate` makes the name of the array of x, y and time (or t)."""
    runs, times, width, height = file.entries[components[0]].shape[:4]
    sizes = {"x": width, "y": height, "time": times}
    axes = {}
    for role, size in sizes.items():
        name = next((name for name in map(coordinate.format, (role, role[0])) if name in file.entries), None)
        values = None if name is None else np.asarray(file.arrays[name][()])
        # PDEBench gives the edges of the time steps: one more than there are snapshots.
        fits = values is not None and values.shape[-1] >= size
        axes[role] = Axis(role, values[..., :size].astype(np.float64)) if fits else Axis(role)
    if (line := axes["time"].values) is not None:
        axes["time"] = Axis("time", np.broadcast_to(line, (runs, times)).ravel())
    more |= {"runs": np.repeat(np.arange(runs), times) if runs > 1 else None, "notes": file.offers(options, views)}
    return file.found(components, views, file.masks(options, views), runs * times, (height, width), axes, **more)


# Several files.


def find_all(paths: Sequence[Path], options: Options) -> Found:
    """What the files hold together.

    Raises:
        UserError: One cannot be read or understood, or they do not belong together.
    """
    files = [look(path) for path in paths]
    halves = _halves([contents for contents, _ in files], options) if len(files) > 1 else None
    if halves is None:
        return joined([_understood(contents, finder, options) for contents, finder in files])
    parts = []
    for name in halves:
        holding = [(contents, finder) for contents, finder in files if name in contents.entries]
        only = replace(options, only=name)
        parts.append(joined([_understood(contents, finder, only) for contents, finder in holding]))
    return merged(*parts)


def _understood(contents: Contents, finder: Finder, options: Options) -> Found:
    with reading(contents.source):
        return finder(contents, options)


def _halves(files: Sequence[Contents], options: Options) -> tuple[str, str] | None:
    """The two components, where no file has both."""
    together = {name: entry for contents in files for name, entry in contents.entries.items()}
    try:
        pair, _ = choose_pair(together, options, files[0].source)
    except UserError:
        return None
    have = [tuple(name in contents.entries for name in pair) for contents in files]
    return pair if (True, True) not in have and {(True, False), (False, True)} <= set(have) else None


def joined(parts: Sequence[Found]) -> Found:
    """Files one after the other, in the order of their times.

    Raises:
        UserError: Two files are on different grids or in different units.
    """
    if len(parts) == 1:
        return parts[0]
    times = [part.axes["time"].values for part in parts]
    if all(time is not None and len(time) for time in times) and len({time.dtype.kind for time in times}) == 1:
        parts = [parts[place] for place in sorted(range(len(parts)), key=lambda place: times[place][0])]
        times = [part.axes["time"].values for part in parts]
    else:
        times = None
    first, lengths = parts[0], [part.length for part in parts]
    for part in parts[1:]:
        _check_alike(first, part)
    time = first.axes["time"] if times is None else replace(first.axes["time"], values=np.concatenate(times))
    common = [name for name in first.variables if all(name in part.variables for part in parts)]
    return replace(
        first,
        reader=Joined([part.reader for part in parts], lengths),
        length=sum(lengths),
        axes=first.axes | {"time": replace(time, values=None) if times is None else time},
        notes=first.notes + _overlaps(parts, times),
        layout=f"{len(parts)} files of {first.layout}",
        variables={name: Joined([part.variables[name] for part in parts], lengths) for name in common},
        groups=_numbered(parts, "groups"),
        runs=_numbered(parts, "runs"),
    )


def _numbered(parts: Sequence[Found], name: str) -> np.ndarray | None:
    """The numbers that `groups` or `runs` give to snapshots, one file after the other; None where no file has any."""
    if all(getattr(part, name) is None for part in parts):
        return None
    numbers, start = [], 0
    for part in parts:
        own = getattr(part, name)
        lone = np.arange(part.length) if name == "groups" else np.zeros(part.length, dtype=int)
        numbers.append((lone if own is None else own) + start)
        start = numbers[-1].max(initial=start - 1) + 1
    return np.concatenate(numbers)


def _overlaps(parts: Sequence[Found], times: Sequence[np.ndarray] | None) -> tuple[str, ...]:
    """What there is to say of files whose times do not follow each other."""
    if times is None:
        return ("not all files have times of one kind: joined in the order of their names",)
    pairs = [(parts[k], parts[k + 1]) for k in range(len(parts) - 1) if times[k + 1][0] <= times[k][-1]]
    if not pairs or parts[0].runs is not None:
        return ()
    before, after = pairs[0]
    return (f"the times of {len(pairs)} files overlap, such as {before.source} and {after.source}",)


def merged(first: Found, second: Found) -> Found:
    """Two sets that hold one component each, at the same times.

    Raises:
        UserError: Their times, grids or units differ.
    """
    times = [part.axes["time"].values for part in (first, second)]
    same = [time is None for time in times] in ([True, True], [False, False]) and first.length == second.length
    if not same or (times[0] is not None and not np.array_equal(*times)):
        raise UserError(
            f"{first.source} and {second.source} hold one component each ({first.names[0]}, {second.names[0]}), but at "
            f"different times ({first.length} and {second.length}). Give files of the same times."
        )
    _check_alike(first, second, both=False)
    groups = [part.groups for part in (first, second) if part.groups is not None]
    return replace(
        first,
        reader=Stacked([first.reader, second.reader]),
        names=first.names + second.names,
        layout=f"{first.layout} and {second.layout}",
        component_attrs=(first.component_attrs[0], second.component_attrs[0]),
        variables={**second.variables, **first.variables},
        groups=groups[0] if groups else None,
    )


def _check_alike(first: Found, second: Found, both: bool = True) -> None:
    """Raises UserError where two files do not have one grid, one name for each component and one unit."""
    facts = {"cells": lambda part: part.shape, "units": lambda part: part.units}
    if both:
        facts["components"] = lambda part: part.names
    for what, fact in facts.items():
        if fact(first) != fact(second):
            raise UserError(_differ(first, second, what, fact(first), fact(second)))
    for role in ("x", "y"):
        here, there = (part.axes[role].values for part in (first, second))
        if (here is None) != (there is None) or (here is not None and not np.allclose(here, there, rtol=1e-6)):
            ends = [None if line is None else f"{line[0]:g} to {line[-1]:g}" for line in (here, there)]
            raise UserError(_differ(first, second, f"{role}", *ends))
    if (first.mask is None) != (second.mask is None) or not np.array_equal(first.mask, second.mask):
        raise UserError(_differ(first, second, "masks", "one", "another"))


def _differ(first: Found, second: Found, what: str, here: object, there: object) -> str:
    return (
        f"{first.source} and {second.source} cannot be joined: {what} {here} in the one, {there} in the other. Give "
        "files on one grid and in one unit: dataset.path=..."
    )
