"""Errors of u and v that belong together: the posterior with 2x2 blocks in R against dense ones, and from a file on."""

from __future__ import annotations

import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import test_baselines
import test_gaussian
import test_product_modes
import test_spacetime
import torch
import xarray as xr
from oracle import GaussianPrior
from programs import FEW, is_message

from vecfield_diffusion.data.draws import seeded
from vecfield_diffusion.data.masks import Full
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.ellipses import (
    at_least,
    axes,
    back,
    blocks,
    correlated,
    deviations,
    geometry,
    is_known,
    root,
    turned,
)
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.baselines import OptimalInterpolation
from vecfield_diffusion.evaluation.interpolation import Interpolation, drawn
from vecfield_diffusion.guidance.averaging import image
from vecfield_diffusion.guidance.linear import cells
from vecfield_diffusion.guidance.posterior import MMPS
from vecfield_diffusion.inference.cases import make_cases
from vecfield_diffusion.models.reference import GaussianReference
from vecfield_diffusion.models.symmetry import GENERATORS
from vecfield_diffusion.programs.accuracy import errors


def random_errors(*shape: int, seed: int = 5) -> torch.Tensor:
    """Roots `(..., 3, H, W)` of covariances of any direction, up to six times as long as broad."""
    lead, cells = shape[:-2], shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.rand(*lead, 1, *cells, dtype=torch.float64, generator=generator)
    lengths = 0.1 + 0.5 * torch.rand(*lead, 2, *cells, dtype=torch.float64, generator=generator)
    large, small = lengths.square().split(1, dim=-3)
    c, s = angle.cos(), angle.sin()
    return root(c**2 * large + s**2 * small, s**2 * large + c**2 * small, c * s * (large - small))


