"""HDF5: every way of reading gives the same numbers, bad files give one clear message, writing is all or nothing."""

from __future__ import annotations

import fcntl
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.data.stored import Cached
from vecfield_diffusion.errors import UserError

PINBALL = Path(__file__).parents[2] / "shared" / "data" / "pinball_wake_dns" / "pinball_wake_re130.h5"
VELOCITY = np.random.default_rng(0).standard_normal((12, 2, 5, 7)).astype(np.float32)


def write_plain(path: Path, **arrays: np.ndarray) -> str:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return str(path)


def test_round_trip_of_the_native_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "fields.h5"
    valid = np.ones((5, 7), dtype=bool)
    valid[2, 3] = False
    coordinates = {"x": np.arange(7) * 2.0, "y": np.arange(5) * -3.0, "time": np.arange(12) * 0.5}
    boundaries = {"boundary_x": "periodic", "boundary_y": "wall"}
    write_hdf5(
        path, VELOCITY, 2.0, -3.0, units="cm s-1", source="a", licence="CC0", valid=valid, **coordinates, **boundaries
    )
    fields = open_fields(str(path))
    expected = torch.from_numpy(np.where(valid, VELOCITY * np.float32(0.01), np.nan))
    torch.testing.assert_close(fields.read(range(12)), expected, equal_nan=True, rtol=0, atol=0)
    np.testing.assert_allclose(fields.restore(fields.read([3]).numpy())[0, :, 0], VELOCITY[3, :, 0], rtol=1e-6)
    assert fields.grid.valid.numpy().tolist() == valid.tolist()
    assert (fields.grid.dx.tolist(), fields.grid.dy.tolist()) == ([2.0] * 5, [-3.0] * 5)
    assert fields.grid.periodic == (False, True) and fields.grid.boundary_y == "wall"
    assert (
        fields.units == "m s-1"
        and fields.component_attrs[0]["units"] == "cm s-1"
        and fields.attrs == {"source": "a", "licence": "CC0"}
    )
    for name, values in coordinates.items():
        np.testing.assert_array_equal(getattr(fields, name), values)
    assert [child.name for child in path.parent.iterdir()] == ["fields.h5"]


def test_blocks_of_an_iterator_are_joined_in_chunks_of_a_few_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "fields.h5"
    write_hdf5(path, (torch.from_numpy(VELOCITY[k : k + 5]) for k in (0, 5, 10)))
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["velocity"][()], VELOCITY)
        assert 1 <= file["velocity"].chunks[0] <= 8 and file["velocity"].chunks[1:] == (2, 5, 7)
        assert file.attrs["format"] == "vecfield" and file.attrs["version"] == 1


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "fields.h5"
    path.write_bytes(b"old")

    def interrupted() -> Iterator[np.ndarray]:
        yield VELOCITY
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hdf5(path, interrupted())
    with pytest.raises(ValueError, match="got"):
        write_hdf5(path, [VELOCITY, VELOCITY[..., :3]])
    with pytest.raises(ValueError, match=r"x must be of shape \(7,\), got \(5,\)"):
        write_hdf5(path, VELOCITY, x=np.arange(5))
    with pytest.raises(ValueError, match="no snapshot"):
        write_hdf5(path, iter(()))
    with pytest.raises(UserError, match="cannot write"):
        write_hdf5(path / "below" / "fields.h5", VELOCITY)
    assert path.read_bytes() == b"old" and [child.name for child in tmp_path.iterdir()] == ["fields.h5"]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("options", [{}, {"chunks": True}, {"chunks": True, "compression": "gzip"}, {"dtype": ">f8"}])
def test_memory_map_and_handle_read_alike(tmp_path: Path, split: bool, options: dict) -> None:
    path = tmp_path / "plain.h5"
    with h5py.File(path, "w") as file:
        for name, array in {"u": VELOCITY[:, 0], "v": VELOCITY[:, 1]}.items() if split else [("w", VELOCITY)]:
            file.create_dataset(name, data=array, **options)
    names = {"u": "u", "v": "v"} if split else {"velocity": "w"}
    fields = [open_fields(str(path), preload_gb=limit, **names) for limit in (2.0, 0.0)]
    assert isinstance(fields[0].reader, MemoryReader)
    expected = torch.from_numpy(VELOCITY)
    assert isinstance(fields[1].reader, Cached) == bool(options.get("chunks"))
    for chosen in ([3], [7, 2, 2, 11], [4, 5, 6], []):
        for each in fields:
            assert torch.equal(each.read(chosen), expected[chosen])


