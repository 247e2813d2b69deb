"""Paths that keep the variance, alpha^2 + sigma^2 = 1: VP, OU and DDPM."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.base import (
    Diffusion,
    Inputs,
    Prediction,
    SigmaMax,
    geometric,
    levels_in_order,
    stratified,
    to_zero,
)


class VariancePreserving(Diffusion):
    """alpha^2 + sigma^2 = 1: the level gives alpha = 1 / sqrt(1 + s^2) and sigma = s alpha.

    A subclass has `level` and `time`. Its published inputs are c_in = 1 and a c_noise of its own, `label`.
    """

    published = True

    def alpha(self, t: Tensor) -> Tensor:
        return (1 + self.level(t) ** 2).rsqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.level(t)

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -self.sigma(t), self.alpha(t)

    def label(self, t: Tensor) -> Tensor:
        """Returns the published c_noise."""
        return t

    def inputs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.ones_like(t), self.label(t)) if self.published else super().inputs(t)


class VP(VariancePreserving):
    """The continuous limit of DDPM: beta(t) = beta_min + beta_d t on [0, 1] (Song et al., ICLR 2021, equation 32).

        alpha = exp(-(beta_d t^2 / 2 + beta_min t) / 2),    s^2 = exp(beta_d t^2 / 2 + beta_min t) - 1

    Arguments:
        beta_d: The rise of beta over [0, 1].
        beta_min: beta at 0.
        eps_t: The smallest training time.
        eps_s: The last time of the native schedule of sampling, which is uniform in t.
        M: c_noise is (M - 1) t where published.
        inputs: `published` or `unit`; see the package.
        prediction: What the network predicts.
        sigma_data: The standard deviation of the normalised data.

    Raises:
        ValueError: A beta that is not positive, times out of order.
    """

    def __init__(
        self,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        eps_t: float = 1e-5,
        eps_s: float = 1e-3,
        M: int = 1000,
        inputs: Inputs = "published",
        prediction: Prediction = "noise",
        sigma_data: float = 1.0,
    ) -> None:
        if not 0 < eps_t < 1:
            raise ValueError(f"eps_t must be in (0, 1), got {eps_t}")
        if not eps_t <= eps_s < 1:
            raise ValueError(f"eps_s must be in [eps_t={eps_t}, 1), got {eps_s}")
        for name, value in (("beta_d", beta_d), ("beta_min", beta_min)):
            if value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        super().__init__(eps_t, 1.0, prediction, sigma_data)
        self.beta_d, self.beta_min, self.eps_s, self.M = beta_d, beta_min, eps_s, M
        self.published = inputs == "published"

    def level(self, t: Tensor) -> Tensor:
        return torch.expm1(self.beta_d * t**2 / 2 + self.beta_min * t).sqrt()

    def time(self, s: Tensor) -> Tensor:
        # The root of beta_d t^2 / 2 + beta_min t = ln(1 + s^2), without the difference of two near numbers.
        area = torch.log1p(s**2)
        return 2 * area / (self.beta_min + (self.beta_min**2 + 2 * self.beta_d * area).sqrt())

    def label(self, t: Tensor) -> Tensor:
        return (self.M - 1) * t

    def native(self, steps: int) -> Tensor:
        return self.uniform(steps, self.eps_s)


class OU(VariancePreserving):
    """The Ornstein-Uhlenbeck process counted by the noise that it has let in: alpha = sqrt(1 - t^2), sigma = t.

    Inputs as those of `VP`.

    Arguments:
        sigma_min: The smallest noise level.
        sigma_max: The largest; see `EDM`.
        M: c_noise is (M - 1) t where published.
        inputs: `published` or `unit`; see the package.
        prediction: What the network predicts.
        sigma_data: The standard deviation of the normalised data.

    Raises:
        ValueError: Levels out of order, or a standard deviation that is not positive.
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: SigmaMax = 80.0,
        M: int = 1000,
        inputs: Inputs = "published",
        prediction: Prediction = "noise",
        sigma_data: float = 1.0,
    ) -> None:
        low, high = levels_in_order(sigma_min, sigma_max)
        super().__init__(low / math.hypot(1, low), high / math.hypot(1, high), prediction, sigma_data)
        self.M, self.published = M, inputs == "published"

    def native(self, steps: int) -> Tensor:
        return geometric(self.sigma_min, self.sigma_max, steps)  # even steps in t leave out what lies above s = 4

    def level(self, t: Tensor) -> Tensor:
        return t / ((1 - t) * (1 + t)).sqrt()

    def time(self, s: Tensor) -> Tensor:
        return s / (1 + s**2).sqrt()

    def label(self, t: Tensor) -> Tensor:
        return (self.M - 1) * t


