"""Fields: what is missing is NaN in both components; the spacing follows from the coordinates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vecfield_diffusion.data.coordinates import Axis, Plane, along, make_grid
from vecfield_diffusion.data.fields import Fields, MemoryReader, blocks, duplicates, measured_cells
from vecfield_diffusion.data.readers.found import Found, FoundComponent
from vecfield_diffusion.data.words import INPUT, called
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import EARTH_RADIUS


def found_in(velocity: np.ndarray, mask: np.ndarray | None = None) -> Found:
    both = FoundComponent("u", MemoryReader(velocity.astype(np.float32)), velocity.shape[2:], Axis("x"), Axis("y"))
    return Found((both,), len(velocity), mask=mask)


def build(velocity: np.ndarray, mask: np.ndarray | None = None, **spacing: float) -> Fields:
    return found_in(velocity, mask).to_fields("memory", spacing=spacing)


def test_a_gap_in_one_component_is_a_gap_in_both_and_only_in_that_snapshot() -> None:
    velocity = np.arange(3 * 2 * 3 * 4, dtype=np.float32).reshape(3, 2, 3, 4)
    stored = velocity.copy()
    stored[1, 0, 2, 3] = np.nan
    stored[2, 1, 0, 0] = np.inf
    fields = build(stored)
    read = fields.read([2, 1])
    expected = torch.from_numpy(velocity[[2, 1]])
    expected[1, :, 2, 3] = torch.nan
    expected[0, :, 0, 0] = torch.nan
    torch.testing.assert_close(read, expected, equal_nan=True, rtol=0, atol=0)
    assert fields.grid.valid.all()
    assert len(fields) == 3 and fields.shape == (3, 4) and read.dtype == torch.float32


def test_a_component_without_its_partner_is_kept_on_demand() -> None:
    stored = np.arange(2 * 2 * 3 * 4, dtype=np.float32).reshape(2, 2, 3, 4)
    stored[1, 0, 2, 3] = np.nan
    stored[0, 1, 0, 1] = np.inf
    mask = np.ones((3, 4), dtype=bool)
    mask[1, 1] = False
    expected = np.where(mask & np.isfinite(stored), stored, np.nan)
    read = build(stored, mask).read([1, 0], partial=True)
    np.testing.assert_array_equal(read.numpy(), expected[[1, 0]])


def test_reading_does_not_change_what_is_stored() -> None:
    fields = build(np.ones((2, 2, 3, 4)), mask=np.eye(3, 4, dtype=bool))
    fields.read([0]).fill_(7.0)
    assert fields.read([0])[0, 0, 0, 0] == 1.0
    assert fields.read(torch.tensor([1, 0])).isfinite().sum() == 2 * 2 * 3


def test_a_cell_measured_once_is_valid_and_one_never_measured_is_not() -> None:
    velocity = np.full((5, 2, 2, 3), np.nan)
    velocity[3, :, 1, 2] = 1.0
    velocity[:, 0, 0, 0] = 1.0
    fields = build(velocity)
    assert fields.grid.valid.tolist() == [[False] * 3, [False, False, True]]


def test_cells_that_the_mask_excludes_are_nan_whatever_they_hold() -> None:
    mask = np.array([[True, False, True], [True, True, True]])
    read = build(np.zeros((1, 2, 2, 3)), mask=mask).read([0])
    np.testing.assert_array_equal(read[0, 1].isfinite().numpy(), mask)


def test_nothing_valid_is_refused() -> None:
    with pytest.raises(UserError, match="all values are NaN"):
        build(np.full((2, 2, 3, 3), np.nan))
    with pytest.raises(UserError, match="marks no cell as valid"):
        build(np.zeros((2, 2, 3, 3)), mask=np.zeros((3, 3), dtype=bool))
    with pytest.raises(IndexError, match="0 to 1"):
        build(np.zeros((2, 2, 3, 3))).read([2])


def test_blocks_cover_all_snapshots_once_and_reading_stops_when_all_cells_are_seen() -> None:
    cells = 2**20
    parts = list(blocks(11, cells))
    assert max(map(len, parts)) == 4 and np.concatenate(parts).tolist() == list(range(11))
    calls = []

    def reader(indices: np.ndarray) -> np.ndarray:
        calls.append(indices)
        return np.zeros((len(indices), 2, 1024, 1024), dtype=np.float32)

    assert measured_cells(reader, 11, np.ones((1024, 1024), dtype=bool), still=False)[0].all() and len(calls) == 1


def test_spacing_from_metres_kilometres_and_degrees() -> None:
    valid = torch.ones(3, 4, dtype=torch.bool)
    grid = make_grid(valid, Axis("x", np.arange(4) * 2.5, {"units": "Km"}), Axis("y", 50.0 - 5.0 * np.arange(3)))
    assert grid.dx.tolist() == [2500.0] * 3 and grid.dy.tolist() == [-5.0] * 3
    lat = np.array([60.0, 45.0, 30.0])
    axes = Axis("lon", np.array([350.0, 355.0, 0.0, 5.0]), degrees=True), Axis("lat", lat, degrees=True)
    grid = make_grid(valid, *axes)
    radian = math.pi / 180.0
    assert grid.dy.tolist() == pytest.approx([-15.0 * radian * EARTH_RADIUS] * 3)
    assert grid.dx.tolist() == pytest.approx([EARTH_RADIUS * math.cos(phi * radian) * 5 * radian for phi in lat])
    assert grid.boundary_x == "open"


def test_a_longitude_that_closes_the_circle_is_periodic_unless_told_otherwise() -> None:
    valid = torch.ones(3, 36, dtype=torch.bool)
    axes = Axis("lon", np.arange(36) * 10.0, degrees=True), Axis("lat", np.array([0.0, 1.0, 2.0]), degrees=True)
    assert make_grid(valid, *axes).periodic == (False, True)
    assert make_grid(valid, *axes, dx=3.0).dx.tolist() == [3.0] * 3
    assert make_grid(valid, *axes, boundary_x="wall", boundary_y="wall").boundary_x == "wall"


def test_what_is_given_goes_before_the_coordinates_and_one_is_the_last_resort() -> None:
    valid = torch.ones(3, 4, dtype=torch.bool)
    uneven = Axis("x", np.array([0.0, 1.0, 5.0, 6.0]))
    assert make_grid(valid, Axis("x"), Axis("y")).dx.tolist() == [1.0] * 3
    assert make_grid(valid, uneven, Axis("y"), dx=2.0).dx.tolist() == [2.0] * 3
    with pytest.raises(UserError, match="dataset.dx="):
        make_grid(valid, uneven, Axis("y"))
    with pytest.raises(UserError, match="neither rises nor falls"):
        make_grid(valid, Axis("x"), Axis("y", np.array([0.0, 1.0, 0.0])))
    with pytest.raises(UserError, match="lon is in degrees along one dimension.*dataset.dx="):
        make_grid(valid, Axis("lon", np.arange(4.0), degrees=True), Axis("y"))
    with pytest.raises(ValueError, match="boundary_y must be one of"):
        make_grid(valid, Axis("x"), Axis("y"), boundary_y="closed")


def test_rows_may_be_unevenly_spaced() -> None:
    grid = make_grid(torch.ones(4, 2, dtype=torch.bool), Axis("x"), Axis("y", np.array([0.0, 1.0, 3.0, 7.0])))
    # At the edges the one-sided differences of second order that `operators` takes there: (4 - 3) / 2 and (12 - 2) / 2.
    assert grid.dy.tolist() == [0.5, 1.5, 3.0, 5.0]


def test_coordinates_are_made_up_from_the_spacing_where_the_file_has_none() -> None:
    fields = build(np.zeros((1, 2, 3, 4)), dx=2.0, dy=-3.0)
    assert fields.x.tolist() == [0.0, 2.0, 4.0, 6.0] and fields.y.tolist() == [0.0, -3.0, -6.0]
    assert "1 fields 2x3x4" in fields.summary() and "dx 2, dy -3" in fields.summary()


def test_land_is_known_by_a_mask_or_by_zeros_and_else_not() -> None:
    velocity = np.ones((5, 2, 3, 4), dtype=np.float32)
    velocity[:, :, 0, 1] = 0.0
    velocity[:, :, 2, 2] = np.nan  # never measured
    found = found_in(velocity)
    assert found.to_fields("f.nc", land="nan").land is None
    zeros = found.to_fields("f.nc", land="zero")
    assert zeros.land.nonzero().tolist() == [[0, 1]] and (~zeros.grid.valid).sum() == 2
    assert zeros.within(torch.ones(3, 4, dtype=torch.bool)).land is None
    mask = np.ones((3, 4), dtype=bool)
    mask[1, 3] = False
    masked = replace(found, mask=mask).to_fields("f.nc", land="nan")
    assert masked.land.nonzero().tolist() == [[1, 3]]


def test_cells_that_never_move_are_land_only_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    velocity = np.ones((5, 2, 3, 4), dtype=np.float32)
    velocity[:, :, 0, 1] = 0.0  # never moves
    velocity[:, :, 2, 2] = 0.0  # moves once, along y
    velocity[3, 1, 2, 2] = 1e-30
    velocity[:, 0, 1, 1] = 0.0  # moves along y
    velocity[:, :, 0, 3] = 0.0  # is zero where it is measured
    velocity[2, 0, 0, 3] = np.nan
    found = found_in(velocity)
    domains = {land: found.to_fields("f.nc", land=land).grid.valid for land in ("auto", "nan", "zero")}
    assert domains["auto"].all() and domains["nan"].all()
    assert (~domains["zero"]).nonzero().tolist() == [[0, 1], [0, 3]]
    note = "note: f.nc: 2 cells are exactly 0 in both components at all times. If that is land: dataset.land=zero"
    assert capsys.readouterr().out == (f"{note}; if it is gaps: dataset.land=gap\n")
    with called(INPUT):
        found.to_fields("f.nc")
    assert "If that is land: zeros=land; if it is gaps: zeros=gaps\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="every cell is exactly 0 at all times, so dataset.land=zero leaves none"):
        found_in(velocity * 0).to_fields("f.nc", land="zero")
    with pytest.raises(ValueError, match="^land must be one of auto, nan, zero, gap, got 'sea'"):
        found.to_fields("f.nc", land="sea")


def test_copies_of_a_snapshot_are_found_and_empty_ones_are_not() -> None:
    velocity = np.random.default_rng(0).standard_normal((7, 2, 3, 4)).astype(np.float32)
    velocity[5], velocity[3], velocity[6] = velocity[1], np.nan, np.nan
    velocity[4] = velocity[1]
    velocity[4, 1, 2, 3] += np.spacing(velocity[4, 1, 2, 3])
    assert duplicates(velocity) == [(1, 5)]


def test_lags_are_whole_and_positive() -> None:
    found = found_in(np.zeros((1, 2, 3, 4)))
    fields = found.to_fields("f.nc", context=["sst"], history=[1, 2])
    assert (fields.context, fields.history) == (["sst"], [1, 2])
    for wrong in ([0], [-1], [1.5]):
        with pytest.raises(ValueError, match="^history must be lags of at least 1"):
            found.to_fields("f.nc", history=wrong)


def unit(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    lon, lat = np.deg2rad(lon), np.deg2rad(lat)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])


def test_the_spacing_of_a_curvilinear_grid_is_the_distance_on_the_globe() -> None:
    row, column = np.meshgrid(np.arange(4.0), np.arange(5.0), indexing="ij")
    lon, lat = 179.0 + 0.5 * column - 0.2 * row, 60.0 - 0.4 * row + 0.1 * column
    points = unit(lon, lat)
    angle = [
        np.arccos((np.take(points, [*range(n - 1)], a) * np.take(points, [*range(1, n)], a)).sum(0))
        for a, n in ((2, 5), (1, 4))
    ]
    between = EARTH_RADIUS * angle[1].mean(1)
    wrapped = (lon + 180.0) % 360.0 - 180.0
    for longitude in (lon, wrapped):
        dx, dy = Plane(longitude, lat, True).spacing()
        np.testing.assert_allclose(dx, EARTH_RADIUS * angle[0].mean(1), rtol=1e-7)
        np.testing.assert_allclose(-dy[[0, 3]], between[[0, 2]], rtol=1e-7)
        np.testing.assert_allclose(-dy[1:3], (between[1:] + between[:-1]) / 2, rtol=1e-7)
    lat[1] = np.nan
    assert np.isfinite(Plane(lon, lat, True).spacing()).all()
    dx, dy = Plane(3.0 * column + 4.0 * row, 4.0 * column - 3.0 * row, False).spacing()
    assert dx.tolist() == [5.0] * 4 and dy.tolist() == [-5.0] * 4


def test_a_plane_that_changes_along_one_axis_is_a_line() -> None:
    x, y = np.meshgrid([1.0, 3.0, 4.0], [7.0, 5.0])
    assert along(x, 1).tolist() == [1.0, 3.0, 4.0] and along(y, 0).tolist() == [7.0, 5.0]
    assert along(x + 0.1 * y, 1) is None
