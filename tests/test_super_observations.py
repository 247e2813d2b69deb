"""Super-observations: the dense posterior of all values, errors term by term, and from the command line."""

from __future__ import annotations

import math

import numpy as np
import pytest
import test_series_filled
import torch
import xarray as xr
from programs import FEW, is_message
from test_ellipses import condition, matrix, random_errors, source

from vecfield_diffusion.ellipses import blocks
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.super_observations import Thinning
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.accuracy import thinning

H, W = 9, 8
GRID = Grid(torch.ones(H, W, dtype=torch.bool), dx=1000.0, dy=-1500.0)
ERROR = random_errors(1, H, W)


def measured(seed: int = 0) -> torch.Tensor:
    """Values `(1, 2, H, W)`, a third of the cells without any, some with one component."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(1, 2, H, W, dtype=torch.float64, generator=generator)
    y[:, :, torch.rand(H, W, generator=generator) < 0.3] = math.nan
    y[0, 0, 4, 4], y[0, 1, 6, 2] = math.nan, math.nan
    return y


def correlation(size: tuple[int, int], length: float | None) -> torch.Tensor:
    """Of the errors of cells `(HW, HW)`: exp(-r / L) within a block, none between blocks."""
    row, column = (part.flatten() for part in torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"))
    away = torch.hypot(1500.0 * (row[:, None] - row), 1000.0 * (column[:, None] - column)).double()
    block = torch.stack([row // size[0], column // size[1]], dim=1)
    rho = torch.eye(H * W).double() if length is None else torch.exp(-away / length)
    return rho * (block[:, None] == block).all(-1)


def dense_errors(error: torch.Tensor, rho: torch.Tensor) -> torch.Tensor:
    """R of all values `(2HW, 2HW)` of errors `(1, 3, H, W)`: L_i L_j^T rho_ij."""
    u, v, across = error[0].flatten(1)
    lower = torch.cat([torch.cat([u.diag(), 0 * u.diag()], 1), torch.cat([across.diag(), v.diag()], 1)])
    return lower @ torch.block_diag(rho, rho) @ lower.T


def smooth(cells: float) -> torch.Tensor:
    """The covariance of values whose correlation is exp(-r^2 / (2 l^2)), l in cells; u and v belong together."""
    row, column = (part.flatten() for part in torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"))
    away = (row[:, None] - row).square() + (column[:, None] - column).square()
    return torch.kron(torch.tensor([[0.5, 0.2], [0.2, 0.4]]).double(), torch.exp(-away / (2 * cells**2)))


def posteriors(cells: float, y: torch.Tensor, error: torch.Tensor, how: Thinning) -> list[tuple[torch.Tensor, ...]]:
    """Mean and covariance of all values, given the super-observations and given every value."""
    rho = correlation(how.size(y[0].isfinite()), how.length)
    found = []
    for values, r in ((how.means(y, error), None), ((y, error), dense_errors(error, rho))):
        seen = values[0].isfinite()
        rows = torch.eye(2 * H * W).double()[seen.flatten()]
        noise = matrix(values[1], seen) if r is None else rows @ r @ rows.T
        found.append(condition(smooth(cells), values[0][seen], rows, noise))
    return found


def drawn(cells: float, error: torch.Tensor, length: float | None = None) -> torch.Tensor:
    """Values of such a field with such errors, correlated within blocks of 2x3 cells."""
    generator = torch.Generator().manual_seed(3)
    x, n = torch.randn(2, 2 * H * W, dtype=torch.float64, generator=generator)
    values, vectors = torch.linalg.eigh(smooth(cells))
    noise = torch.linalg.cholesky(dense_errors(error, correlation((2, 3), length)))
    y = (vectors * values.clamp(min=0).sqrt()) @ x + noise @ n
    return y.view(1, 2, H, W).masked_fill(measured().isnan(), math.nan)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_of_smooth_fields_the_posterior_is_that_of_every_value(channels: int) -> None:
    """It comes nearer as fields become smoother over a block, and is the same where they do not change at all."""
    error = torch.cat([ERROR[:, : min(channels, 2)].expand(1, 2, H, W), (channels == 3) * ERROR[:, 2:]], dim=1)
    apart, how = [], Thinning(GRID, side=3000.0)
    for cells in (20.0, 160.0, 1e6):
        y = drawn(cells, error)
        (mean, covariance), (wanted, dense) = posteriors(cells, y, error, how)
        apart.append((mean - wanted).abs().max().item())
        assert (mean - wanted).abs().max() < 0.5 * dense.diagonal().max().sqrt()
        torch.testing.assert_close(covariance, dense, rtol=0, atol=0.2 * dense.diagonal().max().item())
    assert apart[0] > 8 * apart[1] and apart[2] < 1e-12
    torch.testing.assert_close(covariance, dense, rtol=0, atol=1e-12)
    assert 2 * how.means(y, error)[0].isfinite().sum() < y.isfinite().sum()


def test_correlated_errors_are_those_of_the_mean() -> None:
    """Of errors that are nearly one in a block the mean knows all; without the length it would be too sure."""
    error = torch.full((1, 3, H, W), 0.2).double()
    error[:, 2] = 0.0
    y = drawn(1e6, error, 1e8)
    (mean, covariance), (wanted, dense) = posteriors(1e6, y, error, Thinning(GRID, side=3000.0, length=1e8))
    torch.testing.assert_close(mean, wanted, rtol=0, atol=1e-3)
    torch.testing.assert_close(covariance, dense, rtol=1e-3, atol=1e-6)
    sure = posteriors(1e6, y, error, Thinning(GRID, side=3000.0))[0][1]
    assert sure.trace() < 0.5 * dense.trace()
    # Of any others, the covariance of the weighted mean, term by term.
    how, y = Thinning(GRID, side=3000.0, length=2500.0), measured()
    _, found = how.means(y, ERROR)
    assert how.size(y[0].isfinite()) == (2, 3)
    seen = y.isfinite()
    block = torch.zeros_like(seen)
    block[..., 4:6, 3:6] = seen[..., 4:6, 3:6]
    rows = torch.eye(2 * H * W).double()[block.flatten()]
    both = torch.stack([(block.nonzero()[:, 1] == c).double() for c in (0, 1)], dim=1)
    weight = torch.linalg.inv(matrix(ERROR, block))
    p = torch.linalg.inv(both.T @ weight @ both)
    gain = p @ both.T @ weight
    wanted = gain @ rows @ dense_errors(ERROR, correlation((2, 3), 2500.0)) @ rows.T @ gain.T
    at = blocks(found)[0, :, 4:6, 3:6].flatten(1)
    u, v, across = at[:, at[0] > 0].flatten().tolist()
    assert [u, v, across] == pytest.approx([wanted[0, 0].item(), wanted[1, 1].item(), wanted[0, 1].item()], rel=1e-5)
    value = how.means(y, ERROR)[0][0, :, 4:6, 3:6].flatten(1)
    torch.testing.assert_close(value[:, value[0].isfinite()][:, 0], gain @ y[block], rtol=1e-9, atol=0)


def test_as_few_as_are_asked_for_in_cells_that_were_measured() -> None:
    y = torch.cat([measured(), measured(1)])
    y[1, :, 3:] = math.nan  # a snapshot of few values keeps smaller blocks
    for most in (100, 20, 12, 1):
        found, errors = Thinning(GRID, most=most).means(y, torch.full((1, 1, 1), 0.1, dtype=torch.float64))
        counts = found.isfinite().any(1).flatten(1).sum(1)
        assert (counts <= most).all() and (found.isfinite().any(1) <= y.isfinite().any(1)).all()
        assert counts[0] > most / 3 and (errors[..., :2, :, :] <= 0.1 + 1e-9).all()
    torch.testing.assert_close(
        Thinning(GRID, most=100).means(y, torch.full((1, 1, 1), 0.1, dtype=torch.float64))[0], y, equal_nan=True
    )


def test_from_the_command_line(place, run) -> None:
    """Of values on a grid with the spacing of their file, of points, and what is refused in one line."""
    data = source()
    data["u"][:, 4:9, 3:8] = data["v"][:, 4:9, 3:8] = np.nan
    data.to_netcdf(place / "radar.nc", engine="h5netcdf")
    common = ["ckpt=outputs/train/run", "magnitude=any", "time=0", *FEW]
    given = [*common, "input=radar.nc", "sigma_obs=[u_err,v_err,uv_covariance]"]
    code, out, err = run("infer", *given, "thin=90km", "error_scales=[60,12]", "name=thin")
    assert (code, err) == (0, ""), err
    assert "super-observations: 231 measured cells became 23; errors of 0.105 m s-1, taken as correlated over 60" in out
    with xr.open_dataset(place / "outputs/infer/thin/fields.nc") as found:
        assert int(found.observed.sum()) == 231 and int(found.u.notnull().sum()) == 256  # the hole is filled
    rng = np.random.default_rng(0)
    rows = "".join(f"{x:.3f},{y:.3f},{u:.3f},0,0.1\n" for x, y, u in rng.random((200, 3)) * [500, 500, 0.2])
    (place / "drifters.csv").write_text("x [km],y [km],u,v,error\n" + rows)
    code, out, err = run("infer", *common, "input=drifters.csv", "sigma_obs=error", "thin=20", "error_scales=[2,12]")
    assert (code, err) == (0, ""), err
    assert int(out.split("cells became ")[1].split(";")[0]) in range(8, 21)
    is_message(run("infer", *common, "input=radar.nc", "thin=90km"), "sigma_obs=0 keeps every value")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"thin": "3kg"}, "thin=3kg: expected the sides of the blocks, such as thin=20km"),
        ({"thin": 0}, "or how many means a snapshot has at most"),
        ({"error_scales": (60, 12)}, "error_scales: of values on a grid it needs thin="),
        ({"thin": 9, "sensor": {"_target_": "Footprint"}}, "leave sensor out"),
        ({"thin": 9, "error_scales": (0, 12)}, "error_scales must be a length and a time above 0"),
    ],
)
def test_what_is_refused(options, said) -> None:
    plain = {"thin": None, "error_scales": None, "sigma_obs": 0.1, "sensor": {}, "likelihood": "none"}
    with pytest.raises(UserError, match=said):
        thinning(plain | {"thermodynamics": False} | options, "radar.nc", GRID)


def test_without_a_network() -> None:
    """Statistics are those of all values; trial and filling are given the means."""
    options = test_series_filled.config(members=2, sigma_obs=0.2, thin="20km")
    job = test_series_filled.open_series(options, source=test_series_filled.series(30))
    series, noise = job._observed()
    y, variance = job._thinned(series, noise)
    assert np.isfinite(y).sum() < 0.5 * np.isfinite(series).sum()
    assert variance.shape[1] == 3 and np.nanmax(variance[:, :2][np.isfinite(y)]) <= 0.04 * (1 + 1e-6)