class DDPM(VariancePreserving):
    """The discrete chain of Ho et al. (NeurIPS 2020): abar_t is the running product of 1 - beta_t, t = 0 .. T - 1.

    `schedule=linear`: beta rises from beta_min to beta_max. `schedule=cosine`: abar_t = f(t + 1) / f(0) with
    `f(t) = cos^2(pi / 2 (t / T + 0.008) / 1.008)`, beta_t at most 0.999 (Nichol & Dhariwal, ICML 2021, equation 17).
    Between the integers, and beyond both ends, ln s is linear in t, so that any sampler may ask for any level.

    Arguments:
        schedule: `linear` or `cosine`.
        beta_min: beta at t = 0, for `linear`.
        beta_max: beta at t = T - 1, for `linear`.
        T: The number of steps of the chain.
        inputs: `published`, c_in = 1 and c_noise = t, or `unit`; see the package.
        prediction: What the network predicts.
        sigma_data: The standard deviation of the normalised data.

    Raises:
        ValueError: betas out of order or outside (0, 1), or fewer than two steps.
    """

    def __init__(
        self,
        schedule: Literal["linear", "cosine"] = "linear",
        beta_min: float = 1e-4,
        beta_max: float = 0.02,
        T: int = 1000,
        inputs: Inputs = "published",
        prediction: Prediction = "noise",
        sigma_data: float = 1.0,
    ) -> None:
        if not 0 < beta_min <= beta_max < 1:
            raise ValueError(f"beta_min must be in (0, beta_max={beta_max}] and beta_max below 1, got {beta_min}")
        if T < 2:
            raise ValueError(f"T must be >= 2, got {T}")
        super().__init__(0, T - 1, prediction, sigma_data)
        self.T, self.published = T, inputs == "published"
        if schedule == "linear":
            log_abar = torch.log1p(-torch.linspace(beta_min, beta_max, T, dtype=torch.float64)).cumsum(0)
        else:
            angle = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2
            log_abar = angle.cos().square().log().diff().clamp(min=math.log(1e-3)).cumsum(0)
        # ln s = ln(sigma / alpha) = ln((1 - abar) / abar) / 2
        self.register_buffer("log_s", (torch.log(-torch.expm1(log_abar)) - log_abar) / 2, persistent=False)

    def level(self, t: Tensor) -> Tensor:
        low = t.double().floor().clamp(0, self.T - 2).long()
        log_s = self.log_s.to(t.device)
        return torch.lerp(log_s[low], log_s[low + 1], t.double() - low).exp().to(t.dtype)

    def time(self, s: Tensor) -> Tensor:
        log_s, table = s.double().log(), self.log_s.to(s.device)
        low = (torch.searchsorted(table, log_s.contiguous(), right=True) - 1).clamp(0, self.T - 2)
        return (low + (log_s - table[low]) / (table[low + 1] - table[low])).to(s.dtype)

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        return (stratified(n, generator) * self.T).floor().clamp(max=self.T - 1)

    def native(self, steps: int) -> Tensor:
        if steps > self.T:
            raise ValueError(f"steps must be <= T={self.T}, the steps of the chain, got {steps}")
        return to_zero(self.level(torch.linspace(self.T - 1, 0, steps, dtype=torch.float64).round()))
