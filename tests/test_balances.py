"""Balances as rows: operators written out by hand, posteriors beside dense ones, files from the command line."""

from __future__ import annotations

import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
from oracle import GaussianPrior
from programs import is_message

from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.balances import (
    GRAVITY,
    ROTATION,
    Balances,
    Surroundings,
    geostrophic,
    geostrophic_error,
    has_neighbour,
    transport,
)
from vecfield_diffusion.guidance.physics import NoPhysics, beside_walls
from vecfield_diffusion.guidance.posterior import MMPS
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import slope

PRIOR = GaussianPrior()
H, W = PRIOR.shape[1:]
VALID = torch.ones(H, W, dtype=torch.bool)
LAND = VALID.clone()
LAND[2, 3:5] = LAND[4, 0] = False
LAT = torch.linspace(40.0, 45.0, H, dtype=torch.float64)[:, None]
F = 2 * ROTATION * torch.deg2rad(LAT).sin()
STD = 0.3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grid(valid: torch.Tensor = LAND, x: str = "periodic", y: str = "periodic") -> Grid:
    return Grid(valid, torch.linspace(8000, 9000, H), 7000.0, x, y)


DEPTH = 100 + 50 * torch.rand(1, 1, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
HEIGHT = 0.1 * normal(2, 1, H, W, seed=4)


def around(
    lat: torch.Tensor | None = LAT, velocity: torch.Tensor | None = None, **variables: torch.Tensor
) -> Surroundings:
    given = {"depth": DEPTH, "height": HEIGHT, **variables}
    velocity = STD * normal(2, 2, H, W, seed=9) if velocity is None else velocity
    return Surroundings(grid(), lat, 1.0, lambda: velocity, lambda name: given[name])


def flux_by_hand(u: np.ndarray, v: np.ndarray, h: np.ndarray, domain: Grid) -> np.ndarray:
    """div(h u) / h of every wet cell, face by face, on a torus."""
    wet, dx, dy = domain.valid.numpy(), domain.dx.numpy(), domain.dy.numpy()
    out = np.zeros((H, W))
    for j, i in zip(*np.nonzero(wet), strict=True):
        for dj, di, part in ((0, 1, u), (0, -1, u), (1, 0, v), (-1, 0, v)):
            a, b = (j + dj) % H, (i + di) % W
            if not wet[a, b]:
                continue
            sign = di + dj
            if di:
                out[j, i] += sign * (h[j, i] * part[j, i] + h[a, b] * part[a, b]) / 2 / dx[j]
            else:
                # the width of a face is the mean of the widths of its rows, each with its own velocity
                out[j, i] += sign * (h[j, i] * part[j, i] * dx[j] + h[a, b] * part[a, b] * dx[a]) / 2 / (dx[j] * dy[j])
    return np.where(wet, out / h, 0.0)


def test_transport_is_the_sum_over_the_faces_of_a_cell() -> None:
    u, v = normal(2, H, W, seed=1)
    found = transport(DEPTH)(torch.stack([u, v])[None], grid())[0, 0]
    np.testing.assert_allclose(found, flux_by_hand(u.numpy(), v.numpy(), DEPTH[0, 0].numpy(), grid()), atol=1e-15)


def test_the_slope_of_a_plane_is_exact_up_to_the_coast() -> None:
    domain = grid(LAND, "open", "open")
    x = torch.arange(W).double() * 8000
    y = torch.arange(H).double()[:, None] * 7000
    domain = replace(domain, dx=torch.full((H,), 8000.0))
    found = slope((2e-5 * x + 3e-5 * y)[None, None], domain)[0]
    for part, steep, known in zip(found, (2e-5, 3e-5), has_neighbour(domain), strict=True):
        assert part[known].tolist() == pytest.approx([steep] * int(known.sum()), rel=1e-10)
    assert has_neighbour(domain).sum() == 2 * LAND.sum() - 1  # the cell below the island at the edge has none along y


def test_geostrophy_has_its_sign_and_its_size() -> None:
    """High on the right of the flow on the northern half of the globe; nothing where no neighbour has a height."""
    domain = Grid(torch.ones(9, 9, dtype=torch.bool), 1e4, 1e4)
    height = 1e-5 * 1e4 * torch.arange(9).double().expand(9, 9)  # rises by 1e-5 towards the east
    f = torch.tensor([[1e-4]], dtype=torch.float64)
    u, v = geostrophic(height[None, None], domain, f)[0]
    assert u.abs().max() < 1e-12
    torch.testing.assert_close(v, torch.full_like(v, GRAVITY * 1e-5 / 1e-4), rtol=1e-10, atol=0)
    gappy = height.clone()
    gappy[:, :4] = gappy[4, 5:] = gappy[:3, 4] = gappy[5:, 4] = math.nan
    found = geostrophic(gappy[None, None], domain, f)[0]
    assert found[:, :, :4].isnan().all() and found[:, 4, 5:].isnan().all()
    assert found[:, 4, 4].isnan().tolist() == [False, True]  # a neighbour along y alone
    torch.testing.assert_close(found[1, 3, 4:], v[3, 4:], rtol=1e-10, atol=0)
    torch.testing.assert_close(found[1, :4, 5:], v[:4, 5:], rtol=1e-10, atol=0)


@pytest.mark.parametrize(("x", "y"), [("periodic", "open"), ("open", "wall")])
def test_the_error_of_a_height_is_that_of_its_differences(x: str, y: str) -> None:
    """The diagonal of G S G^T, from the matrix of the operator."""
    domain, error = grid(LAND, x, y), 0.01 + 0.02 * torch.rand(1, 1, H, W, dtype=torch.float64)
    basis = torch.eye(H * W).double().view(-1, 1, H, W)
    matrix = geostrophic(basis, domain, F).flatten(1).T
    wanted = (matrix.square() @ error.flatten().square()).sqrt().view(2, H, W)
    found = geostrophic_error(error, torch.zeros(1, 1, H, W).double(), domain, F)[0]
    known = ~wanted.isnan()
    torch.testing.assert_close(found[known], wanted[known], rtol=1e-12, atol=0)
    assert known[:, LAND].float().mean() > 0.9


def dense_rows(name: str, domain: Grid, case: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L, l and tau of a balance, in physical units, written out: a row for each value."""
    basis = torch.eye(PRIOR.size).double().view(-1, 2, H, W)
    if name == "coast":
        beside = torch.zeros(2, H, W, dtype=torch.bool)
        for j, i in LAND.nonzero().tolist():
            beside[0, j, i] = not (LAND[j, (i + 1) % W] and LAND[j, i - 1])
            beside[1, j, i] = not (LAND[(j + 1) % H, i] and LAND[j - 1, i])
        rows = torch.eye(PRIOR.size).double()[beside.flatten()]
        return rows, torch.zeros(len(rows)).double(), torch.full((len(rows),), 0.05, dtype=torch.float64)
    if name == "transport":
        h = DEPTH[0, 0].numpy()
        images = [flux_by_hand(*part.numpy(), h, domain) for part in basis]
        rows = torch.from_numpy(np.stack(images, axis=-1)).flatten(0, 1)[LAND.flatten()]
        return rows, torch.zeros(len(rows)).double(), torch.full((len(rows),), 2e-6, dtype=torch.float64)
    target = geostrophic(HEIGHT[[case]], domain, F)[0]
    error = torch.full((1, 1, H, W), 0.02, dtype=torch.float64)
    tau = (0.1**2 + geostrophic_error(error, HEIGHT[[case]], domain, F)[0] ** 2).sqrt()
    known = target.isfinite() & LAND
    return torch.eye(PRIOR.size).double()[known.flatten()], target[known], tau[known]


ALL = {
    "coast": {"coast": 0.05},
    "transport": {"transport": 2e-6, "depth": "depth"},
    "geostrophy": {"geostrophy": 0.1, "height": "height", "height_error": 0.02},
}


@pytest.mark.parametrize("names", [["coast"], ["transport"], ["geostrophy"], list(ALL)], ids="-".join)
def test_the_posterior_with_balances_is_the_dense_one(names: list[str]) -> None:
    """Beside observations, from a prior with a mean field: two snapshots with heights of their own."""
    options = {key: value for name in names for key, value in ALL[name].items()}
    domain, normalizer = grid(), Normalizer(0.2 * normal(2, H, W, seed=5), STD).double()
    physics = Balances(**options).placed(around())
    if physics.varies:
        physics = physics.recorded(lambda name: HEIGHT, domain).select(torch.tensor([1, 0]))
    observed = (torch.rand(2, 1, H, W, generator=torch.Generator().manual_seed(1)) < 0.3) & LAND
    y, z, s = normal(2, 2, H, W, seed=6), normal(2, 2, H, W, seed=7), torch.tensor([0.4, 3.0], dtype=torch.float64)
    observation = Observation(y, observed, torch.full((2, 1, 1, 1), 0.2, dtype=torch.float64), LAND.expand(2, 1, H, W))
    rows = physics.rows(normalizer, domain)
    got = MMPS(k_max=400, tolerance=1e-13).bind(PRIOR.denoise, observation, rows)(z, s)
    identity, mean_field = torch.eye(PRIOR.size).double(), normalizer.mean.flatten()
    for i in range(2):
        gain = PRIOR.covariance @ torch.linalg.inv(PRIOR.covariance + s[i] ** 2 * identity)
        mean, covariance = gain @ z[i].flatten(), PRIOR.covariance - gain @ PRIOR.covariance
        seen = observed[i].expand(2, H, W)
        parts = [(identity[seen.flatten()], y[i][seen], torch.full((int(seen.sum()),), 0.2, dtype=torch.float64))]
        for name in names:
            matrix, target, tau = dense_rows(name, domain, 1 - i)
            parts.append((STD * matrix, target - matrix @ mean_field, tau))
        matrix, target, tau = (torch.cat(part) for part in zip(*parts, strict=True))
        white, given = matrix / tau[:, None], (target - matrix @ mean) / tau
        system = white @ covariance @ white.T + torch.eye(len(white)).double()
        exact = mean + covariance @ white.T @ torch.linalg.solve(system, given)
        torch.testing.assert_close(got[i].flatten(), exact, rtol=1e-7, atol=1e-7)


def test_tolerances_are_what_the_file_measures() -> None:
    """Root mean squares over what is known, of each balance by itself."""
    velocity = STD * normal(2, 2, H, W, seed=9)
    options = {"coast": "auto", "transport": "auto", "geostrophy": "auto", "depth": "depth", "height": "height"}
    found = {term.name: term.tau for term in Balances(**options).placed(around()).terms}
    coast = torch.cat([part[beside_walls(grid())] for part in velocity])
    divergence = torch.cat([transport(DEPTH)(part[None], grid())[0, 0][LAND] for part in velocity])
    off = velocity - geostrophic(HEIGHT, grid(), F)
    for name, values in (("coast", coast), ("transport", divergence), ("geostrophy", off[off.isfinite()])):
        assert found[name] == pytest.approx(values.square().mean().sqrt().item(), rel=1e-9), name
    # Cells that are not measured say nothing, and depths may be heights of the bottom.
    gappy = velocity.clone()
    gappy[:, :, :, :2] = math.nan
    few = {term.name: term for term in Balances(**options).placed(around(velocity=gappy, depth=-DEPTH)).terms}
    assert few["coast"].tau == pytest.approx(
        torch.cat([part[beside_walls(grid()) & part.isfinite()] for part in gappy]).square().mean().sqrt().item()
    )
    same = few["transport"].operator(velocity, grid())
    torch.testing.assert_close(same, transport(DEPTH)(velocity, grid()))


def test_tolerances_have_a_floor() -> None:
    """A flow that obeys to rounding has a hundredth of what unrelated velocities of its size give."""
    (term,) = Balances(geostrophy="auto", height="height").placed(around(velocity=geostrophic(HEIGHT, grid(), F))).terms
    size = geostrophic(HEIGHT, grid(), F)
    size = size[size.isfinite()].square().mean().sqrt().item()
    assert 0.008 * size < term.tau < 0.012 * size


@pytest.mark.parametrize(
    ("options", "surroundings", "said"),
    [
        (ALL["geostrophy"], {"lat": LAT - 42}, "no balance at latitude"),
        (ALL["geostrophy"], {"lat": None}, "Give physics.latitude="),
        (ALL["geostrophy"] | {"latitude": 3.0}, {}, "no balance at latitude 3"),
        (ALL["transport"], {"depth": DEPTH * math.nan}, "wet cells have no depth"),
        ({"coast": "auto"}, {"velocity": normal(1, 2, H, W) * math.nan}, "0 measured values have what it needs"),
    ],
)
def test_what_a_file_does_not_give_is_refused(options: dict, surroundings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Balances(**options).placed(around(**surroundings))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no balance is given: physics.coast, transport or geostrophy needs"),
        ({"coast": -1.0}, "coast must be > 0, auto or null"),
        ({"transport": 1e-6}, "depth must name the variable"),
        ({"geostrophy": 0.1}, "height must name the variable"),
        ({"geostrophy": 0.1, "height": "h", "height_error": -1.0}, "height_error must be >= 0"),
    ],
)
def test_what_is_no_balance(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Balances(**options)


def test_the_edge_of_what_was_measured_is_no_coast_where_land_is_known() -> None:
    land = ~LAND
    land[4, 0] = False  # sea that nothing measured
    velocity = STD * normal(2, 2, H, W, seed=9)
    (term,) = Balances(coast="auto").placed(replace(around(velocity=velocity), land=land)).terms
    beside = beside_walls(grid(~land)) & LAND
    assert torch.equal(term.where(grid()), beside) and beside.sum() < beside_walls(grid()).sum()
    assert term.tau == pytest.approx(velocity[:, beside].square().mean().sqrt().item())


def test_without_coasts_there_is_no_row_of_them() -> None:
    assert "no cell lies beside land" in Balances(coast=0.1).obstacle(grid(VALID))
    assert Balances(coast=0.1).obstacle(grid()) is None
    assert NoPhysics().varies is False
    with pytest.raises(UserError, match="for infer.py and evaluate.py"):
        Balances(coast=0.1).penalty(Normalizer(torch.zeros(2, H, W), 1.0), grid())


def test_from_the_command_line(place, run) -> None:
    """Velocities that obey a height are found where nothing was measured, on cells of another size than in training."""
    n = 16
    y, x = np.mgrid[:n, :n] * 2 * np.pi / n
    f = 2 * ROTATION * np.sin(np.deg2rad(45.0))
    psi = 0.2 * 2e5 / (2 * np.pi) * np.stack([np.sin(x) * np.cos(y), np.cos(x - y)])  # a stream function
    height = (f / GRAVITY * psi)[:, None].astype(np.float32)
    truth = geostrophic(torch.from_numpy(height).double(), Grid(torch.ones(n, n, dtype=torch.bool), 2e5 / n, 2e5 / n),
                        torch.tensor([[f]], dtype=torch.float64)).numpy()  # fmt: skip
    gappy = truth.copy()
    gappy[:, :, 4:12, 4:12] = np.nan
    write_hdf5(place / "sea.h5", gappy, dx=2e5 / n, dy=2e5 / n)
    with h5py.File(place / "sea.h5", "a") as file:
        file["context/height"] = height
        file["context/depth"] = np.full((1, n, n), 200.0, dtype=np.float32)
    common = [
        "ckpt=outputs/train/run",
        "input=sea.h5",
        "magnitude=any",
        "sigma_obs=0.02",
        "members=2",
        "sampler.steps=16",
    ]
    balances = ["physics=balances", "physics.geostrophy=0.01", "physics.height=height", "physics.latitude=45"]
    more = ["physics.transport=auto", "physics.depth=depth"]
    misses = {}
    for name, options in {"plain": ["inpainting=mmps"], "balanced": [*balances, *more]}.items():
        code, out, err = run("infer", *common, *options, f"name={name}")
        assert (code, err) == (0, ""), err
        with xr.open_dataset(place / "outputs/infer" / name / "fields.nc") as data:
            filled = np.stack([data.u.values, data.v.values], axis=1)
            misses[name] = np.abs(filled - truth)[:, :, 5:11, 5:11].mean()
    assert "geostrophy (tau 0.01)" in out and "transport (tau" in out
    assert misses["balanced"] < 0.3 * misses["plain"], misses
    is_message(run("infer", *common, *balances[:2], "physics.latitude=45"), "physics.height: must name the variable")
    is_message(run("infer", *common, *balances[:2], "physics.height=nothing"), "latitude")
    is_message(run("infer", *common, *balances, "inpainting=conditional"), "mmps or pigdm")
