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
import glob
import io
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.locks import parts_of, reported
from vecfield_diffusion.inference.member_blocks import MemberBlocks
from vecfield_diffusion.inference.template import FileLayout, FilledTimes, Product, Template, Variable
from vecfield_diffusion.inference.work_items import Work

COMPRESSION = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
KEPT = " What is finished is kept: the same command goes on from there."
#: Writes the variables of a block of times.
Write = Callable[[FilledTimes, Iterable[Variable]], None]
#: The global attribute that holds the key of the command that made a file.
KEY = "vecfield_diffusion_key"


def member_paths(path: Path, members: int) -> list[Path]:
    """Returns the files of the members of an ensemble whose mean is in the file `path`."""
    return [path.with_name(f"{path.stem}_member_{number:03d}.nc") for number in range(members)]


def members_beside(path: Path) -> list[Path]:
    """Returns the files of members that lie beside the file `path` of their mean, in their order."""
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}_member_[0-9]*.nc"))


def check_claim(path: Path, key: str) -> None:
    """Raises UserError where a file, or the parts of one, were made by another command than that of `key`."""
    parts = sorted(parts_of(path).glob("*.npz"))
    ours = all(_positions(part, key) is not None for part in parts)
    if path.exists():
        ours = ours and key_of(path) == key
    if not ours:
        what = "the result" if path.exists() else "unfinished work"
        raise UserError(
            f"{path} is {what} of another command, checkpoint or input. Give another name=... to keep it, or "
            "overwrite=true"
        )


def key_of(path: Path) -> str | None:
    """Returns the key of the command that made a file; None where it has none or is no such file."""
    with contextlib.suppress(OSError, KeyError), h5netcdf.File(path, "r") as file:
        return str(file.attrs[KEY])
    return None