def matrix(error: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """R of the values `seen (..., 2, H, W)`, in their order, of errors `(..., C, H, W)`: entry by entry."""
    block, places = blocks(error), seen.nonzero().tolist()
    entries = {(0, 0): 0, (1, 1): min(1, block.shape[-3] - 1), (0, 1): 2, (1, 0): 2}
    out = torch.zeros(len(places), len(places), dtype=torch.float64)
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            if a[:-3] + a[-2:] == b[:-3] + b[-2:] and (entry := entries[a[-3], b[-3]]) < block.shape[-3]:
                out[i, j] = block[(*a[:-3], entry, *a[-2:])]
    return out


def condition(
    prior: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    gain = prior @ rows.T @ torch.linalg.inv(rows @ prior @ rows.T + noise)
    return gain @ y, prior - gain @ rows @ prior


def test_the_root_the_block_and_the_axes_are_one_covariance() -> None:
    error = random_errors(50, 3, 4)
    u, v, both = blocks(error).unbind(-3)
    assert (both.square() < u * v).all() and (both.abs() > 0.01).any()
    torch.testing.assert_close(root(*blocks(error).split(1, dim=-3)), error, rtol=1e-12, atol=1e-14)
    angle, lengths = axes(error)
    r = torch.stack([torch.stack([u, both], -1), torch.stack([both, v], -1)], -2)
    values, vectors = torch.linalg.eigh(r)
    torch.testing.assert_close(lengths.square().movedim(-3, -1).flip(-1), values, rtol=1e-11, atol=0)
    first = torch.cat([angle.cos(), angle.sin()], dim=-3).movedim(-3, -1)
    torch.testing.assert_close((first * vectors[..., 1]).sum(-1).abs(), torch.ones_like(u), rtol=1e-11, atol=0)
    white = torch.randn(50, 2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(back(turned(white, angle), angle), white, rtol=1e-13, atol=1e-14)
    flat = axes(at_least(error, 0.3))[1]
    torch.testing.assert_close(flat, lengths.clamp(min=0.3), rtol=1e-10, atol=0)
    for simple in (error[:, :1], error[:, :2]):
        assert axes(simple)[0] is None and torch.equal(deviations(simple), simple)


def test_noise_has_the_covariance() -> None:
    """L of unit vectors, so that no sample is drawn."""
    error = random_errors(1, 2, 3)
    images = [correlated(error, unit.view(1, 2, 1, 1).expand(1, 2, 2, 3)) for unit in torch.eye(2).double()]
    u, v, both = blocks(error).unbind(-3)
    for a, b, wanted in ((0, 0, u), (1, 1, v), (0, 1, both)):
        torch.testing.assert_close(sum(part[:, a] * part[:, b] for part in images), wanted, rtol=1e-12, atol=1e-15)
    noise = blocks(error).numpy()
    seen = np.ones((1, 2, 2, 3), dtype=bool)
    for unit, wanted in zip(np.eye(2), images, strict=True):
        white = np.broadcast_to(unit[None, :, None, None], seen.shape).copy()
        np.testing.assert_allclose(drawn(noise, seen, white), wanted.numpy(), rtol=1e-12)


def test_what_is_not_known_of_one_component_leaves_the_other() -> None:
    u, v, both = (torch.full((1, 1, 1), value) for value in (0.04, 0.09, 0.01))
    nan = torch.full_like(u, math.nan)
    assert is_known(root(u, v, both)).flatten().tolist() == [True, True]
    assert is_known(root(nan, v, nan)).flatten().tolist() == [False, True]
    assert deviations(root(nan, v, nan))[1].item() == pytest.approx(0.3)
    assert is_known(root(u, nan, nan)).flatten().tolist() == [True, False]
    assert not is_known(root(u, v, 0 * u + 0.07)).all()  # no covariance


@pytest.mark.parametrize("kind", ["waves", "eigenfields"])
@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "members"])
def test_the_gaussian_part_of_snapshots_has_the_dense_posterior(kind, channels, shared, monkeypatch) -> None:
    field, covariance, valid = test_gaussian.fields(monkeypatch)[kind]
    z, y, observed, _, domain = test_gaussian.data(valid)
    error = random_errors(3, test_gaussian.H, test_gaussian.W)[:, :channels]
    if shared:
        observed, error, y = observed[[1, 0, 1]], error[[1, 0, 1]], y[[1, 0, 1]]
    error = torch.where(observed, error, 0.0)
    identity = torch.eye(test_gaussian.D, dtype=torch.float64)
    for s in test_gaussian.LEVELS:
        mean, variance = field(z, torch.full((3,), s, dtype=torch.float64), y, observed, error, domain)
        for i in range(3):
            seen = observed[i].expand(2, -1, -1)
            noise = torch.block_diag(s**2 * identity, matrix(error[i], seen))
            rows = torch.cat([identity, identity[seen.flatten()]])
            exact, spread = condition(covariance, torch.cat([z[i].flatten(), y[i][seen]]), rows, noise)
            torch.testing.assert_close(mean[i].flatten(), exact, rtol=1e-9, atol=1e-9)
            rounding = 0.03 if kind == "waves" else 1e-9
            torch.testing.assert_close(variance[i], spread.trace() / (2 * valid.sum()), rtol=rounding, atol=0.0)


@pytest.mark.parametrize("kind", test_product_modes.PRIORS)
@pytest.mark.parametrize("channels", [2, 3])
def test_the_gaussian_part_of_sequences_has_the_dense_posterior(kind, channels, monkeypatch) -> None:
    for name, value in (("LEFT_OUT", 0.0), ("POINTS", 10**6)):
        monkeypatch.setattr(test_product_modes.ProductModes, name, value)
    prior, frames = test_product_modes.PRIORS[kind], test_spacetime.T
    field = test_product_modes.product_modes(prior, frames)
    z, y, observed, _, domain = test_product_modes.data(prior.valid)
    error = torch.where(observed, random_errors(3, frames, test_spacetime.H, test_spacetime.W)[..., :channels, :, :], 0)
    covariance = torch.from_numpy(test_spacetime.dense(prior, frames))
    middle, identity = torch.from_numpy(prior.mean).expand_as(z[0]).flatten(), torch.eye(z[0].numel()).double()
    for s in test_product_modes.LEVELS:
        mean, variance = field(z, test_product_modes.levels(s), y, observed, error, domain)
        for i in range(3):
            inside, seen = domain[i].expand_as(z[i]).flatten(), observed[i].expand_as(z[i])
            rows = torch.cat([identity[inside], identity[seen.flatten()]])
            noise = torch.block_diag(s**2 * torch.eye(int(inside.sum())).double(), matrix(error[i], seen))
            given = torch.cat([z[i].flatten()[inside], y[i][seen]]) - rows @ middle
            exact, spread = condition(covariance, given, rows, noise)
            torch.testing.assert_close(mean[i].flatten()[inside], (middle + exact)[inside], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(variance[i], spread.diagonal()[inside].mean(), rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("prior", test_spacetime.fields(), ids=["land", "travelling", "components"])
def test_interpolation_of_a_series_is_the_dense_posterior(prior) -> None:
    """`ckpt=none` and the baseline of series: mean, variance, and members by their own law."""
    series, _ = test_spacetime.gappy(prior)
    error = random_errors(len(series), test_spacetime.H, test_spacetime.W)
    series[1, 0, 2, 2] = np.nan  # a single component
    noise = blocks(error).numpy()
    seen = torch.from_numpy(np.isfinite(series) & prior.valid)
    identity = torch.eye(series.size).double()
    rows, middle = (
        identity[seen.flatten()],
        torch.from_numpy(np.broadcast_to(prior.mean, series.shape).copy()).flatten(),
    )
    y = torch.from_numpy(series)[seen] - rows @ middle
    exact, spread = condition(torch.from_numpy(test_spacetime.dense(prior)), y, rows, matrix(error, seen))
    found = Interpolation(prior, before=9, after=9, block=2).fill(series, noise, with_variance=True)
    inside = np.broadcast_to(prior.valid, series.shape)
    np.testing.assert_allclose(found.mean[inside], (middle + exact).view(series.shape).numpy()[inside], atol=1e-9)
    np.testing.assert_allclose(found.variance[inside], spread.diagonal().view(series.shape).numpy()[inside], atol=1e-9)


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("kind", ["homogeneous", "pca"])
def test_optimal_interpolation_of_snapshots_is_the_dense_posterior(kind, channels) -> None:
    grid = test_baselines.domain("periodic", "periodic")
    train, field = test_baselines.smooth_fields(60, grid), test_baselines.smooth_fields(1, grid, seed=9)[0]
    method = OptimalInterpolation(kind, nugget=1e-4).fit(train, grid)
    observed, shape = test_baselines.pixels(0.4), grid.shape
    error = 0.1 * random_errors(*shape)[:channels]
    seen = torch.from_numpy(np.broadcast_to(observed, (2, *shape)).copy())
    prior = torch.from_numpy(test_baselines.dense(method.covariance))
    rows, anomaly = torch.eye(len(prior)).double()[seen.flatten()], torch.from_numpy(field - method.mean)
    exact, spread = condition(prior, anomaly[seen], rows, matrix(error, seen))
    sigma = np.where(observed, error.numpy(), np.nan)
    mean, std = method.posterior(field, observed, sigma)
    np.testing.assert_allclose((mean - method.mean).ravel(), exact.numpy(), atol=1e-8)
    np.testing.assert_allclose((std**2).ravel(), spread.diagonal().numpy(), atol=1e-8)
    np.testing.assert_allclose(
        method.fill(field, observed, np.where(observed, error.numpy(), np.nan)), mean, atol=1e-12
    )


@pytest.mark.parametrize("channels", [2, 3])
def test_mmps_on_the_prior_is_the_dense_posterior(channels) -> None:
    """Cells, some with one component alone, whose error is then its own."""
    prior = GaussianPrior()
    shape, generator = prior.shape[1:], torch.Generator().manual_seed(0)
    observed = torch.rand(2, 1, *shape, generator=generator) < 0.3
    single = (torch.rand(2, 2, *shape, generator=generator) < 0.2) & ~observed
    single &= ~single.all(dim=1, keepdim=True)
    y, z = (torch.randn(2, *prior.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    error = random_errors(2, *shape)[:, :channels]
    valid = torch.ones(2, 1, *shape, dtype=torch.bool)
    known = observed | single
    observation = Observation(torch.where(known, y, math.nan), observed, error, valid, single=single)
    s, identity = torch.tensor([0.3, 2.0], dtype=torch.float64), torch.eye(prior.size).double()
    got = MMPS(k_max=200, tolerance=1e-12).bind(prior.denoise, observation)(z, s)
    for i in range(2):
        gain = prior.covariance @ torch.linalg.inv(prior.covariance + s[i] ** 2 * identity)
        mean, covariance = gain @ z[i].flatten(), prior.covariance - gain @ prior.covariance
        rows = identity[known[i].flatten()]
        step, _ = condition(covariance, y[i][known[i]] - rows @ mean, rows, matrix(error[i], known[i]))
        torch.testing.assert_close(got[i].flatten(), mean + step, rtol=1e-7, atol=1e-7)


def test_symmetric_images_turn_the_ellipse() -> None:
    """Rows of an image are the image of rows: |y - A x| / sigma is the same for all."""
    shape = (4, 4)
    observed = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(1)) < 0.6
    x, y = torch.randn(2, 1, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    observation = Observation(y, observed, random_errors(1, *shape), torch.ones_like(observed))

    def misfit(observation, x):
        rows = cells(observation).flat().whitened()
        return (rows.y - rows.forward(x)).square().sum()

    for g in GENERATORS.values():
        torch.testing.assert_close(misfit(image(observation, g), g.act(x)), misfit(observation, x), rtol=1e-12, atol=0)


def test_draws_of_the_reference_have_the_errors(monkeypatch) -> None:
    """The gain of the errors' noise is that of y, times L."""
    field, _, valid = test_gaussian.fields(monkeypatch)["waves"]
    _, y, observed, _, domain = test_gaussian.data(valid, 1)
    error = torch.where(observed, random_errors(1, test_gaussian.H, test_gaussian.W), 0.0)
    reference = GaussianReference(field, y, observed, error, domain)
    zero, white = torch.zeros_like(y), torch.randn(y.shape, dtype=torch.float64)
    draws = iter([zero, zero, white])
    given = torch.where(observed, correlated(error, white), 0.0)
    mean = GaussianReference(field, given, observed, error, domain).centre(zero)
    torch.testing.assert_close(reference.draw(lambda: next(draws)), -mean, rtol=1e-10, atol=1e-12)


def test_geometry_is_the_covariance_of_least_squares() -> None:
    bearings = torch.tensor([10.0, 70.0, 130.0])[:, None, None]
    beams = torch.stack([torch.deg2rad(bearings).sin(), torch.deg2rad(bearings).cos()], -1)[:, 0, 0].double()
    wanted = 0.08**2 * torch.linalg.inv(beams.T @ beams)
    u, v, both = blocks(geometry(bearings, 0.08)).flatten().tolist()
    assert [u, v, both] == pytest.approx([wanted[0, 0].item(), wanted[1, 1].item(), wanted[0, 1].item()], abs=1e-9)
    # At right angles the errors are those of the radials, and along one line nothing is known across it.
    assert blocks(geometry(torch.tensor([0.0, 90.0])[:, None, None], 0.1)).flatten().tolist() == pytest.approx(
        [0.01, 0.01, 0.0]
    )
    assert not is_known(geometry(torch.tensor([30.0, 210.0])[:, None, None], 0.1)).any()


T, H, W = 3, 16, 16


def source(**changes) -> xr.Dataset:
    rng = np.random.default_rng(0)
    dims, shape = ("time", "lat", "lon"), (T, H, W)
    std = 0.05 + 0.1 * rng.random((2, *shape))
    data = {
        "u": (dims, 0.2 * rng.standard_normal(shape), {"units": "m s-1"}),
        "v": (dims, 0.2 * rng.standard_normal(shape), {"units": "m s-1"}),
        "u_err": (dims, std[0], {"units": "m s-1"}),
        "v_err": (dims, std[1], {"units": "m s-1"}),
        "uv_covariance": (dims, 0.6 * std[0] * std[1], {"units": "m2 s-2"}),
    }
    coords = {"time": np.arange(T), "lat": np.linspace(36, 40, H), "lon": np.linspace(284, 288, W)}
    return xr.Dataset(data, coords).assign(changes)


def changed(name: str, scale: float, units: str) -> dict[str, tuple]:
    given = source()[name]
    return {name: (given.dims, scale * given.values, {"units": units})}


NAMES = ["u_err", "v_err", "uv_covariance"]


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        (changed("u_err", 100, "cm/s") | changed("uv_covariance", 1e4, "cm2 s-2"), {}),
        ({"uv_covariance": (("time", "lat", "lon"), np.full((T, H, W), 0.6), {"units": "1"})}, {}),
        ({k: v for name in NAMES[:2] for k, v in changed(name, 10, "1").items()} | changed("uv_covariance", 100, "1"),
         {"sigma_scale": 0.1}),
        ({name: (("time", "lat", "lon"), source()[name].values ** power / 0.042, {"units": "1"})
          for name, power in zip(NAMES, (2, 2, 1), strict=True)}, {"sigma_scale": "420 cm2 s-2"}),
    ],
    ids=["as it is", "units", "correlation", "dilution", "normalised variances"],
)  # fmt: skip
def test_errors_of_a_file_in_any_of_its_forms(changes, options) -> None:
    fields = open_fields(source(**changes))
    found = errors({"sigma_obs": NAMES, **options}, fields, [0, 2])
    plain = source().isel(time=[0, 2])
    wanted = torch.tensor(np.stack([plain.u_err.values**2, plain.v_err.values**2, plain.uv_covariance.values], axis=1))
    torch.testing.assert_close(blocks(found).double(), wanted, rtol=1e-5, atol=1e-8)
    # A block that is missing leaves a cell unobserved; added errors have the covariance of the file.
    cases = make_cases(fields, [0, 2], Full(), seed=0, sigma_obs=found, add_error=True)
    white = torch.stack([torch.randn(2, H, W, generator=seeded(0, number, 1)) for number in (0, 2)])
    torch.testing.assert_close(cases.y, cases.truth + correlated(found, white))


def test_radars_make_the_same_ellipses_at_all_times() -> None:
    """One number for all cases, which then stand for themselves; of a variable each its own."""
    fields, sites = open_fields(source()), [[283.5, 36.0], [283.5, 40.0]]
    one = errors({"sigma_obs": 0.08, "radars": sites}, fields, [0, 2])
    assert one.shape == (2, 3, H, W) and torch.equal(one[0], one[1])
    cases = make_cases(fields, [0, 2], Full(), seed=0, sigma_obs=one)
    assert torch.equal(cases[[1]].sigma_obs, one[1:])
    each = errors({"sigma_obs": "u_err", "radars": sites}, fields, [0, 2])
    ratio = torch.tensor(source().u_err.isel(time=[0, 2]).values)[:, None].float() / 0.08
    torch.testing.assert_close(each, ratio * one, rtol=1e-5, atol=1e-8)


def test_errors_turn_with_the_components() -> None:
    """On a grid whose axes are turned, those of east and north become those of its axes."""
    fields = replace(open_fields(source()), turn=np.full((H, W), 0.4))
    found = blocks(errors({"sigma_obs": NAMES}, fields, [0])).double()[0]
    plain = blocks(errors({"sigma_obs": NAMES}, open_fields(source()), [0])).double()[0]
    c, s = math.cos(0.4), math.sin(0.4)
    q = torch.tensor([[c, s], [-s, c]]).double()
    r = torch.stack([torch.stack([plain[0], plain[2]]), torch.stack([plain[2], plain[1]])])
    turned_r = torch.einsum("ab,bchw,dc->adhw", q, r, q)
    wanted = torch.stack([turned_r[0, 0], turned_r[1, 1], turned_r[0, 1]])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (
            {"sigma_obs": NAMES},
            changed("uv_covariance", 2.0, "m2 s-2"),
            "correlation of 1.2: expected a positive cov",
        ),
        ({"sigma_obs": NAMES}, changed("uv_covariance", 1.0, "kg"), "has units 'kg'. Expected a covariance"),
        ({"sigma_obs": NAMES[:2]}, changed("u_err", 1.0, "1"), "a pure number needs sigma_scale="),
        ({"sigma_obs": [*NAMES, "u"]}, {}, "or these and one for what both have in common"),
        ({"sigma_obs": 0.1, "sigma_scale": 2.0}, {}, "sigma_scale is for variables"),
        ({"sigma_obs": NAMES, "sigma_scale": "3 kg"}, {}, "sigma_scale=3 kg: expected a number"),
        ({"sigma_obs": NAMES, "sigma_scale": -1.0}, {}, "expected a number above 0"),
        ({"sigma_obs": 0.1, "radars": [[284.0, 36.0]]}, {}, "expected the positions of two or more"),
        ({"sigma_obs": 0.0, "radars": [[284.0, 36.0], [288.0, 36.0]]}, {}, "it is the error of a radial velocity"),
    ],
)
def test_what_is_no_error_is_refused(config, changes, said) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace("[", r"\[")):
        errors(config, open_fields(source(**changes)), [0])