def test_a_reader_opens_its_own_handle_after_pickling(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.h5", velocity=VELOCITY)
    fields = open_fields(path, preload_gb=0.0)
    fields.read([0])
    blob = pickle.dumps(fields)
    assert len(blob) < VELOCITY.nbytes
    copy: Fields = pickle.loads(blob)
    assert torch.equal(copy.read([5, 1]), torch.from_numpy(VELOCITY[[5, 1]]))


def test_many_snapshots_in_a_chunk_are_kept_once_decoded_or_warned_of(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("velocity", data=VELOCITY, chunks=(12, 1, 5, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_fields(str(path))
        assert isinstance(open_fields(str(path), preload_gb=0.0).reader, Cached)
    monkeypatch.setattr("vecfield_diffusion.data.readers.found.room_for", lambda _: False)
    with pytest.warns(UserWarning, match="large pieces.*Raise dataset.preload_gb=0 .3.36e-06 needed.*TMPDIR"):
        open_fields(str(path), preload_gb=0.0)


@pytest.mark.parametrize("limit", [0.0, 2.0])
def test_masks_that_move_make_gaps_and_their_union_is_the_domain(tmp_path: Path, limit: float) -> None:
    valid = np.zeros((12, 5, 7), dtype=np.uint8)
    valid[:, :, 2:] = 1
    valid[4, 3, 3] = 0
    observed = np.ones((12, 5, 7), dtype=bool)
    observed[:, 1, 4] = False
    path = write_plain(tmp_path / "a.h5", velocity=VELOCITY, valid=valid, observed=observed)
    fields = open_fields(path, preload_gb=limit)
    np.testing.assert_array_equal(fields.grid.valid.numpy(), valid.any(0))
    measured = fields.read(range(12))[:, 0].isfinite().numpy()
    np.testing.assert_array_equal(measured, (valid == 1) & observed)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("valid", (7, 5), r"'valid' has shape \(7, 5\). Expected \(5, 7\) or \(12, 5, 7\).*dataset.valid="),
        ("observed", (11, 5, 7), r"'observed' has shape \(11, 5, 7\). Expected \(12, 5, 7\), as the velocity"),
        ("observed", (5, 7), r"'observed' has shape \(5, 7\). Expected \(12, 5, 7\), as the velocity"),
    ],
)
def test_a_mask_of_another_shape_is_refused_in_a_native_file_only(
    tmp_path: Path, name: str, shape: tuple[int, ...], match: str
) -> None:
    path = write_plain(tmp_path / "a.h5", velocity=VELOCITY, **{name: np.zeros(shape, dtype=bool)})
    assert open_fields(path).grid.valid.all()
    with h5py.File(path, "a") as file:
        file.attrs["format"] = "vecfield"
    with pytest.raises(UserError, match=match):
        open_fields(path)


def test_a_named_mask_of_solids(tmp_path: Path) -> None:
    solid = np.zeros((5, 7), dtype=np.uint8)
    solid[1:3, 2] = 1
    path = write_plain(tmp_path / "a.h5", u=VELOCITY[:, 0], v=VELOCITY[:, 1], solid=solid)
    fields = open_fields(path, u="u", v="v", invalid="solid")
    np.testing.assert_array_equal(fields.grid.valid.numpy(), solid == 0)
    assert fields.names == ("u", "v")


def test_coordinates_by_name_by_default_and_in_degrees(tmp_path: Path) -> None:
    arrays = {"velocity": VELOCITY, "xx": np.arange(7) * 4.0, "y": np.arange(5) * 2.0, "x": np.arange(3)}
    fields = open_fields(write_plain(tmp_path / "a.h5", **arrays), x="xx")
    assert fields.grid.dx[0] == 4.0 and fields.grid.dy[0] == 2.0
    assert open_fields(str(tmp_path / "a.h5"), dx=7.0).grid.dx[0] == 7.0
    globe = {"velocity": VELOCITY, "lon": np.arange(7) * 360.0 / 7.0, "lat": np.linspace(40.0, 20.0, 5)}
    fields = open_fields(write_plain(tmp_path / "b.h5", **globe))
    assert fields.x_name == "lon" and fields.y_name == "lat" and fields.grid.boundary_x == "periodic"
    assert (fields.grid.dy < 0).all() and fields.grid.dx[0] < fields.grid.dx[4]


@pytest.mark.parametrize("units", ["km", "kilometre", b"kilometers"])
def test_coordinates_in_kilometres(tmp_path: Path, units: str | bytes) -> None:
    path = write_plain(tmp_path / "a.h5", velocity=VELOCITY, x=np.arange(7) * 2.5, y=np.arange(5) * -0.5)
    with h5py.File(path, "a") as file:
        file["x"].attrs["units"] = units
        file["y"].attrs["units"] = "m"
    fields = open_fields(path)
    assert fields.grid.dx.tolist() == [2500.0] * 5 and fields.grid.dy.tolist() == [-0.5] * 5
    assert fields.x.tolist() == (np.arange(7) * 2.5).tolist()
    assert open_fields(path, dx=3.0).grid.dx.tolist() == [3.0] * 5


def test_packed_arrays_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    packed = np.round(VELOCITY * 1000).astype(np.int16)
    packed[3, 1, 2, 4] = -32000
    with h5py.File(path, "w") as file:
        file["velocity"] = packed
        file["velocity"].attrs.update({"scale_factor": 1e-3, "add_offset": 2.0, "_FillValue": np.int16(-32000)})
    expected = np.where(packed == -32000, np.nan, packed * 1e-3 + 2.0)
    expected[3, :, 2, 4] = np.nan
    for limit in (2.0, 0.0):
        np.testing.assert_allclose(open_fields(str(path), preload_gb=limit).read(range(12)), expected, rtol=1e-6)


@pytest.mark.parametrize("limit", [2.0, 0.0])
def test_other_arrays_are_read_as_snapshots(tmp_path: Path, limit: float) -> None:
    depth, speed = VELOCITY[0, 0], VELOCITY[:, 0] * 2
    arrays = {"context/guess": VELOCITY * 3, "context/depth": depth, "wind": speed, "tide": np.arange(12.0)}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, array in ({"velocity": VELOCITY} | arrays).items():
            file.create_dataset(name, data=array, compression="gzip" if array.ndim > 2 else None)
        file["context/stack"], file["wrong"] = VELOCITY[0], np.zeros((5, 6))
        file.attrs.update({"format": "vecfield", "version": 1, "dx": 1.0})
    fields = open_fields(str(tmp_path / "a.h5"), preload_gb=limit)
    chosen = np.array([9, 2, 2])
    expected = {
        "guess": VELOCITY[chosen] * 3,
        "context/guess": VELOCITY[chosen] * 3,
        "depth": np.broadcast_to(depth, (3, 1, 5, 7)),
        "wind": speed[chosen, None],
        "tide": np.broadcast_to(chosen[:, None, None, None], (3, 1, 5, 7)),
        "stack": np.broadcast_to(VELOCITY[0], (3, 2, 5, 7)),
    }
    for name, values in expected.items():
        reader = fields.variable(name)
        for _ in range(2):
            read = reader(chosen)
            np.testing.assert_array_equal(read, values)
            read[:] = 0.0
        assert read.dtype == np.float32 and reader(chosen[:0]).shape == (0, *values.shape[1:])
    with pytest.raises(UserError, match="no variable 'dept'.*Did you mean 'depth'.*It has: context/depth"):
        fields.variable("dept")
    with pytest.raises(UserError, match=r"'wrong' has shape \(5, 6\), which is not that of 12 snapshots of 5x7"):
        fields.variable("wrong")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    whole = Path(write_plain(tmp_path / "whole.h5", velocity=VELOCITY))
    cases = {
        "cut.h5": (whole.read_bytes()[:-400], "is truncated"),
        "text.h5": (b"u, v\n1, 2\n", "no file that can be read here: .*Expected .*HDF5"),
        "empty.h5": (b"", "no file that can be read here: .*Expected .*HDF5"),
        "classic.nc": (b"CDF\x05" + bytes(64), "nccopy -k nc4"),
    }
    for name, (content, match) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=match):
            open_fields(str(tmp_path / name))
    with pytest.raises(UserError, match=r"no file.*Did you mean 'whole.h5'.*dataset.path="):
        open_fields(str(tmp_path / "whol.h5"))


def test_a_file_that_another_process_writes(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.h5", velocity=VELOCITY)
    with open(path, "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing"):
            open_fields(path)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"velocity": "velocity"},
            r"no array 'velocity' \(dataset.velocity=velocity\).*It has: .*speed \(12, 5, 7\).*dataset.u=u dataset.v=v",
        ),
        ({"u": "speeed", "v": "v"}, "dataset.u=speeed.*Did you mean 'speed'"),
        ({"u": "u"}, "name both components"),
        ({"u": "u", "v": "short"}, r"'u' has shape \(12, 5, 7\) and 'short' \(12, 5, 6\)"),
        ({"velocity": "speed"}, r"shape \(12, 5, 7\). Expected \(N, 2, H, W\)"),
        ({"u": "names", "v": "v"}, "expected numbers"),
        ({"u": "u", "v": "v", "valid": "short"}, r"mask 'short' has shape \(12, 5, 6\)"),
        ({"u": "u", "v": "v", "x": "y"}, r"coordinate 'y' has shape \(5,\), expected \(7,\)"),
        ({"u": "nothing", "v": "v"}, "all values are NaN"),
        ({"u": "u", "v": "v", "valid": "dry"}, "marks no cell as valid"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arguments: dict, match: str) -> None:
    u, v = VELOCITY[:, 0], VELOCITY[:, 1]
    path = write_plain(tmp_path / "a.h5", u=u, v=v, speed=u, short=u[..., :6], packed=u, nothing=np.nan * u)
    with h5py.File(path, "a") as file:
        file["y"] = np.arange(5)
        file["dry"] = np.zeros((5, 7), dtype=bool)
        file["names"] = ["a", "b"]
        file["packed"].attrs["scale_factor"] = 0.1
    with pytest.raises(UserError, match=match):
        open_fields(path, **arguments)


