"""Filling by a few modes: the field is the training mean and a sum of empirical orthogonal functions (EOFs).

With the leading r eigenvectors V of the covariance of the training fields (variances l) the field is x = m + V c, and
the coefficients come from the observed cells, y = V_o c + what is left out. Two ways to find them:

- gappy POD (Everson & Sirovich 1995): least squares. Here each value is weighed by its error and c by its variance,
  min |N^-1/2 (y - V_o c)|^2 + |c / sqrt(l)|^2, N = nugget_r I + R, where nugget_r is what r modes left unexplained of
  training fields that they were not learnt from: without that ridge, sparse observations blow up the weak modes;
- DINEOF (Beckers & Rixen 2003): the hidden cells start at the mean and are replaced by their projection on the modes
  until nothing changes. It ends at the plain least squares, but modes that the observations hardly see have not moved
  far from 0 by then. The original puts the new field among the training fields and repeats the decomposition of all of
  them at each step; here the modes stay those of the training fields, so that a fill costs milliseconds: one more
  field among hundreds moves them little. Gaps in the training fields are filled by the original iteration, once.

The number of modes is that which best fills observed cells that were put aside, in five parts made of tiles of 4 x 4
cells: single cells would follow from their neighbours.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from vecfield_diffusion.evaluation.baseline import Baseline
from vecfield_diffusion.evaluation.covariance import Bools, Floats, LowRank, principal_modes, unexplained

_MOST = 128  # modes
_SNAPSHOTS, _SNAPSHOTS_WITH_GAPS = 2000, 500
_FOLDS, _TILE = 5, 4
_HIDDEN = 0.03  # share of the measured training values that judge the number of modes


class Modal(Baseline):
    """Filling by modes whose number is chosen for each field; a subclass writes `_complete`.

    Raises:
        ValueError: In `fit`, training fields that do not vary.
    """

    def _learn(self, fields: NDArray[np.floating]) -> None:
        gaps = not np.isfinite(fields[:, :, self.valid]).all()
        fields = fields[:: -(-len(fields) // (_SNAPSHOTS_WITH_GAPS if gaps else _SNAPSHOTS))]
        anomalies = (fields - self.mean)[:, :, self.valid].reshape(len(fields), -1).astype(np.float64)
        if not np.nan_to_num(anomalies).any():
            raise ValueError(
                f"{type(self).__name__} needs training fields that vary, got {len(fields)} without variance"
            )
        anomalies = fill_gaps(anomalies) if gaps else anomalies
        self.nuggets = unexplained(anomalies)[0][:_MOST]
        modes, variances = principal_modes(anomalies)
        self.modes, self.variances = modes[:, : len(self.nuggets)], variances[: len(self.nuggets)]
        self.nuggets = self.nuggets[: len(self.variances)]

    def _estimate(self, y: Floats, observed: Bools, sigma: Floats) -> Floats:
        anomaly = np.where(observed, y - self.mean, 0.0)
        rank = self._rank(anomaly, observed, sigma)
        return self.mean + self._complete(anomaly, observed, sigma, rank)

    def _rank(self, anomaly: Floats, observed: Bools, sigma: Floats) -> int:
        """The number of modes that best fills observed cells put aside."""
        tiles = np.random.default_rng(0).integers(_FOLDS, size=[-(-size // _TILE) for size in observed.shape])
        fold = np.kron(tiles, np.ones((_TILE, _TILE), dtype=int))[: observed.shape[0], : observed.shape[1]]
        ranks = np.unique(np.geomspace(1, len(self.variances), 16).round().astype(int))
        errors = np.zeros(len(ranks))
        for part in range(_FOLDS):
            aside, rest = observed & (fold == part), observed & (fold != part)
            known = np.where(rest, anomaly, 0.0)
            for k, rank in enumerate(ranks):
                errors[k] += np.square((self._complete(known, rest, sigma, rank) - anomaly)[:, aside]).sum()
        return int(ranks[errors.argmin()])

    @abstractmethod
    def _complete(self, anomaly: Floats, observed: Bools, sigma: Floats, rank: int) -> Floats:
        """The anomaly `(2, H, W)` by `rank` modes from `anomaly`, which is 0 where not observed."""


class GappyPOD(Modal):
    """Least squares for the coefficients of modes, with their variances as ridge (Everson & Sirovich 1995)."""

    holds_observed = False

    def _complete(self, anomaly: Floats, observed: Bools, sigma: Floats, rank: int) -> Floats:
        modes = LowRank(self.modes[:, :rank], self.variances[:rank], self.nuggets[rank - 1], self.valid)
        return modes.condition(anomaly, observed, sigma**2)[0]


class DINEOF(Modal):
    """Projection of the filled field on the modes, repeated until the hidden cells stay (Beckers & Rixen 2003).

    Arguments:
        tolerance: The change of the coefficients, relative to them, at which it ends.
        iterations: The largest number of repetitions.

    Raises:
        ValueError: A tolerance that is not positive or no iterations; in `fit`, training fields that do not vary.
    """

    def __init__(self, tolerance: float = 1e-3, iterations: int = 300) -> None:
        if not tolerance > 0:
            raise ValueError(f"tolerance must be above 0, got {tolerance}")
        if iterations < 1:
            raise ValueError(f"iterations must be >= 1, got {iterations}")
        self.tolerance, self.iterations = tolerance, iterations

    def _complete(self, anomaly: Floats, observed: Bools, sigma: Floats, rank: int) -> Floats:
        modes, known_values = self.modes[:, :rank], np.tile(observed[self.valid], 2)
        basis = modes[known_values]
        known = basis.T @ anomaly[:, self.valid].ravel()[known_values]
        hidden = np.eye(rank) - basis.T @ basis  # V_h^T V_h: what the filled cells give back
        c = known
        for _ in range(self.iterations):
            before, c = c, known + hidden @ c
            if np.linalg.norm(c - before) <= self.tolerance * np.linalg.norm(c):
                break
        field = np.zeros((2, *self.valid.shape))
        field[:, self.valid] = (modes @ c).reshape(2, -1)
        return field


def fill_gaps(anomalies: Floats, aside: Bools | None = None, tolerance: float = 1e-3, iterations: int = 30) -> Floats:
    """Anomalies `(N, d)` with their NaN filled by DINEOF: 1, 2, 3, 4, 6, 8 .. modes, as long as hidden values gain.

    Arguments:
        anomalies: Of N snapshots, about their mean.
        aside: The values `(N, d)` that judge the number of modes, where known; a few single ones if None.
        tolerance: The RMS change of the filled values, relative to the RMS of the known, at which a number of modes
            is done with.
        iterations: The largest number of repetitions for each number of modes.
    """
    known = np.isfinite(anomalies)
    drawn = np.random.default_rng(0).random(anomalies.shape) < _HIDDEN if aside is None else aside
    aside = known & drawn
    complete, best, chosen = np.where(known & ~aside, anomalies, 0.0), np.inf, 1
    filled = complete
    for rank in (rank for rank in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96) if rank < min(anomalies.shape)):
        filled = _iterate(filled, ~known | aside, rank, tolerance, iterations)
        error = np.square((filled - anomalies)[aside]).sum()
        if error >= best:
            break
        complete, best, chosen = filled, error, rank
    return _iterate(np.where(known, anomalies, complete), ~known, chosen, tolerance, iterations)


def _iterate(filled: Floats, unknown: Bools, rank: int, tolerance: float, iterations: int) -> Floats:
    """`filled` `(N, d)` with its unknown values replaced by the projection on its own leading modes, repeatedly."""
    limit = tolerance**2 * np.square(filled[~unknown]).mean() * unknown.sum()
    for _ in range(iterations):
        updated = np.where(unknown, _projected(filled, rank), filled)
        change, filled = np.square(updated - filled).sum(), updated
        if change <= limit:
            break
    return filled


def _projected(x: Floats, rank: int) -> Floats:
    """The best approximation of `(N, d)` of this rank."""
    n, d = x.shape
    gram = x @ x.T if n <= d else x.T @ x
    vectors = eigh(gram, subset_by_index=(len(gram) - rank, len(gram) - 1), check_finite=False)[1]
    return vectors @ (vectors.T @ x) if n <= d else (x @ vectors) @ vectors.T