def test_from_the_command_line(place, run) -> None:
    """A file, native or not, filled with the ellipses of its errors; one that is none ends with one line."""
    data = source()
    data["u"][:, 4:9, 3:8] = np.nan
    data.to_netcdf(place / "radar.nc", engine="h5netcdf")
    given = {name: data[name].values for name in NAMES}
    write_hdf5(place / "radar.h5", np.stack([data.u, data.v], axis=1), dx=2e4, dy=2e4)
    with h5py.File(place / "radar.h5", "a") as file:
        for name, values in given.items():
            file[f"context/{name}"] = values[:, None].astype(np.float32)
    common = ["ckpt=outputs/train/run", "magnitude=any", "inpainting=mmps", "time=0", *FEW]
    filled = {}
    for name, options in {
        "file": ["input=radar.nc", f"sigma_obs=[{','.join(NAMES)}]"],
        "native": ["input=radar.h5", f"sigma_obs=[{','.join(NAMES)}]"],
        "apart": ["input=radar.nc", "sigma_obs=[u_err,v_err]"],
        "radars": ["input=radar.nc", "sigma_obs=0.08", "radars=[[283.5,36],[283.5,40]]"],
    }.items():
        code, _, err = run("infer", *common, *options, f"name={name}", "overwrite=true")
        assert (code, err) == (0, ""), err
        with xr.open_dataset(place / "outputs/infer" / name / "fields.nc") as found:
            filled[name] = np.stack([found.u.values, found.v.values])
    np.testing.assert_allclose(filled["native"].ravel(), filled["file"].ravel(), atol=2e-3)
    for other in ("apart", "radars"):
        assert np.abs(filled[other] - filled["file"]).max() > 1e-3, other
    source(**changed("uv_covariance", 3.0, "m2 s-2")).to_netcdf(place / "wrong.nc", engine="h5netcdf")
    done = run("infer", *common, "input=wrong.nc", f"sigma_obs=[{','.join(NAMES)}]")
    is_message(done, "uv_covariance", "expected a positive covariance")
