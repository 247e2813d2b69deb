"""Products of ensembles against closed forms of Gaussian laws, of flows that are linear, and of counted members."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import GaussianConditional, GaussianPrior, gaussian_law
from programs import is_message
from scipy.special import ive, ndtr, ndtri

from vecfield_diffusion import commands
from vecfield_diffusion.config.ending import guarded
from vecfield_diffusion.diffusion.base import karras
from vecfield_diffusion.inference.products import Derivative, Direction, Exceedance, KineticEnergy, Quantiles
from vecfield_diffusion.inference.template import Ensemble, FileLayout, FilledTimes, Template
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import strain, vorticity
from vecfield_diffusion.programs.products import chosen_products
from vecfield_diffusion.samplers.deterministic import DPMpp2M

H, W = 5, 6
SEA = torch.ones(H, W, dtype=torch.bool)


def drawn(members: np.ndarray, units: str = "m s-1", names: tuple[str, str] = ("u", "v")) -> Ensemble:
    """An ensemble whose members `(M, T, 2, H, W)` are written as they are."""
    return Ensemble(members, members, names, units, ("eastward_sea_water_velocity", "northward_sea_water_velocity"))


def made(product: object, members: np.ndarray, **options: object) -> dict[str, np.ndarray]:
    return {variable.name: variable.values for variable in product.variables(drawn(members, **options))}


def one_cell(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Members `(M, 1, 2, 1, 1)` of one cell."""
    return np.stack([u, v], axis=1)[:, None, :, None, None]


def gaussian_points(count: int, mean: float, deviation: float) -> np.ndarray:
    """Points of equal weight of a normal law."""
    return mean + deviation * ndtri((np.arange(count) + 0.5) / count)


def test_quantiles_of_order_statistics() -> None:
    """Of 19 members at the probabilities k / 20 of a normal law, its quantiles, exactly; beyond, the outermost."""
    u = ndtri(np.arange(1, 20) / 20)
    found = made(Quantiles([0.01, 0.05, 0.25, 0.5, 0.95]), one_cell(u[::-1], 3 + 2 * u))
    expected = ndtri([0.05, 0.05, 0.25, 0.5, 0.95])
    np.testing.assert_allclose(found["u_quantiles"][:, 0, 0, 0], expected, atol=1e-12)
    np.testing.assert_allclose(found["v_quantiles"][:, 0, 0, 0], 3 + 2 * expected, atol=1e-12)
    still = made(Quantiles([0.25]), one_cell(0 * u, u))["speed_quantiles"]
    np.testing.assert_allclose(still[0, 0, 0, 0], np.sort(np.abs(u))[4], atol=1e-12)


@pytest.mark.parametrize(("bearing", "mean"), [(0, 0.3), (90, 0.4), (180, -0.3), (45, 0.7 / math.sqrt(2)), (-90, -0.4)])
def test_the_chance_towards_a_bearing_is_that_of_the_normal_law(bearing: int, mean: float) -> None:
    """u = 0.4 and v = 0.3 with independent errors of 0.2: their part in any direction has an error of 0.2."""
    points = gaussian_points(150, 0, 0.2)
    u, v = (part.ravel() for part in np.meshgrid(0.4 + points, 0.3 + points))
    what = f"towards_{bearing}"
    found = made(Exceedance({what: [0.1, 0.5]}), one_cell(u, v))[f"{what}_exceedance"]
    np.testing.assert_allclose(found[:, 0, 0, 0], ndtr((mean - np.array([0.1, 0.5])) / 0.2), atol=0.004)


def test_the_chance_of_speeds_is_that_of_rayleigh() -> None:
    points = gaussian_points(200, 0, 0.5)
    u, v = (part.ravel() for part in np.meshgrid(points, points))
    found = made(Exceedance({"speed": [0.3, 1.0], "v": [0.5]}), one_cell(u, v))
    np.testing.assert_allclose(found["speed_exceedance"][:, 0, 0, 0], np.exp([-0.18, -2.0]), atol=0.003)
    assert found["v_exceedance"][0, 0, 0, 0] == pytest.approx(ndtr(-1), abs=0.004)


@pytest.mark.parametrize("snr", [0.5, 2.0, 8.0])
def test_the_direction_of_a_gaussian_law(snr: float) -> None:
    """Its mean unit vector has the length sqrt(pi k / 2) exp(-k) (I0(k) + I1(k)), k = |mean|^2 / (4 variance)."""
    points, angle = gaussian_points(200, 0, 1.0), math.radians(30)
    along, across = (part.ravel() for part in np.meshgrid(snr + points, points))
    u = math.sin(angle) * along + math.cos(angle) * across
    v = math.cos(angle) * along - math.sin(angle) * across
    found = made(Direction(), one_cell(u, v))
    k = snr**2 / 4
    length = math.sqrt(math.pi * k / 2) * (ive(0, k) + ive(1, k))
    assert found["direction"].item() == pytest.approx(30, abs=1e-9)
    assert found["direction_std"].item() == pytest.approx(math.degrees(math.sqrt(-2 * math.log(length))), rel=0.005)