def test_damaged_data_and_a_newer_version_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        array = file.create_dataset("velocity", data=VELOCITY, chunks=(1, 2, 5, 7), compression="gzip")
        offset = array.id.get_chunk_info(3).byte_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        open_fields(str(path))
    index = Path(write_plain(tmp_path / "index.h5", velocity=VELOCITY))
    index.write_bytes(index.read_bytes().replace(b"TREE", b"BUSH"))
    with pytest.raises(UserError, match="is damaged"):
        open_fields(str(index), velocity="missing")
    newer = write_plain(tmp_path / "b.h5", velocity=VELOCITY)
    with h5py.File(newer, "a") as file:
        file.attrs.update({"format": "vecfield", "version": 2})
    with pytest.raises(UserError, match="version 2"):
        open_fields(newer)
    with pytest.raises(ValueError, match="^preload_gb must be at least 0, got -1"):
        open_fields(write_plain(tmp_path / "c.h5", velocity=VELOCITY), preload_gb=-1)


@pytest.mark.skipif(not PINBALL.exists(), reason="the pinball wake is not on this machine")
@pytest.mark.parametrize("limit", [0.0, 2.0])
def test_the_pinball_wake(limit: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = open_fields(str(PINBALL), u="u", v="v", invalid="obstacle_mask", preload_gb=limit)
    assert (len(fields), fields.shape, fields.names) == (400, (51, 102), ("u", "v"))
    assert 1.0 - fields.grid.valid.double().mean().item() == pytest.approx(0.032, abs=5e-4)
    assert fields.grid.dx[0] == pytest.approx(0.125) and fields.grid.dy[0] == pytest.approx(0.125)
    assert fields.time[1] - fields.time[0] == pytest.approx(0.75)
    assert fields.attrs["licence"] == "CC0-1.0"
    u = fields.read([0, 200, 399])[:, 0]
    assert u[u.isfinite()].mean().item() == pytest.approx(0.87, abs=0.05)
    with h5py.File(PINBALL) as file:
        raw = torch.from_numpy(file["u"][200])
        solid = torch.from_numpy(file["obstacle_mask"][()]).bool()
    assert torch.equal(u[1][~solid], raw[~solid]) and u[1][solid].isnan().all()
