"""Damaged and strange input by the hundred: a message for the user, or a result, and never another exception.

What hypothesis finds is the same at each run (`derandomize`), and its number is bounded: these are seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_training import in_memory

from vecfield_diffusion.commands import infer, train
from vecfield_diffusion.data.masks import load_mask
from vecfield_diffusion.data.points import open_points
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.export import load_weights
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from vecfield_diffusion.training.loggers import records

BOUNDED = dict(deadline=None, derandomize=True, database=None)
BOUNDED |= {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
SHAPE = (6, 8)

#: Where a file is cut off, and bytes that are put into it, each at a share of its length.
CUTS = st.one_of(st.just(1.0), st.floats(0, 1))
PATCHES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), max_size=6)


def netcdf(path: Path, engine: str) -> None:
    rng = np.random.default_rng(0)
    dims, axes = ("time", "lat", "lon"), {"time": np.arange(3.0), "lat": np.arange(6.0), "lon": np.arange(8.0)}
    attrs = {name: {"units": "m s-1", "standard_name": f"{way}ward_sea_water_velocity"} for name, way in WAYS.items()}
    both = {name: (dims, rng.standard_normal((3, *SHAPE)), attrs[name]) for name in WAYS}
    xr.Dataset(both, axes).to_netcdf(path, engine=engine)


WAYS = {"u": "east", "v": "north"}


def table(path: Path) -> None:
    path.write_text("x,y,u,v,time\n" + "\n".join(f"{i % 8},{i % 6},0.{i},-0.{i},{i // 9}" for i in range(20)) + "\n")


#: How a whole file of each kind is written, by its name, and how it is read.
KINDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "fields.nc": (lambda path: netcdf(path, "h5netcdf"), lambda path: open_fields(path).read([0, 2])),
    "classic.nc": (lambda path: netcdf(path, "scipy"), lambda path: open_fields(path).read([0, 2])),
    "fields.npy": (
        lambda path: np.save(path, np.ones((3, 2, *SHAPE), dtype=np.float32)),
        lambda path: open_fields(path).read([0, 2]),
    ),
    "mask.npy": (lambda path: np.save(path, np.eye(*SHAPE, dtype=bool)), lambda path: load_mask(str(path), SHAPE)),
    "mask.nc": (
        lambda path: xr.Dataset({"mask": (("y", "x"), np.eye(*SHAPE))}).to_netcdf(path, engine="h5netcdf"),
        lambda path: load_mask(str(path), SHAPE),
    ),
    "points.csv": (table, lambda path: open_points(path, in_memory(np.ones((1, 2, *SHAPE))))),
    "last.pt": (lambda path: save_checkpoint(path, {"network": {"a": torch.ones(9)}, "step": 3}), load_checkpoint),
    "shipped.safetensors": (lambda path: save_file({"a": torch.ones(9)}, path, {"config": "{}"}), load_weights),
    "metrics.jsonl": (lambda path: path.write_text('{"step": 1, "loss": 2.0}\n' * 5), lambda path: list(records(path))),
}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=15, **BOUNDED)
@given(cut=CUTS, patches=PATCHES)
def test_damaged_files_end_with_a_message(tmp_path: Path, name: str, cut: float, patches: list) -> None:
    write, read = KINDS[name]
    path = tmp_path / name
    write(path)
    data = bytearray(path.read_bytes())
    for place, patch in patches:
        at = int(place * len(data))
        data[at : at + len(patch)] = patch
    path.write_bytes(data[: int(cut * len(data))])
    with contextlib.suppress(UserError, ValueError if name != "last.pt" else UserError):
        read(path)


#: Words of a command line: keys that there are and that there are not, with values of all kinds.
KEYS = st.sampled_from(
    ["seed", "members", "trainer.max_steps", "trainer.devices", "mask", "model.channels", "window", "é"]
)
VALUES = st.one_of(
    st.integers().map(str), st.floats().map(str), st.sampled_from(["null", "[", "{a:1}", "[1,2]", "a=b", ""])
)
WORDS = st.one_of(st.tuples(KEYS, VALUES).map("=".join), st.text(max_size=12))


@settings(max_examples=15, **BOUNDED)
@given(words=st.lists(WORDS, max_size=3), program=st.sampled_from([train, infer]))
def test_strange_commands_end_with_a_message(words: list[str], program: object) -> None:
    """Or are composed, with the keys of the program."""
    try:
        config = program.config(*words, complete=False)
    except UserError as error:
        assert str(error).strip()
    else:
        assert set(program.keys) <= set(config)