def test_directions_of_compass_and_of_still_water() -> None:
    towards = {0: (0, 1), 90: (1, 0), 180: (0, -1), 270: (-1, 0)}
    for degrees, (u, v) in towards.items():
        found = made(Direction(), one_cell(np.array([u, 2.0 * u]), np.array([v, 2.0 * v])))
        assert found["direction"].item() == pytest.approx(degrees) and found["direction_std"].item() == 0
    mixed = made(Direction(), one_cell(np.array([0.0, 1.0]), np.zeros(2)))  # one that does not move points nowhere
    assert mixed["direction"].item() == 90 and mixed["direction_std"].item() == pytest.approx(
        math.degrees(math.sqrt(2 * math.log(2)))
    )


def test_energy_has_the_expectation_of_the_law() -> None:
    """Over all draws of two members of u = 1 or 3, v = 2: mean part 4, eddies 1/2, as of the law itself."""
    draws = [one_cell(np.array([a, b]), np.full(2, 2.0)) for a in (1.0, 3.0) for b in (1.0, 3.0)]
    found = [made(KineticEnergy(), draw) for draw in draws]
    average = {name: np.mean([each[name] for each in found]) for name in found[0]}
    assert average == pytest.approx({"kinetic_energy": 4.5, "kinetic_energy_mean": 4.0, "kinetic_energy_eddy": 0.5})
    for each in found:
        total = each["kinetic_energy_mean"] + each["kinetic_energy_eddy"]
        np.testing.assert_allclose(each["kinetic_energy"], total, rtol=1e-14)
    single = made(KineticEnergy(), draws[0][:1])
    assert single["kinetic_energy"].item() == 2.5 and np.isnan(single["kinetic_energy_eddy"]).all()


def linear(a: float, b: float, c: float, d: float, grid: Grid) -> np.ndarray:
    """u = a x + b y, v = c x + d y on an even grid, `(2, H, W)`."""
    x, y = grid.dx[0].item() * np.arange(W), grid.dy[0].item() * np.arange(H)[:, None]
    return np.stack([a * x + b * y, c * x + d * y])


@pytest.mark.parametrize("dy", [3.0, -3.0])
def test_strain_and_vorticity_of_linear_flows_beside_land(dy: float) -> None:
    valid = SEA.clone()
    valid[2, 3] = False
    grid = Grid(valid, 2.0, dy)
    one, two = linear(0.1, 0.3, -0.2, 0.4, grid), linear(0.3, -0.1, 0.6, -0.1, grid)
    members = np.stack([one, one + two])[:, None]
    members[..., 2, 3] = np.nan
    turning, straining = made(Derivative("vorticity", grid), members), made(Derivative("strain", grid), members)
    inside = valid.numpy()
    np.testing.assert_allclose(turning["vorticity"][0][inside], -0.5 + 0.7 / 2, atol=1e-12)
    np.testing.assert_allclose(turning["vorticity_std"][0][inside], 0.7 / math.sqrt(2), atol=1e-12)
    first, second = math.hypot(-0.3, 0.1), math.hypot(0.4 - 0.3, 0.4 + 0.2)
    np.testing.assert_allclose(straining["strain"][0][inside], (first + second) / 2, atol=1e-12)
    np.testing.assert_allclose(straining["strain_std"][0][inside], abs(first - second) / math.sqrt(2), atol=1e-12)


def test_a_solid_rotation_of_the_sphere_has_no_strain() -> None:
    lat = torch.linspace(-50, 65, 24, dtype=torch.float64)
    grid = Grid.from_degrees(torch.arange(0, 40, 2.0), lat, torch.ones(24, 20, dtype=torch.bool))
    flow = torch.zeros(1, 2, 24, 20, dtype=torch.float64)
    flow[0, 0] = torch.cos(torch.deg2rad(lat))[:, None]  # of one metre per second at the equator
    assert strain(flow, grid).abs().max() < 1e-3 * vorticity(flow, grid).abs().max()
    shear = torch.zeros_like(flow)
    shear[0, 0] = (torch.arange(24, dtype=torch.float64) * grid.dy[0])[:, None] * 1e-6
    level = Grid(grid.valid, 1e5, grid.dy[0].item())
    torch.testing.assert_close(strain(shear, level), torch.full((1, 1, 24, 20), 1e-6).double())


