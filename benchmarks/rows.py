"""What rows beside the values are worth: `python benchmarks/rows.py globcurrent_agulhas_2002.nc [--days 7]`.

The posterior of a Gaussian field, exactly, with the homogeneous covariance of the first 255 snapshots of a series of
surface currents on longitudes and latitudes; days after the 290th.

- Ellipses: a fifth of the cells with the errors of three radars, 10 cm/s along each beam, in the posterior as 2x2
  blocks, without their covariance, and as one number a cell.
- Super-observations: swaths with errors of 20 cm/s, correlated over 75 km: every value and means of blocks of 75 km,
  with these errors and with independent ones.
- Balances, on ship tracks and around a block, at most 1500 values known to 1 cm/s: none; no flow through coasts, with
  the tolerance that training asks for; geostrophy from a height that fits the currents of the day best, with white
  errors of 2 and 5 cm and what the fit leaves of the day, at a random 1500 of its rows.

Printed are RMSE of a component, CRPS and spread over skill, in m/s, on hidden cells, and of balances beside the coast.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.ndimage import binary_dilation
from scipy.sparse import csr_array, vstack
from scipy.sparse.linalg import lsqr
from scipy.stats import norm
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.masks import Block, Swath, Track
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.ellipses import blocks, correlated, correlation, deviations, is_known
from vecfield_diffusion.evaluation.baselines import OptimalInterpolation
from vecfield_diffusion.guidance.balances import ROTATION, geostrophic
from vecfield_diffusion.guidance.physics import beside_walls
from vecfield_diffusion.inference.super_observations import Thinning, places
from vecfield_diffusion.programs.accuracy import errors

TRAIN, FIRST, VALUES, ERROR = 255, 292, 1500, 0.01
#: The error of a swath in m/s, and over how many metres it is correlated.
NOISE, LENGTH = 0.2, 75e3
SITES = [[18.0, -34.0], [20.0, -34.8], [26.0, -34.0]]


def scores(mean: np.ndarray, std: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns squared error, CRPS of the Gaussian law and variance, their means over values."""
    z = (truth - mean) / std
    crps = std * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    return np.array([np.square(mean - truth).mean(), crps.mean(), np.square(std).mean()])


def say(name: str, found: list[np.ndarray]) -> None:
    """Prints the scores of some days."""
    square, crps, variance = np.mean(found, axis=0)
    print(f"{name:40s} {square**0.5:.3f} / {crps:.3f} / {(variance / square) ** 0.5:.2f}", flush=True)


