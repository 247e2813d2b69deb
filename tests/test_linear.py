"""Linear observations against sums written out by hand, dense transposes, and each other."""

import math
from dataclasses import replace

import pytest
import torch
from oracle import physics_rows

from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.linear import LinearObservation, cells, footprint, radial, stack
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import divergence, vorticity

H, W = 5, 7
SIZE = 2 * H * W
WET = torch.ones(H, W, dtype=torch.bool)
LAND = WET.clone()
LAND[2, 3:5] = LAND[0, 0] = False


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some(share=0.5, seed=3):
    return torch.rand(1, 1, H, W, generator=torch.Generator().manual_seed(seed)) < share


def grid(valid=LAND, boundary_x="periodic", boundary_y="wall"):
    return Grid(valid, torch.linspace(1000, 2000, H), 1500.0, boundary_x, boundary_y)


def normalizer(std=0.4):
    return Normalizer(noise(2, H, W, seed=9), std).double()


def observation(n=1, valid=LAND):
    observed = some().expand(n, -1, -1, -1) & valid
    y = torch.where(observed, noise(n, 2, H, W), math.nan)
    return Observation(y, observed, torch.full((n, 1, 1, 1), 0.1).double(), valid.expand(n, 1, H, W))


def every():
    """One of each kind."""
    y, sigma = noise(1, 2, H, W), torch.tensor(0.1, dtype=torch.float64)
    made = {f"cells {c}": cells(observation(), c) for c in ("both", "u", "v")}
    made["radial"] = radial(90 * noise(H, W, seed=1), y[:, :1], sigma, some() & LAND)
    for x in ("periodic", "open"):
        made[f"footprint {x}"] = footprint(3, grid(boundary_x=x), y, sigma, some())
    made["divergence"] = physics_rows(grid(), normalizer(), 1e-4)
    made["both of physics"] = physics_rows(grid(boundary_y="open"), normalizer(), 1e-4, 2e-4, 1e-5, -1e-5)
    return made | {"stack": stack(list(made.values()))}


@pytest.mark.parametrize("name", every())
def test_gradient_is_the_transposed_matrix(name):
    rows = every()[name].flat()
    basis = torch.eye(SIZE, dtype=torch.float64).view(SIZE, 2, H, W)
    dense = rows.forward(basis).T
    x = noise(1, 2, H, W).requires_grad_()
    image, w = rows.forward(x), noise(*rows.y.shape, seed=4)
    (pulled,) = torch.autograd.grad(image, x, w)
    torch.testing.assert_close(image[0], dense @ x.flatten(), rtol=0, atol=1e-10)
    torch.testing.assert_close(pulled.flatten(), dense.T @ w[0], rtol=0, atol=1e-10)
    assert dense.abs().sum() > 0
    assert dense[~rows.present[0]].abs().max() == 0 and rows.y[~rows.present].abs().max() == 0


@pytest.mark.parametrize("name", every())
def test_whitened_rows_have_unit_errors(name):
    rows = every()[name].flat()
    white = rows.whitened()
    x = noise(1, 2, H, W)
    assert (white.sigma == 1).all()
    torch.testing.assert_close(white.forward(x) * rows.sigma, rows.forward(x))
    torch.testing.assert_close(white.y * rows.sigma, rows.y)


@pytest.mark.parametrize(("components", "kept"), [("both", (1, 1)), ("u", (1, 0)), ("v", (0, 1))])
def test_cells_are_the_measured_components(components, kept):
    given, x = observation(2), noise(2, 2, H, W, seed=5)
    rows = cells(given, components)
    assert torch.equal(rows.present, given.observed & torch.tensor(kept, dtype=torch.bool).view(1, 2, 1, 1))
    flat = rows.flat()
    expected = torch.where(rows.present, given.y - x, 0.0).flatten(1)
    assert torch.equal(flat.y - flat.forward(x), expected) and expected.isfinite().all()


def test_cells_may_have_components_that_were_measured_in_different_places():
    given = observation()
    mine = torch.cat([some(seed=6), some(seed=7)], dim=1)
    assert torch.equal(cells(replace(given, observed=mine)).present, mine & LAND)


def test_no_error_is_below_the_floor():
    given = replace(observation(), sigma_y=torch.tensor([0.0, 0.3]).view(2, 1, 1, 1))
    assert cells(given).sigma.flatten().tolist() == pytest.approx([0.01, 0.3])
    y, zero = noise(1, 2, H, W), torch.zeros(())
    assert radial(noise(H, W), y[:, :1], zero, some()).sigma == pytest.approx(0.01)
    assert footprint(3, grid(), y, zero, some()).sigma == pytest.approx(0.01)


