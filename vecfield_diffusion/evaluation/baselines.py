"""What filling without a network reaches: the yardsticks beside every score of a model.

`fit` sees the training fields, `fill` estimates one field `(2, H, W)` from its observed cells. Cells outside the domain
stay NaN, and without any observation every method returns the training mean (persistence the previous field).
Interpolators hold the observed values as they are; optimal interpolation weighs them by their noise and takes both
components together. The methods that write the field as a sum of modes are in `modes`.

Distances are those of the grid: columns at multiples of the mean |dx|, rows at the running sum of |dy|. A periodic axis
closes through wrapped copies of the observations or of the neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CloughTocher2DInterpolator, LinearNDInterpolator
from scipy.sparse import csc_array, csr_array, eye_array
from scipy.sparse.linalg import splu
from scipy.spatial import Delaunay, QhullError, cKDTree

from vecfield_diffusion.ellipses import blocks
from vecfield_diffusion.evaluation.baseline import Baseline, mean_field
from vecfield_diffusion.evaluation.covariance import Bools, Floats, Homogeneous, LowRank, without_divergence
from vecfield_diffusion.evaluation.modes import DINEOF, GappyPOD
from vecfield_diffusion.physics.grid import Grid

_LEFT_FREE = 1e-10  # pull towards the nearest value where the biharmonic energy leaves a cell free


class Climatology(Baseline):
    """The training mean of every cell."""

    def _estimate(self, y: Floats, observed: Bools, sigma: Floats) -> Floats:
        return self.mean


class Persistence(Climatology):
    """The previous field; the training mean where there is none."""

    def fill(
        self,
        y: NDArray[np.floating],
        observed: Bools,
        sigma_obs: float | Floats = 0.0,
        previous: NDArray[np.floating] | None = None,
    ) -> Floats:
        """As `Baseline.fill`; the values of `previous` stand where both components of it are known."""
        filled = super().fill(y, observed, sigma_obs)
        if previous is None:
            return filled
        previous = np.asarray(previous, dtype=np.float64)
        if previous.shape != filled.shape:
            raise ValueError(f"expected previous (2, H, W) of shape {filled.shape}, got {previous.shape}")
        _, observed, _ = self.measured(y, observed, sigma_obs)
        return np.where(np.isfinite(previous).all(axis=0) & self.valid & ~observed, previous, filled)


class Nearest(Baseline):
    """The value of the nearest observed cell."""

    def _estimate(self, y: Floats, observed: Bools, sigma: Floats) -> Floats:
        return _nearest(y, observed, self.grid)


class Linear(Baseline):
    """Linear interpolation in the Delaunay triangles of the observed cells, the nearest value outside their hull."""

    @staticmethod
    def _interpolator(triangles: Delaunay, values: Floats) -> Callable[[Floats], Floats]:
        return LinearNDInterpolator(triangles, values)

    def _estimate(self, y: Floats, observed: Bools, sigma: Floats) -> Floats:
        nearest = _nearest(y, observed, self.grid)
        points, values = _around(y, observed, self.grid)
        try:
            triangles = Delaunay(points)
        except (QhullError, ValueError):  # fewer than three points, or all on one line
            return nearest
        inside = self._interpolator(triangles, values)(_points(self.grid)).T.reshape(y.shape)
        return np.where(np.isfinite(inside), inside, nearest)


class Cubic(Linear):
    """Piecewise cubic interpolation with continuous slopes in those triangles (Clough & Tocher 1965; Alfeld 1984)."""

    @staticmethod
    def _interpolator(triangles: Delaunay, values: Floats) -> Callable[[Floats], Floats]:
        return CloughTocher2DInterpolator(triangles, values)


class Biharmonic(Baseline):
    """The smoothest field through the observed cells: a thin plate, least sum of f_xx^2 + 2 f_xy^2 + f_yy^2.

    Summed over a region that is held around its rim this is the sum of the squared Laplacian, so that harmonic fields
    are continued exactly into a hole (Briggs 1974). A difference enters only where all its cells are in the domain:
    coasts and open edges are free, and fields linear in x and y cost nothing. What the energy leaves free (a lake
    without observations) takes the nearest value.
    """

    def _estimate(self, y: Floats, observed: Bools, sigma: Floats) -> Floats:
        nearest = _nearest(y, observed, self.grid)
        held, hidden = observed.ravel(), (self.valid & ~observed).ravel()
        if not hidden.any():
            return y
        flat = y.reshape(2, -1).T
        free = self.energy[hidden]
        matrix = free[:, hidden] + _LEFT_FREE * eye_array(free.shape[0])
        right = _LEFT_FREE * nearest.reshape(2, -1).T[hidden] - free[:, held] @ flat[held]
        factors = splu(csc_array(matrix), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
        estimate = flat.copy()
        estimate[hidden] = factors.solve(right)
        return estimate.T.reshape(y.shape)

    def _learn(self, fields: NDArray[np.floating]) -> None:
        dx, dy = np.abs(self.grid.dx.cpu().numpy()), np.abs(self.grid.dy.cpu().numpy())
        unit = dx.mean() * dy.mean()
        second, cross = {-1: 1.0, 0: -2.0, 1: 1.0}, {(0, 0): 1.0, (0, 1): -1.0, (1, 0): -1.0, (1, 1): 1.0}
        along_x = self._stencil({(0, k): weight for k, weight in second.items()}, unit / dx**2)
        along_y = self._stencil({(k, 0): weight for k, weight in second.items()}, unit / dy**2)
        mixed = self._stencil(cross, unit / (dx * dy))
        self.energy = csr_array(along_x.T @ along_x + 2 * mixed.T @ mixed + along_y.T @ along_y)

    def _stencil(self, weights: dict[tuple[int, int], float], scale: Floats) -> csr_array:
        """The matrix of a difference with `weights` by offset (rows, columns); a zero row where a cell is missing."""
        (height, width), (close_y, close_x) = self.valid.shape, self.grid.periodic
        row, column = np.indices((height, width))
        whole, cells = np.ones_like(self.valid), []
        for down, right in weights:
            y, x = row + down, column + right
            whole &= (close_y | ((y >= 0) & (y < height))) & (close_x | ((x >= 0) & (x < width)))
            cells.append(y % height * width + x % width)
            whole &= self.valid.ravel()[cells[-1]]
        level = np.broadcast_to(scale[:, None], whole.shape)[whole]
        entries = np.concatenate([weight * level for weight in weights.values()])
        columns = np.concatenate([cell[whole] for cell in cells])
        rows = np.tile(np.flatnonzero(whole), len(cells))
        return csr_array((entries, (rows, columns)), shape=(whole.size, whole.size))


class OptimalInterpolation(Baseline):
    """The posterior mean of a Gaussian field with the covariance of the training fields (see `covariance`).

    Arguments:
        kind: `homogeneous`, `pca`, or `auto`: homogeneous on a doubly periodic grid without land, elsewhere the one
            that, learnt from the first four fifths of the training fields, better fills 10 % pixels in the last fifth.
        nugget: White variance added to the homogeneous covariance, in units of the variance of the fields; without it
            wavenumbers that the fields lack would make it singular.
        divergence_free: Whether the covariance is that of fields with a stream function, projected by the stencil of
            `operators.divergence`: the estimate has no divergence to rounding. What the covariance then leaves out of
            the training fields counts as an error of the observations, which are not held, however exact. `auto` is
            homogeneous on a doubly periodic grid of even spacing without land, else `pca`; homogeneous elsewhere is
            exact only away from land and open edges, where the spacing is even: coasts are not what it knows.

    Attributes:
        unresolved: The variance of that error, in the squared units of the fields; 0 without `divergence_free`.

    Raises:
        ValueError: An unknown kind, or a nugget that is not positive; in `fit`, training fields that do not vary.
    """

    holds_observed = False
    takes_ellipses = True

    def __init__(
        self,
        kind: Literal["auto", "homogeneous", "pca"] = "auto",
        nugget: float = 1e-6,
        divergence_free: bool = False,
    ) -> None:
        if kind not in ("auto", "homogeneous", "pca"):
            raise ValueError(f"OptimalInterpolation.kind must be auto, homogeneous or pca, got {kind!r}")
        if not nugget > 0:
            raise ValueError(f"OptimalInterpolation.nugget must be above 0, got {nugget}")
        self.kind, self.nugget, self.divergence_free = kind, nugget, divergence_free

    def posterior(
        self,
        y: NDArray[np.floating],
        observed: Bools,
        sigma_obs: float | Floats = 0.0,
        previous: NDArray[np.floating] | None = None,
    ) -> tuple[Floats, Floats]:
        """Returns the posterior mean and standard deviation, both `(2, H, W)`; arguments as for `fill`."""
        y, observed, sigma = self.measured(y, observed, sigma_obs)
        anomaly = np.where(observed, y - self.mean, 0.0)
        mean, variance = self.covariance.condition(anomaly, observed, self._noise(sigma), with_variance=True)
        std = np.sqrt(np.maximum(variance, 0.0))
        return np.where(self.valid, self.mean + mean, np.nan), np.where(self.valid, std, np.nan)

    def _learn(self, fields: NDArray[np.floating]) -> None:
        if not np.nan_to_num(fields - self.mean).any():
            raise ValueError(
                f"OptimalInterpolation needs training fields that vary, got {len(fields)} without variance"
            )
        closed = all(self.grid.periodic) and bool(self.valid.all())
        kind = self._kind(fields, closed)
        if closed and kind == "homogeneous":
            self.mean = np.broadcast_to(self.mean.mean(axis=(1, 2), keepdims=True), self.mean.shape)
        self.covariance = self._covariance(kind, fields, self.mean)
        self.unresolved = 0.0
        if self.divergence_free:
            self.covariance, left_out = self.covariance.solenoidal(self.grid)
            mean = without_divergence(self.mean[None], self.grid)[0]
            self.unresolved = left_out + float(np.square(mean - self.mean)[:, self.valid].mean())
            self.mean = mean

    def _kind(self, fields: NDArray[np.floating], closed: bool) -> str:
        if self.kind != "auto":
            return self.kind
        if self.divergence_free:
            even = all(len(spacing.unique()) == 1 for spacing in (self.grid.dx, self.grid.dy))
            return "homogeneous" if closed and even else "pca"
        return "homogeneous" if closed or len(fields) < 10 else self._better(fields)

    def _covariance(self, kind: str, fields: NDArray[np.floating], mean: Floats) -> Homogeneous | LowRank:
        if kind == "pca":
            return LowRank.of(fields, mean, self.valid)
        return Homogeneous.of(fields, mean, self.valid, self.grid.periodic, self.nugget)

    def _better(self, fields: NDArray[np.floating]) -> str:
        """The kind that fills 10 % pixels in (at most 8 of) the last fifth of `fields` with the smaller error."""
        split = len(fields) - len(fields) // 5
        mean = mean_field(fields[:split])
        judge = fields[split :: -(-(len(fields) - split) // 8)] - mean
        pixels = np.random.default_rng(0).random(self.valid.shape) < 0.1
        errors = {}
        for kind in ("homogeneous", "pca"):
            covariance = self._covariance(kind, fields[:split], mean)
            misses = []
            for anomaly in judge:
                observed = pixels & np.isfinite(anomaly).all(axis=0)
                misses.append(covariance.condition(np.where(observed, anomaly, 0.0), observed, 0.0)[0] - anomaly)
            errors[kind] = np.nanmean(np.square(misses))
        return min(errors, key=errors.__getitem__)

    def _estimate(self, y: Floats, observed: Bools, sigma: Floats) -> Floats:
        anomaly = np.where(observed, y - self.mean, 0.0)
        noise = self._noise(sigma)
        estimate = self.mean + self.covariance.condition(anomaly, observed, noise)[0]
        return np.where(observed & (noise[:2] == 0 if noise.ndim == 3 else noise == 0), y, estimate)

    def _noise(self, sigma: Floats) -> Floats:
        """The variance of the errors, `(H, W)`, or variances and covariance of both components, `(3, H, W)`."""
        if sigma.ndim < 3:
            return sigma**2 + self.unresolved
        block = blocks(torch.from_numpy(sigma)).numpy()
        block = block if len(block) == 3 else np.concatenate([block, np.zeros_like(block[:1])])
        return block + self.unresolved * np.array([1.0, 1.0, 0.0])[:, None, None]


def _axes(grid: Grid) -> tuple[Floats, Floats]:
    """The coordinates of columns `(W,)` and rows `(H,)`, in units of the mean spacing."""
    dx, dy = np.abs(grid.dx.cpu().numpy()), np.abs(grid.dy.cpu().numpy())
    unit = np.sqrt(dx.mean() * dy.mean())
    rows = np.concatenate(([0.0], np.cumsum((dy[1:] + dy[:-1]) / 2)))
    return np.arange(grid.shape[1]) * dx.mean() / unit, rows / unit


def _points(grid: Grid) -> Floats:
    """The coordinates (x, y) of all cells, `(H W, 2)`."""
    x, y = _axes(grid)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _nearest(values: Floats, observed: Bools, grid: Grid) -> Floats:
    """The value of the nearest observed cell, everywhere `(2, H, W)`."""
    points, found = _around(values, observed, grid)
    _, index = cKDTree(points).query(_points(grid))
    return found[index].T.reshape(values.shape)


def _around(values: Floats, observed: Bools, grid: Grid) -> tuple[Floats, Floats]:
    """Coordinates `(n, 2)` and values `(n, 2)` of the observed cells, copied half a period beyond closed ends."""
    points, found = _points(grid)[observed.ravel()], values[:, observed].T
    for axis, coordinates in enumerate(_axes(grid)):
        if not grid.periodic[1 - axis]:
            continue
        period = coordinates[-1] + coordinates[1]
        shift = np.zeros(2)
        shift[axis] = period
        upper = points[:, axis] >= period / 2
        points = np.concatenate((points[upper] - shift, points, points[~upper] + shift))
        found = np.concatenate((found[upper], found, found[~upper]))
    return points, found


# The table.

#: Correlation of the anomalies with those of the field before, from which that field is worth a baseline.
CORRELATED = 0.2
#: Divergence over vorticity of the training fields, below which a covariance without divergence is suited.
SOLENOIDAL = 0.2


@dataclass(frozen=True)
class BaselineKind:
    """A baseline by what one must know before it is fitted.

    Arguments:
        label: What tables call it.
        make: Makes one that is not fitted.
        blind: Whether it looks at no observation of the present.
        needs_previous: Whether it estimates from the field before, and is left out where that says nothing.
        without_divergence: Whether it is for flows without divergence alone.
    """

    label: str
    make: Callable[[], Baseline]
    blind: bool = False
    needs_previous: bool = False
    without_divergence: bool = False

    def named(self, note: str = "") -> str:
        """Returns the label with a note, such as from when the field is that persistence keeps."""
        return f"{self.label} ({note})" if note else self.label


#: Every baseline by the name that `baselines=` knows it by, in the order of tables.
BASELINES: dict[str, BaselineKind] = {
    "climatology": BaselineKind("climatology", Climatology, blind=True),
    "persistence": BaselineKind("persistence", Persistence, blind=True, needs_previous=True),
    "nearest": BaselineKind("nearest", Nearest),
    "linear": BaselineKind("linear", Linear),
    "cubic": BaselineKind("cubic", Cubic),
    "biharmonic": BaselineKind("biharmonic", Biharmonic),
    "oi": BaselineKind("optimal interpolation", OptimalInterpolation),
    "oi_solenoidal": BaselineKind(
        "OI without divergence",
        lambda: OptimalInterpolation("homogeneous", divergence_free=True),
        without_divergence=True,
    ),
    "gappy_pod": BaselineKind("gappy POD", GappyPOD),
    "dineof": BaselineKind("DINEOF", DINEOF),
}


def unsuited(keys: Sequence[str], *, divergence_share: float, persistence: float) -> dict[str, str]:
    """Returns, by key, why some of the baselines do not suit the data.

    Arguments:
        keys: Names in `BASELINES`.
        divergence_share: RMS divergence over RMS vorticity of the training fields.
        persistence: The correlation of the anomalies with those of the field before; NaN where there is none.
    """
    reasons = {}
    for key in keys:
        if BASELINES[key].needs_previous and not persistence >= CORRELATED:
            reasons[key] = no_memory(persistence)
        if BASELINES[key].without_divergence and not divergence_share < SOLENOIDAL:
            reasons[key] = f"the divergence of the data is {divergence_share:.2g} of their vorticity"
    return reasons


def no_memory(correlation: float) -> str:
    """Returns why a correlation with the snapshot before is too low for what rests on it."""
    return f"the correlation with the snapshot before is {correlation:.2g}"


def fit_baselines(keys: Sequence[str], training: NDArray[np.floating], grid: Grid) -> Mapping[str, Baseline]:
    """Returns the baselines `keys` fitted to training fields `(n, 2, H, W)`, by key.

    Raises:
        ValueError: Fields of another shape than the grid, or that do not vary.
    """
    return {key: BASELINES[key].make().fit(training, grid) for key in keys}
