"""What a way to fill gaps without a network is: it learns from training fields and estimates one field at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import numpy as np
from numpy.typing import NDArray

from vecfield_diffusion.evaluation.covariance import Bools, Floats
from vecfield_diffusion.physics.grid import Grid


class Baseline(ABC):
    """A way to fill gaps; a subclass writes `_estimate`, and `_learn` if the training fields teach it more than a mean.

    Attributes:
        holds_observed: Whether the estimate equals the observed values whatever their noise.
        takes_ellipses: Whether it takes errors of both components together; else one number stands for a cell.
    """

    holds_observed = True
    takes_ellipses = False

    def fit(self, fields: NDArray[np.floating], grid: Grid) -> Self:
        """Learns from training fields `(N, 2, H, W)` in physical units, NaN where not measured.

        Raises:
            ValueError: Fields of another shape than the grid, or none.
        """
        fields = np.asarray(fields)
        if fields.ndim != 4 or fields.shape[1:] != (2, *grid.shape) or len(fields) == 0:
            raise ValueError(f"expected fields (N, 2, {grid.shape[0]}, {grid.shape[1]}), got {fields.shape}")
        self.grid, self.valid = grid, grid.valid.cpu().numpy()
        self.mean = mean_field(fields)
        self._learn(fields)
        return self

    def fill(
        self,
        y: NDArray[np.floating],
        observed: Bools,
        sigma_obs: float | Floats = 0.0,
        previous: NDArray[np.floating] | None = None,
    ) -> Floats:
        """Returns the estimate `(2, H, W)` from `y` at the cells `observed` `(H, W)`, NaN outside the domain.

        Arguments:
            y: Measured values `(2, H, W)`; read at observed cells only.
            observed: Which cells are measured.
            sigma_obs: Standard deviation of the measurement error, in the units of `y`: a number, or `(H, W)`, read at
                observed cells only; where `takes_ellipses`, also `(2, H, W)` and `(3, H, W)`, see `ellipses.py`.
            previous: The last field known before this one, `(2, H, W)`, NaN where it is not: what `Persistence` keeps.

        Raises:
            ValueError: Shapes that do not fit the grid, or an error at an observed cell that is negative or not finite.
        """
        y, observed, sigma = self.measured(y, observed, sigma_obs)
        estimate = self._estimate(y, observed, sigma) if observed.any() else self.mean
        if self.holds_observed:
            estimate = np.where(observed, y, estimate)
        return np.where(self.valid, estimate, np.nan)

    def posterior(
        self,
        y: NDArray[np.floating],
        observed: Bools,
        sigma_obs: float | Floats = 0.0,
        previous: NDArray[np.floating] | None = None,
    ) -> tuple[Floats, Floats | None]:
        """Returns the mean and the standard deviation `(2, H, W)` of a Gaussian law; arguments as for `fill`.

        A method that gives one field has no law: its standard deviation is None.
        """
        return self.fill(y, observed, sigma_obs, previous), None

    def measured(
        self, y: NDArray[np.floating], observed: Bools, sigma_obs: float | Floats
    ) -> tuple[Floats, Bools, Floats]:
        """Returns `y` with 0 where not observed, the observed cells of the domain, the error, 0 where not observed."""
        y, observed = np.asarray(y, dtype=np.float64), np.asarray(observed, dtype=bool)
        sigma = np.asarray(sigma_obs, dtype=np.float64)
        shape = self.valid.shape
        ellipses = [(2, *shape), (3, *shape)] if self.takes_ellipses else []
        if y.shape != (2, *shape) or observed.shape != shape or sigma.shape not in ((), shape, *ellipses):
            wanted = f"y (2, H, W), observed (H, W), sigma_obs a number or (H, W) on {shape}"
            raise ValueError(f"expected {wanted}, got {y.shape}, {observed.shape}, {sigma.shape}")
        observed = observed & self.valid & np.isfinite(y).all(axis=0)
        sigma = np.where(observed, sigma, 0.0)
        own = sigma[:2] if sigma.ndim == 3 else sigma  # what they have in common may be negative
        if not (np.isfinite(sigma).all() and (own >= 0).all()):
            raise ValueError("sigma_obs must be finite and not negative at observed cells")
        return np.where(observed, y, 0.0), observed, sigma

    def _learn(self, fields: NDArray[np.floating]) -> None:  # noqa: B027 (most need nothing beyond the mean)
        """Takes from the training fields what the mean does not say."""

    @abstractmethod
    def _estimate(self, y: Floats, observed: Bools, sigma: Floats) -> Floats:
        """Returns the estimate at all cells; the values outside the domain do not matter."""


def mean_field(fields: NDArray[np.floating]) -> Floats:
    """Returns the mean of every cell `(2, H, W)`; the mean of the component where a cell was never measured."""
    finite = np.isfinite(fields)
    total = np.where(finite, fields, 0).sum(axis=0, dtype=np.float64)
    count = finite.sum(axis=0)
    overall = total.sum(axis=(1, 2), keepdims=True) / np.maximum(count.sum(axis=(1, 2), keepdims=True), 1)
    return np.where(count > 0, total / np.maximum(count, 1), overall)