@pytest.mark.parametrize(("bearing", "expected"), [(0, 2.0), (90, 3.0), (180, -2.0), (270, -3.0), (30, 1.5 + 3**0.5)])
def test_radial_velocities_are_along_bearings_clockwise_from_north(bearing, expected):
    x = torch.stack([torch.full((H, W), 3.0), torch.full((H, W), 2.0)])[None].double()
    angle = torch.full((H, W), float(bearing), dtype=torch.float64)
    rows = radial(angle, x[:, :1], torch.tensor(0.1).double(), WET[None, None])
    torch.testing.assert_close(rows.forward(x), torch.full((1, 1, H, W), expected, dtype=torch.float64))


def test_a_bearing_is_not_needed_where_nothing_was_measured():
    seen = some()
    angle = torch.where(seen, noise(1, 1, H, W), math.nan)
    rows = radial(angle, torch.where(seen, 1.0, math.nan).double(), torch.tensor(0.1).double(), seen).flat()
    x = noise(1, 2, H, W).requires_grad_()
    (gradient,) = torch.autograd.grad(rows.forward(x).sum(), x)
    assert gradient.isfinite().all() and rows.y.isfinite().all()


@pytest.mark.parametrize("boundary_x", ["periodic", "wall"])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_footprints_are_means_over_wet_cells(boundary_x, size):
    """By loops. A centre on land has a footprint where a wet cell lies within it."""
    domain, x = grid(boundary_x=boundary_x), noise(1, 2, H, W)
    dirty = torch.where(LAND, x, math.nan)
    rows = footprint(size, domain, x, torch.tensor(0.1).double(), WET[None, None])
    found, half = rows.forward(dirty), size // 2
    for i in range(H):
        for j in range(W):
            near = [(i + a, j + b) for a in range(-half, half + 1) for b in range(-half, half + 1)]
            if boundary_x == "periodic":
                near = [(a, b % W) for a, b in near]
            wet = [(a, b) for a, b in near if 0 <= a < H and 0 <= b < W and LAND[a, b]]
            assert rows.present[0, 0, i, j] == bool(wet)
            if wet:
                mean = torch.stack([x[0, :, a, b] for a, b in wet]).mean(dim=0)
                torch.testing.assert_close(found[0, :, i, j], mean)


@pytest.mark.parametrize(("tau_div", "tau_curl"), [(1e-4, None), (1e-4, 3e-4), (None, 3e-4)])
def test_physics_rows_ask_for_the_target_in_physical_units(tau_div, tau_curl):
    """y - A x is what the field of x lacks to its targets, in tolerances; nothing is asked of land."""
    x, scale, target = noise(1, 2, H, W, seed=5), normalizer(), 1e-4 * noise(H, W, seed=6)
    rows = physics_rows(grid(), scale, tau_div, tau_curl, 2e-5, target).flat()
    velocity = scale.denormalize(x)
    lacks = []
    if tau_div is not None:
        lacks.append((2e-5 - divergence(velocity, grid())) / tau_div)
    if tau_curl is not None:
        lacks.append((target - vorticity(velocity, grid())) / tau_curl)
    expected = torch.where(LAND, torch.cat(lacks, dim=1), 0.0).flatten(1)
    torch.testing.assert_close(rows.y - rows.forward(x), expected, rtol=1e-9, atol=1e-12)
    assert (rows.sigma == 1).all()
    assert torch.equal(rows.present.view(-1, H, W), LAND.expand(len(lacks), H, W))


def test_a_stack_is_its_parts_for_every_sample():
    first, second = cells(observation(3)), physics_rows(grid(), normalizer(), 1e-4)
    both, x = stack([first, second]), noise(3, 2, H, W, seed=5)
    parts = [first.flat(), second.flat()]
    assert both.y.shape == both.sigma.shape == both.present.shape == (3, 2 * H * W + H * W)
    torch.testing.assert_close(both.forward(x), torch.cat([each.forward(x) for each in parts], dim=1))
    torch.testing.assert_close(both.y, torch.cat([parts[0].y, parts[1].y.expand(3, -1)], dim=1))
    assert torch.equal(both.present[:, -H * W :], LAND.flatten().expand(3, -1))


def test_nan_in_absent_rows_counts_nowhere():
    absent = ~some()
    y, sigma = (torch.where(absent, math.nan, value) for value in (noise(1, 2, H, W), torch.tensor(0.1).double()))
    rows = LinearObservation(lambda x: torch.where(absent, math.nan, 1.0) * x, y, sigma, ~absent)
    flat = rows.flat().whitened()
    assert flat.y.isfinite().all() and flat.forward(noise(1, 2, H, W)).isfinite().all()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: cells(observation(), "w"), "components must be both, u or v, got 'w'"),
        (
            lambda: footprint(2, grid(), noise(1, 2, H, W), torch.tensor(1.0), some()),
            "size must be odd and >= 1, got 2",
        ),
        (lambda: footprint(9, grid(), noise(1, 2, H, W), torch.tensor(1.0), some()), "size must be <= 7"),
    ],
)
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
