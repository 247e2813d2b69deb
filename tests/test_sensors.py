"""Sensors: what an instrument reads, and its rows, written out by hand in physical units."""

import math

import pytest
import torch

from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
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


def test_a_footprint_by_hand():
    """The mean of nine cells, across the periodic boundary, without the one on land."""
    got = Footprint(3).measure(TRUTH, GRID)
    near = [(i, j % W) for i in (1, 2, 3) for j in (0, 1, 2) if VALID[i, j % W]]
    expected = sum(TRUTH[:, :, i, j] for i, j in near) / len(near)
    torch.testing.assert_close(got[:, :, 2, 1], expected)
    near = [(i, j % W) for i in (3, 4) for j in (-1, 0, 1)]
    torch.testing.assert_close(got[:, :, 4, 0], sum(TRUTH[:, :, i, j] for i, j in near) / 6)


def test_bearings_by_hand():
    """Clockwise from north, away from the site; degrees shrink with latitude, rows may run southward."""
    radar = Radial([[0.0, 0.0]])
    radar.place(torch.tensor([-1e3, 0.0, 1e3]), torch.tensor([2e3, 1e3]), geographic=False)
    expected = [[-math.atan2(1, 2), 0.0, math.atan2(1, 2)], [-math.pi / 4, 0.0, math.pi / 4]]
    torch.testing.assert_close(radar.bearings[0], torch.rad2deg(torch.tensor(expected)))
    radar = Radial([[179.0, 60.0]])
    radar.place(torch.tensor([179.0, -179.0]).double(), torch.tensor([61.0, 60.0]).double(), geographic=True)
    east = 2 * math.cos(math.radians(61))
    expected = torch.tensor([[0.0, math.degrees(math.atan2(east, 1))], [0.0, 90.0]]).double()
    torch.testing.assert_close(radar.bearings[0], expected)


def test_radars_read_the_velocity_away_from_them():
    radar = Radial([[0.0, 0.0], [5000.0, 8000.0]])
    with pytest.raises(ValueError, match="sites must be placed"):
        radar.rows(given(TRUTH), NORMALIZER, GRID)
    x, y = torch.arange(W).double() * 1000 + 1, torch.arange(H).double() * 2000 + 1
    radar.place(x, y, geographic=False)
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
    observed = radar.load(lambda name: file[name].double())
    assert torch.equal(observed, file["va"].isfinite() | file["vb"].isfinite())
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