class FieldsWriter:
    """Writes an ensemble of filled fields, a block of times at a time.

    Arguments:
        path: The file to write; one that exists is replaced by `finish`. What it holds, see `template`.
        template: What is taken from the input.
        valid: The cells of the domain, boolean `(H, W)`.
        members: M.
        key: What the fields depend on, in short: a hash of configuration, checkpoint and input. Parts of an earlier
            run are taken over if they have the same key, else they are removed.
        products: What is written beside the members.
        split: Whether each member goes to a file of its own, see `member_paths`, in place of one variable for all.
        work: What the processes share that write it together.

    Raises:
        UserError: Parts of an earlier run cannot be removed.
        ValueError: Members below 1.
    """

    def __init__(
        self,
        path: str | Path,
        template: Template,
        valid: NDArray[np.bool_],
        members: int,
        key: str,
        *,
        products: Sequence[Product] = (),
        split: bool = False,
        work: Work | None = None,
    ) -> None:
        self.path = Path(path)
        self.layout = FileLayout(template, np.asarray(valid, dtype=bool), members, products, split)
        self.key, self.work = key, work or Work()
        self.folder = parts_of(self.path)
        self.members_of = MemberBlocks(self.path, self.folder / "blocks", key)
        self._open: tuple[Path, FilledTimes] | None = None
        with reported(self.path):
            self._parts = self._earlier()

    @classmethod
    def of(cls, path: Path, layout: FileLayout, key: str, work: Work | None = None) -> FieldsWriter:
        """Returns the writer of a layout."""
        options = {"products": layout.products, "split": layout.split}
        return cls(path, layout.template, layout.valid, layout.members, key, work=work, **options)

    def done(self) -> set[int]:
        """Returns the positions of the finished times, those of an interrupted run with the same key included.

        Those that other processes have finished in the meantime are found.
        """
        for part in sorted(set(self.folder.glob("*.npz")) - set(self._parts)):
            positions = _positions(part, self.key)
            self._parts |= {} if positions is None else {part: positions}
        return {position for positions in self._parts.values() for position in positions}

    def members(self, position: int) -> NDArray:
        """Returns the members `(M, 2, H, W)` of a finished time, until `finish`."""
        return _read_part(next(part for part, places in self._parts.items() if position in places)).at(position)

    def write(
        self, positions: Sequence[int], members: NDArray, observed: NDArray, truth: NDArray | None = None
    ) -> None:
        """Writes one block of times to a part of its own; see `FilledTimes`.

        Raises:
            UserError: The part cannot be written.
            ValueError: Arrays whose shapes do not belong together, or a position that is finished already.
        """
        block = FilledTimes(positions, members, observed, truth)
        block.check(self.layout.members, self.layout.valid.shape, self.done())
        places = [int(position) for position in block.positions]
        arrays = {"key": np.array(self.key), "positions": np.array(places, dtype=np.int64)}
        arrays |= {"members": np.asarray(block.members, dtype=np.float32), "observed": np.asarray(block.observed)}
        if block.truth is not None:
            arrays["truth"] = np.asarray(block.truth, dtype=np.float32)
        part = self.folder / f"{places[0]:08d}.npz"
        with reported(self.path, KEPT):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(part) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **arrays)
        self._parts[part] = places

    @property
    def blocks(self) -> Iterator[FilledTimes]:
        """The blocks that were written, one after the other, until `finish`."""
        for part in sorted(self._parts):
            yield _read_part(part)

    def at(self, position: int) -> FilledTimes:
        """Returns one of the times that were written, until `finish`; times in order read every part once."""
        part = next(part for part, positions in self._parts.items() if position in positions)
        if self._open is None or self._open[0] != part:
            self._open = part, _read_part(part)
        block = self._open[1]
        one = slice(place := list(block.positions).index(position), place + 1)
        truth = None if block.truth is None else block.truth[one]
        return FilledTimes([position], block.members[:, one], block.observed[one], truth)

    def finish(self) -> None:
        """Assembles the parts into the file and removes them. Raises what `assemble` raises."""
        self.assemble()
        self.clear()

    def clear(self) -> None:
        """Removes the parts."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def assemble(self) -> None:
        """Assembles the parts, one after the other, into the file.

        Raises:
            UserError: The file cannot be written.
            ValueError: A position that was not written.
        """
        length = self.layout.check_whole(self.done())
        with reported(self.path, KEPT), replacing(self.path) as temporary:
            with self._filling(temporary, self.layout.frame(), length) as write:
                for block in self.blocks:
                    write(block, self.layout.variables(block))
            if self.layout.split:
                self._split(length)

    def _earlier(self) -> dict[Path, list[int]]:
        """Returns the parts of an interrupted run with the same key and their positions; others are removed."""
        parts = {part: _positions(part, self.key) for part in sorted(self.folder.glob("*.npz"))}
        strange = [part for part, positions in parts.items() if positions is None]
        for part in strange:
            part.unlink(missing_ok=True)
        if strange:
            print(
                f"{self.path}: discarded {len(strange)} unfinished block(s) of an earlier run with another "
                "configuration, checkpoint or input"
            )
        return {part: positions for part, positions in parts.items() if positions is not None}

    def _split(self, length: int) -> None:
        """Streams the parts into the files of the members, all at once; those of an earlier, larger ensemble go."""
        paths = member_paths(self.path, self.layout.members)
        with contextlib.ExitStack() as files:
            writes = [
                files.enter_context(self._filling(files.enter_context(replacing(path)), frame, length))
                for path, frame in ((path, self.layout.member_frame(number)) for number, path in enumerate(paths))
            ]
            for block in self.blocks:
                for number, write in enumerate(writes):
                    write(block, self.layout.member_variables(block, number))
        for left in set(members_beside(self.path)) - set(paths):
            left.unlink()

    @contextlib.contextmanager
    def _filling(self, path: Path, frame: xr.Dataset, length: int) -> Iterator[Write]:
        """What writes variables of a block of times into the netCDF file at `path`, which has all the rest."""
        path.write_bytes(_compose(frame))
        sizes = dict(zip(self.layout.template.dims, (length, *self.layout.valid.shape), strict=True))
        with _forgiving(path) as stream, h5netcdf.File(stream, "r+") as file:
            for name, size in sizes.items():
                if name not in file.dimensions:
                    file.dimensions[name] = size

            def write(block: FilledTimes, variables: Iterable[Variable]) -> None:
                for variable in variables:
                    if variable.name not in file.variables:
                        self._create(file, variable)
                    target = file.variables[variable.name]
                    for index, position in enumerate(block.positions):
                        target[..., position, :, :] = variable.values[..., index, :, :]
                stream.check()

            yield write

    def _create(self, file: h5netcdf.File, variable: Variable) -> None:
        """Makes a variable in chunks of one time."""
        dims, kind = self.layout.dims(variable), variable.values.dtype
        chunks = (1,) * (len(dims) - 2) + self.layout.valid.shape
        fill = np.float32(np.nan) if kind.kind == "f" else None
        created = file.create_variable(variable.name, dims, kind, fillvalue=fill, chunks=chunks, **COMPRESSION)
        created.attrs.update(variable.attrs)


def _read_part(part: Path) -> FilledTimes:
    """Returns the block of a part."""
    with np.load(part) as arrays:
        return FilledTimes(arrays["positions"].tolist(), arrays["members"], arrays["observed"], arrays.get("truth"))


class _Stream(io.FileIO):
    """A file that remembers the first refusal to write and from then on only pretends, for the sake of HDF5."""

    refusal: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes all of `data`, or the refusal is remembered."""
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


def _positions(part: Path, key: str) -> list[int] | None:
    """Returns the positions of a part; None where it has another key or cannot be read."""
    with (
        contextlib.suppress(FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
        np.load(part) as block,
    ):
        if block["key"].item() == key:
            return block["positions"].tolist()
    return None


def _compose(frame: xr.Dataset) -> memoryview:
    """Returns the bytes of a small netCDF-4 file."""
    with warnings.catch_warnings():
        # Times that are no whole number of the input's units are stored as fractions, as in the input.
        warnings.filterwarnings("ignore", "Times can't be serialized faithfully")
        return frame.to_netcdf(engine="h5netcdf", format="NETCDF4")