class Prior:
    """The covariance of single values, and the operators of balances as matrices."""

    def __init__(self, fields: Fields) -> None:
        self.grid, self.train = fields.grid, fields.read(np.arange(TRAIN)).numpy()
        self.valid = self.grid.valid.numpy()
        self.oi = OptimalInterpolation("homogeneous").fit(self.train, self.grid)
        self.lags = np.fft.ifft2(self.oi.covariance.spectrum).real
        self.inside = np.broadcast_to(self.valid, (2, *self.valid.shape)).ravel()
        self.f = 2 * ROTATION * torch.deg2rad(torch.from_numpy(fields.y.astype(float)))[:, None].sin()
        cells = torch.eye(self.valid.size, dtype=torch.float64).view(-1, 1, *self.valid.shape)
        slopes = [geostrophic(part, self.grid, self.f) for part in cells.split(64)]
        self.geostrophy = csr_array(torch.cat(slopes).nan_to_num().flatten(1).T.numpy())

    def between(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Returns the covariance of values by their places in a flattened field."""
        (c, y, x), (d, q, p) = (np.unravel_index(part, (2, *self.valid.shape)) for part in (a, b))
        height, width = self.lags.shape[-2:]
        return self.lags[c[:, None], d, (y[:, None] - q) % height, (x[:, None] - p) % width]

    def posterior(self, rows: csr_array, y: np.ndarray, r: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and deviation of the values `at` given rows of anomalies, `y = A x + n`, n ~ N(0, r), r a matrix
        or its diagonal."""
        used = np.flatnonzero(np.diff(rows.tocsc().indptr))
        a = rows.tocsc()[:, used].tocsr()
        system = a @ (a @ self.between(used, used)).T
        factor = cho_factor(system + (np.diag(r) if r.ndim == 1 else r), lower=True)
        cross = a @ self.between(used, at)
        explained = np.einsum("ij,ij->j", cross, cho_solve(factor, cross))
        variance = self.lags[[0, 1], [0, 1], 0, 0][at // self.valid.size] - explained
        return cross.T @ cho_solve(factor, y), np.sqrt(variance.clip(min=1e-8))


def balances(prior: Prior, fields: Fields, days: Sequence[int]) -> None:
    """Scores each balance."""
    mean, unit = prior.oi.mean.ravel(), csr_array(np.eye(2 * prior.valid.size))
    coast = np.flatnonzero(beside_walls(prior.grid).numpy().ravel() & prior.inside)
    near = np.tile(binary_dilation(beside_walls(prior.grid).any(0).numpy(), iterations=2).ravel(), 2)
    tolerance = np.sqrt(np.nanmean(np.square(prior.train[::8].reshape(-1, mean.size)[:, coast])))
    print(f"tolerance at the coast: {tolerance:.3f} m/s")
    for name, mask in (("track", Track()), ("block", Block())):
        found: dict[str, list[np.ndarray]] = {}
        for day in days:
            x, chance = fields.read([day])[0].double().numpy().ravel(), np.random.default_rng(day)
            seen = np.tile(mask(1, prior.grid.valid, torch.Generator().manual_seed(day)).numpy().ravel(), 2)
            values, hidden, some = (
                chance.permutation(np.flatnonzero(part & prior.inside))[:VALUES]
                for part in (seen, ~seen, np.ones_like(seen))
            )
            height = lsqr(prior.geostrophy[prior.inside], np.nan_to_num(x)[prior.inside], iter_lim=300)[0]
            rest = np.square((prior.geostrophy @ height - x)[prior.inside]).mean()
            rows = {"values alone": (unit[:0], np.zeros(0), np.zeros(0))}
            rows["coast"] = unit[coast], -mean[coast], np.full(len(coast), tolerance**2)
            for error in (0.02, 0.05):
                current = prior.geostrophy @ (height + error * chance.standard_normal(len(height)))
                wide = rest + error**2 * prior.geostrophy.power(2).sum(axis=1)
                rows[f"height to {100 * error:.0f} cm"] = unit[some], (current - mean)[some], wide[some]
            for key, (a, y, r) in rows.items():
                given = np.concatenate([(x - mean)[values], y]), np.concatenate([np.full(len(values), ERROR**2), r])
                law = *prior.posterior(vstack([unit[values], a], format="csr"), *given, hidden), (x - mean)[hidden]
                found.setdefault(key, []).append(scores(*law))
                found.setdefault(f"{key}, near the coast", []).append(scores(*(part[near[hidden]] for part in law)))
        for key, scored in found.items():
            say(f"{name}, {key}", scored)


def ellipses(prior: Prior, fields: Fields, days: Sequence[int]) -> None:
    """Scores errors of radars, as what they are and as less."""
    error = errors({"sigma_obs": 0.1, "radars": SITES}, fields, [0])[0].double()
    known = is_known(error).all(0)
    shapes: dict[str, Tensor] = {"blocks": error, "u and v": deviations(error)}
    shapes["one number"] = (error.square().sum(0) / 2).sqrt()
    found: dict[str, list[np.ndarray]] = {}
    for day in days:
        generator, x = torch.Generator().manual_seed(day), fields.read([day])[0].double()
        seen = (torch.rand(known.shape, generator=generator) < 0.2) & known & prior.grid.valid
        y = x + correlated(error, torch.randn(x.shape, generator=generator, dtype=torch.float64))
        for key, sigma in shapes.items():
            law = prior.oi.posterior(torch.where(seen, y, torch.nan).numpy(), seen.numpy(), sigma.numpy())
            hidden = (~seen & prior.grid.valid).numpy()
            found.setdefault(key, []).append(scores(*(part[:, hidden] for part in (*law, x.numpy()))))
    for key, rows in found.items():
        say(f"radars, {key}", rows)


def swaths(prior: Prior, fields: Fields, days: Sequence[int]) -> None:
    """Scores values of a swath whose errors are correlated over `LENGTH`, and their super-observations."""
    shape, unit, mean = prior.valid.shape, csr_array(np.eye(2 * prior.valid.size)), prior.oi.mean.ravel()
    rho = correlation(*2 * [places(prior.grid, shape, LENGTH)[0, 0]]).numpy()
    root, sigma = np.linalg.cholesky(rho), torch.full((1, 1, 1), NOISE, dtype=torch.float64)
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for day in days:
        x, chance = fields.read([day])[0].double().numpy(), np.random.default_rng(day)
        seen = Swath()(1, prior.grid.valid, torch.Generator().manual_seed(day)).numpy()[0]
        noise = np.stack([root @ chance.standard_normal(len(root)) for _ in "uv"]).reshape(x.shape)
        y = np.where(seen, x + NOISE * noise, np.nan)
        hidden = chance.permutation(np.flatnonzero(np.tile(~seen.ravel(), 2) & prior.inside))[:VALUES]
        some = np.flatnonzero(np.isfinite(y))
        component, cell = np.divmod(some, prior.valid.size)
        exact = NOISE**2 * rho[np.ix_(cell, cell)] * (component[:, None] == component)
        given = {"every value, errors as they are": (y, exact)}
        given["every value, as if independent"] = y, np.full(len(some), NOISE**2)
        for name, length in (("means, as if independent", None), ("means, errors as they are", LENGTH)):
            values, error = Thinning(prior.grid, LENGTH, length=length).means(torch.from_numpy(y)[None], sigma)
            given[name] = values[0].numpy(), blocks(error)[:, :2][values.isfinite()].numpy()
        for name, (values, r) in given.items():
            some = np.flatnonzero(np.isfinite(values))
            law = prior.posterior(unit[some], values.ravel()[some] - mean[some], r, hidden)
            found.setdefault(name, []).append((len(some), scores(*law, x.ravel()[hidden] - mean[hidden])))
    for name, rows in found.items():
        say(f"swath, {name}, {np.mean([n for n, _ in rows]):.0f} values", [row for _, row in rows])


def main() -> None:
    """Prints all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--days", type=int, default=7)
    options = parser.parse_args()
    fields = open_fields(options.path)
    days = np.linspace(FIRST, len(fields) - 1, options.days).astype(int).tolist()
    prior = Prior(fields)
    ellipses(prior, fields, days)
    swaths(prior, fields, days)
    balances(prior, fields, days)


if __name__ == "__main__":
    main()