def test_probabilities_are_reliable_on_gaussian_fields() -> None:
    """100 members of the law that the sampler draws given a quarter of the values of each of 4000 fields.

    Speeds above 1.2 happen as often as is said within 3 %, which members with seven tenths of the spread do not reach.
    """
    prior, steps, generator = GaussianPrior(4, 5), 32, torch.Generator().manual_seed(0)
    options = dict(dtype=torch.float64, generator=generator)
    seen, levels = torch.arange(prior.size) % 4 == 0, karras(0.002, 80.0, steps)
    truth = torch.randn(4000, prior.size, **options) * prior.eigenvalues.sqrt() @ prior.vectors.T
    y = truth[:, seen] + 0.3 * torch.randn(len(truth), int(seen.sum()), **options)
    mean, covariance = prior.posterior(seen, y.T, 0.3)
    mean, law = mean.T.reshape(-1, *prior.shape), GaussianConditional(torch.zeros_like(mean[:, 0]), covariance)
    law.eigenvalues = law.eigenvalues.clamp(min=0)
    centre = DPMpp2M(steps).sample(lambda z, s: mean + law(z - mean, s), levels, lambda: torch.zeros_like(mean))
    _, spread = gaussian_law(DPMpp2M(steps), law, levels, prior.shape)
    root = torch.linalg.cholesky(spread + 1e-9 * torch.eye(prior.size, dtype=torch.float64))
    white = torch.randn(100, len(truth), prior.size, **options)
    members = (centre.flatten(1) + white @ root.T).view(100, -1, *prior.shape)
    happened = (truth.view(-1, *prior.shape).norm(dim=1) > 1.2).numpy().ravel()

    def gaps(members: torch.Tensor) -> list[float]:
        chance = made(Exceedance({"speed": [1.2]}), members.numpy())["speed_exceedance"][0].ravel()
        bins = np.minimum((10 * chance).astype(int), 9)
        assert np.bincount(bins).min() > 1000
        return [abs(chance[bins == k].mean() - happened[bins == k].mean()) for k in range(10)]

    assert max(gaps(members)) < 0.03 < max(gaps(centre.view(1, -1, *prior.shape) + 0.7 * (members - members.mean(0))))


def test_the_truth_is_below_a_quantile_as_often_as_is_said() -> None:
    rng, levels = np.random.default_rng(0), [0.05, 0.5, 0.9]
    mean = rng.standard_normal((1, 1, 2, 200, 250))
    truth, members = (mean + 0.7 * rng.standard_normal((count, *mean.shape[1:])) for count in (1, 19))
    found = made(Quantiles(levels), members)["u_quantiles"][:, 0]
    np.testing.assert_allclose((truth[0, 0, 0] < found).mean(axis=(1, 2)), levels, atol=0.005)


# As they are asked for and written.


def products(*overrides: str, template: Template = Template()) -> list:  # noqa: B008
    config = commands.infer.config("ckpt=none", *overrides)
    return chosen_products(config, template, Grid(SEA), "m s-1")


def test_thresholds_have_units() -> None:
    feet = Template(component_attrs=({"units": "cm/s"}, {"units": "cm/s"}))
    (found,) = products("exceed={speed:[100,0.5 m/s],towards_45:1 knot,u:20}", template=feet)
    assert found.thresholds["speed"] == pytest.approx([50, 100])
    assert found.thresholds["towards_45"] == pytest.approx([51.444], rel=1e-4)
    axis, labels = found.axes("cm/s")["u_threshold"]
    assert axis.tolist() == [20] and labels["units"] == "cm/s"
    assert [type(each).__name__ for each in products("products=[energy,exceedance]", "exceed={u:1}")] == [
        "KineticEnergy",
        "Exceedance",
    ]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["products=[exceedance]"], ["needs thresholds", "exceed={speed:"]),
        (["exceed={spead:1}"], ["spead is none of speed, u, v and towards_<degrees>"]),
        (["exceed={towards_north:1}"], ["towards_north is none of"]),
        (["exceed={speed:1 apple}"], ["speed > 1 apple", "such as 50 cm/s"]),
        (["exceed={speed:fast}"], ["speed > fast", "a number in m s-1"]),
        (["exceed={speed:[]}"], ["speed has no threshold"]),
        (["products=[quantiles]", "quantiles=[0,0.5]"], ["between 0 and 1"]),
        (["products=[quantile]"], ["products=[quantile]"]),
    ],
)
def test_what_is_no_product(overrides: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = guarded(lambda: products(*overrides) and 0)
    is_message((code, *capsys.readouterr()), *parts)


def test_products_lie_beside_the_members() -> None:
    """On the axes of the output, NaN on land, with the coordinates of the mean."""
    valid = SEA.numpy().copy()
    valid[0] = False
    template = Template(extra_coords={"depth": ((), np.float64(3), {"units": "m"})})
    wanted = [*products("products=[quantiles,direction]", "quantiles=[0.5,0.9]"), *products("exceed={speed:0.1}")]
    layout = FileLayout(template, valid, 4, wanted)
    members = np.random.default_rng(0).standard_normal((4, 3, 2, H, W)).astype(np.float32)
    found = {each.name: each for each in layout.variables(FilledTimes([0, 1, 2], members, np.ones((3, H, W), bool)))}
    assert layout.dims(found["u_quantiles"]) == ("quantile", "time", "y", "x")
    assert found["speed_exceedance"].values.shape == (1, 3, H, W)
    assert layout.frame()["quantile"].values.tolist() == [0.5, 0.9]
    for name in ("speed_quantiles", "direction", "speed_exceedance"):
        values = found[name].values
        assert np.isnan(values[..., 0, :]).all() and np.isfinite(values[..., 1:, :]).all()
        assert values.dtype == np.float32 and found[name].attrs["coordinates"] == "depth ensemble"
