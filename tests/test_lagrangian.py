"""Drifters against closed forms: uniform and accelerated flow, solid rotation, uneven rows, lost drifters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vecfield_diffusion.evaluation.lagrangian import distances, seed_drifters, separations, trajectories
from vecfield_diffusion.physics.grid import Grid

H, W = 21, 31
SEA = torch.ones(H, W, dtype=torch.bool)
STARTS = torch.tensor([[10.0, 8.0], [15.3, 10.7], [20.5, 12.25]], dtype=torch.float64)


def uniform(u: Tensor | float, v: Tensor | float, frames: int = 6) -> Tensor:
    """A flow that is the same everywhere; `(T,)` where it changes in time."""
    parts = [torch.as_tensor(part, dtype=torch.float64).expand(frames) for part in (u, v)]
    return torch.stack(parts, dim=1)[:, :, None, None].expand(frames, 2, H, W)


def rotation(grid: Grid, spin: float, frames: int = 6) -> Tensor:
    """Solid rotation about the middle of the domain, by `spin` radians per unit of time."""
    x = (torch.arange(W) - W // 2) * grid.dx[0]
    y = (torch.arange(H) - H // 2) * grid.dy[0]
    field = spin * torch.stack((-y[:, None].expand(H, W), x.expand(H, W)))
    return field.expand(frames, 2, H, W)


@pytest.mark.parametrize(("boundary", "dy"), [("periodic", 2.0), ("open", -2.0)])
def test_uniform_flow_carries_all_alike(boundary: str, dy: float) -> None:
    grid = Grid(SEA, 4.0, dy, boundary, boundary)
    found = trajectories(uniform(0.5, -0.25), grid, dt=3.0, starts=STARTS, substeps=2)
    assert found.shape == (6, 3, 2)
    step = torch.tensor([0.5 * 3 / 4, -0.25 * 3 / dy], dtype=torch.float64)
    want = STARTS + torch.arange(6, dtype=torch.float64)[:, None, None] * step
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_a_flow_that_grows_evenly_in_time() -> None:
    """u = a t, which the interpolation between frames has exactly: x = x0 + a t^2 / 2."""
    time, a = 2.0 * torch.arange(5, dtype=torch.float64), 0.3
    found = trajectories(uniform(a * time, 0.0, 5), Grid(SEA, 1.0, 1.0), dt=2.0, starts=STARTS, substeps=1)
    torch.testing.assert_close(found[..., 0], STARTS[:, 0] + (a * time**2 / 2)[:, None], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dy", [1500.0, -1500.0])
def test_solid_rotation_turns_with_order_four(dy: float) -> None:
    """On cells of 1000 x 1500 m, one radian in each of five frames; the error falls sixteenfold with half the step."""
    grid, spin = Grid(SEA, 1000.0, dy), 1 / 3600
    centre, cells = torch.tensor([W // 2, H // 2]).double(), torch.tensor([1000.0, dy]).double()
    ground = (STARTS - centre) * cells
    angle = torch.arange(6, dtype=torch.float64)[:, None]
    x, y = ground.unbind(dim=1)
    turned = torch.stack((x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()), dim=-1)
    errors = []
    for substeps in (4, 8, 16):
        found = trajectories(rotation(grid, spin), grid, dt=3600.0, starts=STARTS, substeps=substeps)
        errors.append(float(((found - centre) * cells - turned).norm(dim=-1).max()))
    assert errors[1] / errors[0] == pytest.approx(1 / 16, rel=0.1)
    assert errors[2] / errors[1] == pytest.approx(1 / 16, rel=0.1)
    assert errors[2] < 1.0  # of a circle of some 8 km


def test_rows_of_their_own_spacing() -> None:
    """Eastward flow on a sphere: a drifter keeps its row and passes u t / dx(row) cells."""
    lat = torch.linspace(30.0, 70.0, H)
    grid = Grid.from_degrees(torch.linspace(0.0, 30.0, W), lat, SEA)
    starts = torch.tensor([[3.0, 0.0], [3.0, 20.0]], dtype=torch.float64)
    found = trajectories(uniform(0.5, 0.0, 3), grid, dt=86400.0, starts=starts, substeps=3)
    want = 3 + 0.5 * 2 * 86400.0 / grid.dx[[0, 20]]
    torch.testing.assert_close(found[-1, :, 0], want, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[-1, :, 1], starts[:, 1])


def test_each_member_has_its_own_flow() -> None:
    members = torch.stack([uniform(u, 0.0) for u in (0.1, 0.2)])
    found = trajectories(members, Grid(SEA, 1.0, 1.0), dt=1.0, starts=STARTS)
    assert found.shape == (2, 6, 3, 2)
    torch.testing.assert_close(found[:, -1, 0, 0], torch.tensor([10.5, 11.0], dtype=torch.float64))


def test_two_uniform_flows_come_apart_by_their_difference() -> None:
    """0.3 and 0.4 m/s apart in x and y: 0.5 t metres; around a periodic axis the shorter way."""
    grid = Grid(SEA, 2.0, 2.0, "periodic", "periodic")
    truth, members = uniform(0.1, 0.2), torch.stack((uniform(0.4, 0.6), uniform(0.1, 0.2)))
    found = separations(truth, members, grid, dt=2.0, starts=STARTS)
    torch.testing.assert_close(found, torch.tensor([[1.0, 3.0, 5.0], [0.0, 0.0, 0.0]]).double(), rtol=0, atol=1e-12)
    far = torch.tensor([0.5, 3.0]).double(), torch.tensor([W - 0.5, 3.0]).double()
    assert float(distances(*far, grid)) == pytest.approx(2.0)
    assert float(distances(*far, Grid(SEA, 2.0, 2.0))) == pytest.approx(2.0 * (W - 1))


def test_drifters_that_leave_or_strand_are_lost() -> None:
    """Land from column 20 on: a drifter is lost when its nearest cell is land, another leaves at the western edge."""
    valid = SEA.clone()
    valid[:, 20:] = False
    grid = Grid(valid, 1.0, 1.0)
    flow = uniform(1.0, 0.0, 4).where(valid, math.nan)
    starts = torch.tensor([[17.0, 5.0], [18.2, 5.0]], dtype=torch.float64)
    found = trajectories(flow, grid, dt=1.0, starts=starts)
    torch.testing.assert_close(found[:3, 0, 0], torch.tensor([17.0, 18.0, 19.0]).double())
    assert found[3, 0].isnan().all() and found[2:, 1].isnan().all()
    west = trajectories(uniform(-1.0, 0.0, 4), Grid(SEA, 1.0, 1.0), dt=1.0, starts=starts - torch.tensor([16.0, 0.0]))
    assert west[2, 0].isnan().all() and west[2, 1, 0] == pytest.approx(0.2)
    apart = separations(flow, 0 * flow, grid, dt=1.0, starts=starts, after=(1, 2))
    torch.testing.assert_close(apart, torch.tensor([1.0, 2.0]).double())  # the second is lost, and does not count


def test_beside_land_the_wet_corners_count() -> None:
    valid = SEA.clone()
    valid[6:] = False
    flow = uniform(0.1, 0.0, 2).where(valid, math.nan)
    found = trajectories(flow, Grid(valid, 1.0, 1.0), dt=1.0, starts=torch.tensor([[4.0, 5.4]]))
    torch.testing.assert_close(found[1], torch.tensor([[4.1, 5.4]]).double(), rtol=0, atol=1e-7)


def test_drifters_are_set_out_over_the_area_of_the_sea() -> None:
    valid = SEA.clone()
    valid[:10] = False
    lat = torch.linspace(0.0, 80.0, H)
    grid = Grid.from_degrees(torch.linspace(0.0, 30.0, W), lat, valid)
    places = seed_drifters(grid, 20_000)
    column, row = places.round().long().unbind(dim=1)
    assert valid[row.clamp(0, H - 1), column.clamp(0, W - 1)].all()
    shares = torch.bincount(row, minlength=H).double() / 20_000
    want = (grid.dx * grid.dy) * valid.any(dim=1)
    torch.testing.assert_close(shares, want / want.sum(), rtol=0, atol=0.01)
    assert torch.equal(places, seed_drifters(grid, 20_000)) and not torch.equal(places, seed_drifters(grid, 20_000, 1))


def test_what_cannot_be_is_refused() -> None:
    grid = Grid(SEA, 1.0, 1.0)
    with pytest.raises(ValueError, match="expected a series"):
        trajectories(torch.zeros(3, 2, 5, 5), grid, dt=1.0, starts=STARTS)
    with pytest.raises(ValueError, match=r"after=\[1, 6\]: 6 frames hold 5 steps"):
        separations(uniform(0.0, 0.0), uniform(0.0, 0.0), grid, dt=1.0, starts=STARTS, after=(1, 6))
    with pytest.raises(ValueError, match="substeps"):
        trajectories(uniform(0.0, 0.0), grid, dt=1.0, starts=STARTS, substeps=0)
    with pytest.raises(ValueError, match="valid cell"):
        seed_drifters(Grid(~SEA, 1.0, 1.0), 3)
