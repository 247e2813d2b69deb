"""What is written to disk: the filled fields as CF netCDF-4, and small text files, both whole or not at all.

An ensemble is written in two steps, so that memory does not depend on the number of times and an interrupted run can
go on. Each block of times becomes one part in the folder `.parts` beside the target, as soon as it is sampled; in the
end `FieldsWriter.finish` streams the parts into one netCDF file of the kind that the input was: the mean has the names,
dimensions, coordinates and attributes of the input, so that what opened the input opens the output.

A full disk, a folder without permission or a kill leave the old file or the new one, and the parts. The HDF5 library
does not survive a disk that fills: it keeps handles open and can end the process when it tries to close them. It
therefore writes through a stream that remembers the first refusal and accepts everything after it.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from vecfield_diffusion.atomic import replacing, write_text_atomic  # noqa: F401 (others take it from here)
from vecfield_diffusion.errors import UserError

CONVENTIONS = {"Conventions": "CF-1.10"}
TITLE = {"title": "Velocity fields filled by vecfield_diffusion"}
COMPRESSION = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
WORDS = ("velocity along x", "velocity along y")
KINDS = {"_std": "ensemble standard deviation", "_members": "members of the ensemble", "_truth": "known values"}
#: Attributes that say how the input stored its numbers, or that name variables which the output lacks.
PACKING = {"scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned", "bounds", "climatology"}
#: The same of the components, whose numbers are new.
STORAGE = PACKING | {"valid_min", "valid_max", "valid_range", "actual_range"}
STORAGE |= {"coordinates", "ancillary_variables", "cell_measures"}
KEPT = " What is finished is kept: the same command goes on from there."
Coordinates = Mapping[str, tuple[NDArray | None, Mapping[str, Any]]]


@dataclass(frozen=True)
class Template:
    """What the output takes from the input.

    Arguments:
        names: The names of the components.
        dims: The names of the dimensions time, y and x.
        coordinates: Of these dimensions, for all times to be written: values (None where the source has none) and
            attributes. Units and calendar of `datetime64` values say how they are stored.
        units: The units of the velocity.
        component_attrs: The attributes of the two components: standard_name, long_name, grid_mapping...
        extra_coords: Coordinates that are no dimension, such as 2-D latitude and longitude or the grid mapping: their
            dimensions, values and attributes.
        attributes: Global attributes, those of the source and the provenance; None is left out.
    """

    names: tuple[str, str] = ("u", "v")
    dims: tuple[str, str, str] = ("time", "y", "x")
    coordinates: Coordinates = field(default_factory=dict)
    units: str = "m s-1"
    component_attrs: tuple[Mapping[str, Any], Mapping[str, Any]] = field(default_factory=lambda: ({}, {}))
    extra_coords: Mapping[str, tuple[tuple[str, ...], NDArray, Mapping[str, Any]]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


class FieldsWriter:
    """Writes an ensemble of filled fields, a block of times at a time.

    With components `u` and `v` the file holds their ensemble means `u`, `v` over (time, y, x), the unbiased standard
    deviations `u_std`, `v_std` (NaN for one member), `u_members`, `v_members` with `member` in front, `u_truth`,
    `v_truth` where known, and the flags `observed` and `valid`. Cells that are not valid are NaN. Only the means bear
    the standard names, so that a reader that goes by them finds one pair.

    Arguments:
        path: The file to write; one that exists is replaced by `finish`.
        template: What is taken from the input.
        valid: The cells of the domain, boolean `(H, W)`.
        members: M.
        key: What the fields depend on, in short: a hash of configuration, checkpoint and input. Parts of an earlier
            run are taken over if they have the same key, else they are removed.

    Raises:
        UserError: Parts of an earlier run cannot be removed.
        ValueError: Members below 1, components of one name, or coordinates that are not those of the dimensions.
    """

    def __init__(self, path: str | Path, template: Template, valid: NDArray[np.bool_], members: int, key: str) -> None:
        if members < 1:
            raise ValueError(f"members must be >= 1, got {members}")
        if template.names[0] == template.names[1]:
            raise ValueError(f"names must differ, got {template.names}")
        strange = set(template.coordinates) - set(template.dims)
        if strange:
            raise ValueError(f"coordinates must be of the dimensions {template.dims}, got {', '.join(sorted(strange))}")
        self.path = Path(path)
        self.template = template
        self.valid = np.asarray(valid, dtype=bool)
        self.members = members
        self.key = key
        self.folder = self.path.parent / ".parts" / self.path.name
        with _reported(self.path):
            self._parts = self._earlier()

    def done(self) -> set[int]:
        """The positions of the times that are finished, those of an interrupted run with the same key included."""
        return {position for positions in self._parts.values() for position in positions}

    def write(
        self,
        positions: Sequence[int],
        members: NDArray[np.floating],
        observed: NDArray[np.bool_],
        truth: NDArray[np.floating] | None = None,
    ) -> None:
        """Write one block of T times to a part of its own.

        Arguments:
            positions: The places of its times in the output, `(T,)`, none of them finished before.
            members: The fields in the units of the template, `(M, T, 2, H, W)`.
            observed: The measured cells, `(T, H, W)`, `(T, 1, H, W)` or, for each component, `(T, 2, H, W)`.
            truth: The known fields `(T, 2, H, W)`, NaN where unknown.

        Raises:
            UserError: The part cannot be written.
            ValueError: Arrays whose shapes do not belong together, or a position that is finished already.
        """
        places = [int(position) for position in positions]
        self._check(places, members, observed, truth)
        block = {"key": np.array(self.key), "positions": np.array(places, dtype=np.int64)}
        block |= {"members": np.asarray(members, dtype=np.float32), "observed": _flags(observed, self.valid)}
        if truth is not None:
            block["truth"] = np.asarray(truth, dtype=np.float32)
        part = self.folder / f"{places[0]:08d}.npz"
        with _reported(self.path, KEPT):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(part) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **block)
        self._parts[part] = places

    def finish(self) -> None:
        """Assemble the parts, one after the other, into the file, and remove them.

        Raises:
            UserError: The file cannot be written.
            ValueError: A position that was not written.
        """
        length = self._length()
        missing = sorted(set(range(length)) ^ self.done())
        if missing or not length:
            raise ValueError(f"positions must be 0 to {length - 1}, missing or beyond: {missing}")
        with _reported(self.path, KEPT), replacing(self.path) as temporary:
            temporary.write_bytes(_compose(self._frame()))
            self._fill(temporary, length)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def _earlier(self) -> dict[Path, list[int]]:
        """The parts of an interrupted run with the same key and their positions; others are removed."""
        parts = {part: _positions(part, self.key) for part in sorted(self.folder.glob("*.npz"))}
        strange = [part for part, positions in parts.items() if positions is None]
        for part in strange:
            part.unlink()
        if strange:
            print(
                f"{self.path}: discarded {len(strange)} unfinished block(s) of an earlier run with another "
                "configuration, checkpoint or input"
            )
        return {part: positions for part, positions in parts.items() if positions is not None}

    def _check(
        self,
        positions: list[int],
        members: NDArray[np.floating],
        observed: NDArray[np.bool_],
        truth: NDArray[np.floating] | None,
    ) -> None:
        times, cells = len(positions), self.valid.shape
        flags = [(times, *cells), (times, 1, *cells), (times, 2, *cells)]
        if members.shape != (self.members, times, 2, *cells) or observed.shape not in flags:
            expected = f"members {(self.members, times, 2, *cells)} and observed {flags[1]}"
            raise ValueError(f"expected {expected}, got {members.shape} and {observed.shape}")
        if truth is not None and truth.shape != members.shape[1:]:
            raise ValueError(f"truth must be of shape {members.shape[1:]}, got {truth.shape}")
        if not positions or min(positions) < 0 or len(set(positions) - self.done()) < times:
            raise ValueError(f"positions must be >= 0, each written once, got {positions}")

    def _length(self) -> int:
        """The number of times."""
        time, _ = self.template.coordinates.get(self.template.dims[0], (None, {}))
        return len(self.done()) if time is None else len(time)

    def _frame(self) -> xr.Dataset:
        """All but what depends on time: coordinates, domain, global attributes."""
        template = self.template
        extras = {name: _variable(*extra) for name, extra in template.extra_coords.items()}
        labels = _flag_labels("cells of the domain", "outside", "inside") | self._references(0)
        valid = _variable(template.dims[1:], self.valid.astype(np.int8), labels)
        member = {"standard_name": "realization", "long_name": "member of the ensemble"}
        axes = {"member": (np.arange(self.members), member), **template.coordinates}
        coords = {name: _variable((name,), *axis) for name, axis in axes.items() if axis[0] is not None}
        given = {key: value for key, value in template.attributes.items() if value is not None}
        return xr.Dataset({**extras, "valid": valid}, coords, TITLE | given | CONVENTIONS)

    def _fill(self, path: Path, length: int) -> None:
        """Stream the parts into the netCDF file at `path`, which has all the rest."""
        sizes = dict(zip(self.template.dims, (length, *self.valid.shape), strict=True))
        with _forgiving(path) as stream, h5netcdf.File(stream, "r+") as file:
            for name, size in sizes.items():
                if name not in file.dimensions:
                    file.dimensions[name] = size
            meanings = ("hidden", "observed", *(f"only_{name}" for name in self.template.names))
            labels = _flag_labels("cells that were measured", *meanings)
            self._create(file, "observed", np.int8, labels | self._references(0))
            for part in sorted(self._parts):
                with np.load(part) as block:
                    self._put(file, dict(block))
                stream.check()

    def _put(self, file: h5netcdf.File, block: dict[str, NDArray]) -> None:
        """Write one part into the variables, which are made when they are first needed."""
        members = block["members"]
        mean = members.mean(axis=0, dtype=np.float64)
        std = np.full_like(mean, np.nan) if len(members) == 1 else members.std(axis=0, dtype=np.float64, ddof=1)
        fields = {"": mean, "_std": std, "_members": members, "_truth": block.get("truth")}
        for suffix, channel in product(fields, range(2)):
            if fields[suffix] is None:
                continue
            name = self.template.names[channel] + suffix
            if name not in file.variables:
                self._create(file, name, np.float32, self._describe(suffix, channel), suffix == "_members")
            values = np.where(self.valid, fields[suffix][..., channel, :, :], np.float32(np.nan))
            for index, position in enumerate(block["positions"]):
                file.variables[name][..., position, :, :] = values[..., index, :, :]
        for flags, position in zip(block["observed"], block["positions"], strict=True):
            file.variables["observed"][position] = flags

    def _create(
        self, file: h5netcdf.File, name: str, kind: type[np.generic], labels: Mapping[str, Any], each: bool = False
    ) -> None:
        """A variable over (time, y, x), with `member` in front for `each`, in chunks of one time."""
        dims = ("member",) * each + self.template.dims
        chunks = (1,) * (len(dims) - 2) + self.valid.shape
        fill = np.float32(np.nan) if kind is np.float32 else None
        variable = file.create_variable(name, dims, kind, fillvalue=fill, chunks=chunks, **COMPRESSION)
        variable.attrs.update(labels)

    def _describe(self, suffix: str, channel: int) -> dict[str, Any]:
        """The attributes of one variable of the component `channel`."""
        attrs = {key: value for key, value in self.template.component_attrs[channel].items() if key not in STORAGE}
        title = attrs.setdefault("long_name", WORDS[channel])
        attrs |= {"units": self.template.units} | self._references(channel)
        if suffix == "":
            return attrs | {"cell_methods": f"{attrs.get('cell_methods', '')} member: mean".strip()}
        kept = {key: attrs[key] for key in ("units", "grid_mapping", "coordinates") if key in attrs}
        method = {"cell_methods": "member: standard_deviation"} if suffix == "_std" else {}
        return {"long_name": f"{title}, {KINDS[suffix]}", **kept, **method}

    def _references(self, channel: int) -> dict[str, str]:
        """The names of the grid mapping and of the coordinates that are no dimension, as every field has them."""
        attrs = self.template.component_attrs[channel]
        mapping = {"grid_mapping": attrs["grid_mapping"]} if "grid_mapping" in attrs else {}
        names = [name for name in self.template.extra_coords if name not in mapping.values()]
        return mapping | ({"coordinates": " ".join(names)} if names else {})


def read_members(path: str | Path, names: Sequence[str], positions: Sequence[int]) -> NDArray[np.float32]:
    """The members `(M, T, 2, H, W)` of a file that `FieldsWriter` wrote, at some of its times.

    Arguments:
        path: The file.
        names: The names of the components.
        positions: The times, `(T,)`, in any order.
    """
    with h5netcdf.File(path, "r") as file:
        variables = [file.variables[f"{name}_members"] for name in names]
        return np.stack([np.stack([each[:, position] for each in variables], axis=1) for position in positions], axis=1)


class _Stream(io.FileIO):
    """A file that remembers the first refusal to write and from then on only pretends, for the sake of HDF5."""

    refusal: OSError | None = None

    def write(self, data: Any) -> int:
        """All of `data`, or the refusal is remembered."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while self.refusal is None and len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.refusal = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """As `write`."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.refusal = self.refusal or error
            return self.tell() if size is None else size

    def check(self) -> None:
        """Raises the refusal, if there was one."""
        if self.refusal is not None:
            raise self.refusal


