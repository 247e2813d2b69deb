"""A Gaussian field, given what is observed, as a law to draw from: proposals of the samplers that decide by densities.

With x a draw of the field without data, n one of the errors and E the posterior mean of data y,

    x - E[x | A x + n]    has the law    N(0, C),    C = Cov[x | y],

whatever y is (Matheron's rule). The mean given z = x0 + s eps as well is the denoiser of N(m, C), and m its limit at
high noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vecfield_diffusion.ellipses import correlated
from vecfield_diffusion.models.modes import Modes

#: A level at which z tells nothing.
FAR = 1e6


class GaussianReference:
    """The law N(m, C) of a Gaussian field given an observation; see the module.

    Arguments:
        field: The Gaussian field, one that draws.
        y: The measured values `(B, 2, H, W)`, 0 where there are none.
        observed: The measured cells, boolean `(B, 1, H, W)`.
        error: Their errors, `(B, C, H, W)` as `ellipses.py` has them, 0 where there are none.
        valid: The cells of the domain, boolean `(B, 1, H, W)`.
    """

    def __init__(self, field: Modes, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> None:
        self.field, self.y, self.observed, self.error, self.valid = field, y, observed, error, valid
        self._centre: Tensor | None = None

    def denoise(self, z: Tensor, s: float) -> Tensor:
        """Returns E[x0 | z, y], `(B, 2, H, W)`."""
        return self._mean(z, s, self.y)

    def centre(self, z: Tensor) -> Tensor:
        """Returns m, `(B, 2, H, W)`."""
        if self._centre is None:
            self._centre = self._mean(torch.zeros_like(z), FAR, self.y)
        return self._centre

    def draw(self, noise: Callable[[], Tensor]) -> Tensor:
        """Returns a draw of N(0, C), linear in unit normal noise `(B, 2, H, W)`."""
        field, seen = self.field.draw(noise(), noise(), self.observed)
        y = torch.where(self.observed, seen + correlated(self.error, noise()), 0.0)
        return field - self._mean(torch.zeros_like(field), FAR, y)

    def _mean(self, z: Tensor, s: float, y: Tensor) -> Tensor:
        z = torch.where(self.valid, z, 0.0)
        return self.field(z, z.new_full((len(z),), s), y, self.observed, self.error, self.valid)[0]
