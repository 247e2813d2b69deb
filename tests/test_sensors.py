"""Sensors: what an instrument reads, and its rows, written out by hand in physical units."""

import math
from dataclasses import replace

import pytest
import torch
from test_ellipses import random_errors

from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.ellipses import blocks
from vecfield_diffusion.guidance.sensors import Component, Footprint, Radial
from vecfield_diffusion.physics.grid import Grid

H, W = 5, 6
GENERATOR = torch.Generator().manual_seed(0)
MEAN = torch.randn(2, H, W, generator=GENERATOR)
NORMALIZER = Normalizer(MEAN, 2.0).double()
VALID = torch.ones(H, W, dtype=torch.bool)
VALID[2, 2] = False
GRID = Grid(VALID, 1000.0, 2000.0, "periodic", "open")
TRUTH = torch.randn(3, 2, H, W, dtype=torch.float64, generator=GENERATOR)


def given(read, sigma=0.1):
    observed = (torch.rand(3, 1, H, W, generator=torch.Generator().manual_seed(1)) < 0.5) & VALID
    y = torch.where(observed, NORMALIZER.normalize(read), torch.nan)
    return Observation(y, observed, torch.full((3, 1, 1, 1), sigma).double(), VALID.expand(3, 1, H, W))


def check(sensor):
    """An instrument without error reads what its rows say of the true field, in every row that is present."""
    observation = given(sensor.measure(TRUTH, GRID))
    for row in sensor.rows(observation, NORMALIZER, GRID):
        present = row.present.expand(row.y.shape)
        reading = row.forward(NORMALIZER.normalize(TRUTH))
        torch.testing.assert_close(row.y[present], reading[present])
        assert present.any() and not present[:, :, 2, 2].any()
    return observation


@pytest.mark.parametrize("component", ["u", "v", "both"])
def test_components(component):
    observation = check(Component(component))
    (row,) = Component(component).rows(observation, NORMALIZER, GRID)
    seen = [name in (component, "both") or component == "both" for name in ("u", "v")]
    assert row.present[:, :, VALID].any(dim=2).any(dim=0).tolist() == seen


@pytest.mark.parametrize("size", [1, 3, 5])
def test_footprints_average_the_field_and_its_mean(size):
    check(Footprint(size))