@contextlib.contextmanager
def _forgiving(path: Path) -> Iterator[_Stream]:
    """The stream of a file that exists; its refusal is raised in the end, in place of what HDF5 makes of it."""
    with _Stream(path, "r+b") as stream:
        try:
            yield stream
        finally:
            stream.check()


@contextlib.contextmanager
def _reported(path: Path, hint: str = "") -> Iterator[None]:
    """Reports what the system refuses in the block."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path.name} into {path.parent}: {error.strerror or error}. "
            f"Free some space or choose another folder with hydra.run.dir=...{hint}"
        ) from error


def _positions(part: Path, key: str) -> list[int] | None:
    """The positions of a part; None where it has another key or cannot be read."""
    with contextlib.suppress(ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(part) as block:
        if block["key"].item() == key:
            return block["positions"].tolist()
    return None


def _flags(observed: NDArray[np.bool_], valid: NDArray[np.bool_]) -> NDArray[np.int8]:
    """0 hidden, 1 observed, 2 and 3 the first or the second component alone, `(T, H, W)`."""
    first, second = np.moveaxis(observed.reshape(len(observed), -1, *valid.shape)[:, [0, -1]] & valid, 1, 0)
    return np.select([first & second, first, second], [1, 2, 3], 0).astype(np.int8)


def _flag_labels(long_name: str, *meanings: str) -> dict[str, Any]:
    values = np.arange(len(meanings), dtype=np.int8)
    return {"long_name": long_name, "flag_values": values, "flag_meanings": " ".join(meanings)}


def _compose(frame: xr.Dataset) -> memoryview:
    """The bytes of a small netCDF-4 file."""
    with warnings.catch_warnings():
        # Times that are no whole number of the input's units are stored as fractions, as in the input.
        warnings.filterwarnings("ignore", "Times can't be serialized faithfully")
        return frame.to_netcdf(engine="h5netcdf", format="NETCDF4")


def _variable(dims: tuple[str, ...], values: NDArray, attributes: Mapping[str, Any]) -> xr.Variable:
    """A variable that is written whole; units and calendar of dates belong to their encoding, not their attributes."""
    array = np.asarray(values)
    dates = np.issubdtype(array.dtype, np.datetime64)
    encoding = {key: attributes[key] for key in ("units", "calendar") if dates and key in attributes}
    labels = {key: value for key, value in attributes.items() if key not in PACKING | encoding.keys()}
    return xr.Variable(dims, array, labels, encoding | {"_FillValue": None})
