"""How fast batches are made: `python benchmarks/data_path.py [overrides]`, `python benchmarks/data_path.py files`.

The first compares making a batch with the training step that uses it, in one process, in turns, so that a noisy machine
slows both; the median ratio counts. The second compares the ways in which a file can lie on the disk.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import xarray as xr

from vecfield_diffusion.commands import train as main
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.programs.train import prepare


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(overrides: list[str], rounds: int = 15) -> None:
    """Prints milliseconds per batch and per step, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(main.config("trainer.score_cases=0", *overrides), Path(folder))
        batch = run.batches(0).to(run.device)
        seconds(lambda: run.step(batch).item())
        pairs = [
            (seconds(lambda k=k: run.batches(k)), seconds(lambda: run.step(batch).item())) for k in range(1, rounds + 1)
        ]
    make, use = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
    ratio = statistics.median(step / made for made, step in pairs)
    print(
        f"a batch of {run.trainer.batch_size}: made in {make:.1f} ms, used in {use:.1f} ms, {ratio:.1f} times as fast"
    )


def write_files(folder: Path, count: int, size: int) -> dict[str, tuple[str, float]]:
    """The same smooth fields in several files: by what they are, their path and the limit of preloading."""
    noise = np.random.default_rng(0).standard_normal((count, 2, size, size))
    k = np.fft.fftfreq(size) * size
    damping = 1.0 / (1.0 + k[:, None] ** 2 + k[None] ** 2)
    velocity = np.fft.ifft2(np.fft.fft2(noise) * damping).real.astype(np.float32)
    velocity /= velocity.std()
    write_hdf5(folder / "native.h5", velocity)
    with h5py.File(folder / "contiguous.h5", "w") as file:
        file["velocity"] = velocity
        file.attrs.update({"format": "vecfield", "version": 1})
    dims, few = ("time", "y", "x"), (1, size, size)
    data = xr.Dataset({name: (dims, velocity[:, axis]) for axis, name in enumerate("uv")})
    floats = {"zlib": True, "shuffle": True, "complevel": 4, "chunksizes": few}
    shorts = floats | {"dtype": "int16", "scale_factor": 2e-4, "_FillValue": -32767}
    large = shorts | {"chunksizes": (32, size, size)}
    ways = {"float32, gzip": floats, "int16, gzip": shorts, "int16, gzip, 32 a chunk": large}
    files = {"memory": ("native.h5", 2.0), "native": ("native.h5", 0.0), "native, contiguous": ("contiguous.h5", 0.0)}
    for number, (name, encoding) in enumerate(ways.items()):
        data.to_netcdf(folder / f"{number}.nc", engine="h5netcdf", encoding=dict.fromkeys("uv", encoding))
        files[f"netCDF {name}"] = (f"{number}.nc", 0.0)
    return {name: (str(folder / file), limit) for name, (file, limit) in files.items()}


def compare(count: int = 384, size: int = 128, batch: int = 64) -> None:
    """Prints batches a second of random snapshots, in the first pass over a file and in the second."""
    order = np.random.default_rng(1).permutation(count).reshape(-1, batch)
    with tempfile.TemporaryDirectory() as folder:
        print(f"{count} snapshots 2x{size}x{size}, batches of {batch}: opened in s, batches a second in passes 1, 2, 3")
        for name, (path, limit) in write_files(Path(folder), count, size).items():
            begun = time.perf_counter()
            fields = open_fields(path, preload_gb=limit, land="nan")
            opened = time.perf_counter() - begun
            passes = [len(order) / seconds(lambda: [fields.read(rows) for rows in order]) for _ in range(3)]  # noqa: B023
            print(f"{name:32}{opened:8.2f}" + "".join(f"{rate:10.1f}" for rate in passes))


if __name__ == "__main__":
    compare() if sys.argv[1:] == ["files"] else measure(sys.argv[1:])