def test_footprints_have_the_error_ellipses_of_their_centres():
    """|y - A x|^2 in units of the errors, by the inverse of each block; u and v of a footprint belong together."""
    observation = given(Footprint(3).measure(TRUTH, GRID))
    error = random_errors(3, H, W)
    (rows,) = Footprint(3).rows(replace(observation, sigma_y=error), NORMALIZER, GRID)
    (plain,) = Footprint(3).rows(observation, NORMALIZER, GRID)
    x = torch.randn(3, 2, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    misfit = (plain.y - plain.forward(x)).movedim(1, -1)[observation.observed[:, 0]]
    var_u, var_v, both = blocks(error).movedim(1, -1)[observation.observed[:, 0]].unbind(-1)
    r = torch.stack([torch.stack([var_u, both], -1), torch.stack([both, var_v], -1)], -2)
    wanted = (misfit * torch.linalg.solve(r, misfit)).sum()
    found = rows.flat().whitened()
    torch.testing.assert_close((found.y - found.forward(x)).square().sum(), wanted, rtol=1e-10, atol=0)


def test_a_footprint_by_hand():
    """The mean of nine cells, across the periodic boundary, without the one on land."""
    got = Footprint(3).measure(TRUTH, GRID)
    near = [(i, j % W) for i in (1, 2, 3) for j in (0, 1, 2) if VALID[i, j % W]]
    expected = sum(TRUTH[:, :, i, j] for i, j in near) / len(near)
    torch.testing.assert_close(got[:, :, 2, 1], expected)
    near = [(i, j % W) for i in (3, 4) for j in (-1, 0, 1)]
    torch.testing.assert_close(got[:, :, 4, 0], sum(TRUTH[:, :, i, j] for i, j in near) / 6)


def test_bearings_in_a_plane_by_hand():
    """Clockwise from north, away from the site; rows may run southward. The operator itself stays without a place."""
    radar = Radial([[0.0, 0.0]])
    placed = radar.placed(torch.tensor([-1e3, 0.0, 1e3]), torch.tensor([2e3, 1e3]), geographic=False)
    expected = [[-math.atan2(1, 2), 0.0, math.atan2(1, 2)], [-math.pi / 4, 0.0, math.pi / 4]]
    torch.testing.assert_close(placed.bearings[0], torch.rad2deg(torch.tensor(expected)))
    assert radar.bearings == []


@pytest.mark.parametrize("site", [(10.0, 45.0), (179.0, 70.0), (-30.0, -45.0), (5.0, 0.0)])
def test_bearings_on_the_sphere_are_those_of_the_beam_at_the_cell(site):
    """The great circle from the site, p(s) = a cos s + e sin s, has the direction p'(d) at the cell b = p(d)."""
    lon = site[0] + torch.tensor([-2.5, -1.0, 0.0, 1.3, 2.5], dtype=torch.float64)
    lat = site[1] + torch.tensor([1.8, 0.7, -0.4, -1.8], dtype=torch.float64)
    wrapped = (lon + 180) % 360 - 180
    bearing = torch.deg2rad(Radial([list(site)]).placed(wrapped, lat, geographic=True).bearings[0])

    def unit(x, y):
        x, y = torch.broadcast_tensors(torch.deg2rad(x), torch.deg2rad(y))
        return torch.stack([y.cos() * x.cos(), y.cos() * x.sin(), y.sin()])

    x, y = torch.deg2rad(lon)[None, :], torch.deg2rad(lat)[:, None]
    a, b = unit(torch.tensor(site[0]).double(), torch.tensor(site[1]).double())[:, None, None], unit(lon, lat[:, None])
    cosine = (a * b).sum(dim=0)
    direction = (b * cosine - a) / (1 - cosine**2).sqrt()
    x, y = torch.broadcast_tensors(x, y)
    east = torch.stack([-x.sin(), x.cos(), torch.zeros_like(x)])
    north = torch.stack([-y.sin() * x.cos(), -y.sin() * x.sin(), y.cos()])
    torch.testing.assert_close(bearing.sin(), (direction * east).sum(dim=0), atol=1e-10, rtol=0)
    torch.testing.assert_close(bearing.cos(), (direction * north).sum(dim=0), atol=1e-10, rtol=0)


def test_a_flat_earth_would_be_a_degree_off_at_45_north_and_three_at_70():
    """200 km away, the worst direction: figures of a bearing of a plane with the cosine of the latitude."""
    for north, expected in ((45.0, 1.003), (70.0, 2.798)):
        distance, start = 200 / 6371, math.radians(north)
        worst = 0.0
        for azimuth in range(0, 360):
            angle = math.radians(azimuth)
            y = math.asin(math.sin(start) * math.cos(distance) + math.cos(start) * math.sin(distance) * math.cos(angle))
            x = math.atan2(
                math.sin(angle) * math.sin(distance) * math.cos(start),
                math.cos(distance) - math.sin(start) * math.sin(y),
            )
            lon, lat = (torch.tensor([math.degrees(value)], dtype=torch.float64) for value in (x, y))
            bearing = Radial([[0.0, north]]).placed(lon, lat, geographic=True).bearings[0].item()
            flat = math.degrees(math.atan2(x * math.cos(y), y - start))
            worst = max(worst, abs((bearing - flat + 180) % 360 - 180))
        assert worst == pytest.approx(expected, abs=2e-3)


def test_radars_read_the_velocity_away_from_them():
    radar = Radial([[0.0, 0.0], [5000.0, 8000.0]])
    with pytest.raises(ValueError, match="sites must be placed"):
        radar.rows(given(TRUTH), NORMALIZER, GRID)
    x, y = torch.arange(W).double() * 1000 + 1, torch.arange(H).double() * 2000 + 1
    radar = radar.placed(x, y, geographic=False)
    observation = check(radar)
    first, _ = radar.rows(observation, NORMALIZER, GRID)
    away = torch.stack([x.expand(H, W), y[:, None].expand(H, W)])
    along = (NORMALIZER.normalize(TRUTH) * away).sum(dim=1, keepdim=True) / away.norm(dim=0)
    seen = first.present.expand(first.y.shape)
    torch.testing.assert_close(first.y[seen], along[seen])


def test_recorded_velocities_of_two_radars():
    """What they recorded, each by itself: the rows agree with the true field, and errors are in units of the data."""
    generator = torch.Generator().manual_seed(3)
    file = {"b": torch.full((3, 1, H, W), 40.0), "e": 0.1 + torch.rand(3, 1, H, W, generator=generator)}
    file["a"] = 360 * torch.rand(3, 1, H, W, generator=generator)
    for name, bearing in (("va", file["a"]), ("vb", file["b"])):
        radians = torch.deg2rad(bearing)
        value = TRUTH[:, :1] * radians.sin() + TRUTH[:, 1:] * radians.cos()
        lost = torch.rand(3, 1, H, W, generator=generator) < 0.6
        file[name] = torch.where(lost | ~VALID, torch.nan, value)
    radar = Radial(velocity=["va", "vb"], bearing=["a", "b"], error=["e", "e"])
    assert radar.cells is None
    radar = radar.recorded(lambda name: file[name].double())
    assert torch.equal(radar.cells, file["va"].isfinite() | file["vb"].isfinite())
    assert not radar.within(torch.zeros(3, 1, H, W, dtype=torch.bool)).cells.any()
    order = torch.tensor([2, 0])
    nothing = Observation.none(2, VALID, torch.float64)
    rows = radar.select(order).rows(nothing, NORMALIZER, GRID)
    for row, name in zip(rows, ("va", "vb"), strict=True):
        assert torch.equal(row.present, file[name][order].isfinite())
        reading = row.forward(NORMALIZER.normalize(TRUTH)[order])
        torch.testing.assert_close(row.y[row.present], reading[row.present], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(row.sigma, (file["e"][order] / 2.0).double(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Radial(velocity=["a", "b"], bearing=["c"]), "bearing must name one variable for each"),
        (lambda: Radial(velocity=["a"], bearing=["c"], error=["d", "e"]), "error must name"),
        (lambda: Component("w"), "component must be"),
        (lambda: Footprint(4), "size must be odd"),
        (lambda: Radial([]), "sites must be"),
        (lambda: Footprint(7).measure(TRUTH, GRID), "size must be <= 6"),
    ],
)
def test_what_makes_no_sense_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_radar_reads_vectors_along_its_beams():
    """Their length is the speed along the beam, their direction the bearing; across it nothing is seen."""
    east = torch.arange(W, dtype=torch.float64) * 1000.0
    sensor = Radial(sites=[[-500.0, -700.0], [9000.0, 100.0]]).placed(east, torch.arange(H).double() * 2000.0, False)
    y = torch.where(VALID, TRUTH, torch.nan)
    readings = sensor.readings(y)
    assert list(readings) == ["seen from -500, -700", "seen from 9000, 100"]
    for read, bearing in zip(readings.values(), sensor.bearings, strict=True):
        along = torch.stack([torch.deg2rad(bearing).sin(), torch.deg2rad(bearing).cos()])
        torch.testing.assert_close((read * along).sum(1)[:, VALID], (TRUTH * along).sum(1)[:, VALID])
        across = read[:, 0] * along[1] - read[:, 1] * along[0]
        assert read[..., 2, 2].isnan().all() and across[:, VALID].abs().max() < 1e-12
    values = {"vr": torch.full((3, 1, H, W), 2.0), "head": torch.full((3, 1, H, W), 90.0)}
    values["vr"][:, :, 1] = torch.nan
    read = Radial(velocity=["vr"], bearing=["head"]).recorded(values.__getitem__).readings(y)["vr"]
    torch.testing.assert_close(read[0, :, 0, 0], torch.tensor([2.0, 0.0]).to(read), atol=1e-6, rtol=0)
    assert read[:, :, 1].isnan().all() and Component("u").readings(y) == {}
