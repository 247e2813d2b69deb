"""Diffusion formulations: how noise grows, where the network is trained, how its input and output are scaled.

Every Gaussian path `x_t = alpha(t) x0 + sigma(t) eps` is one problem in the variables

    s = sigma / alpha        (noise level)        z = x_t / alpha = x0 + s eps,

so denoisers and samplers speak `(z, s)` and a formulation owns what is left: the path, the training times, the loss
weight, the preconditioning and the levels that a sampler walks down. The preconditioner

    D(z, s) = c_skip x_t + c_out F(c_in x_t, c_noise)

turns the raw network F into the posterior mean D = E[x0 | x_t]. Unless a formulation says otherwise its coefficients
follow from the path and the standard deviation sd of the data (Karras et al., NeurIPS 2022, appendix B.6, written for
any alpha):

    c_in = 1 / sqrt(alpha^2 sd^2 + sigma^2),    c_skip = alpha sd^2 c_in^2,    c_out = sigma sd c_in,

which give network input and effective target unit variance at every level.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """`n` numbers uniform in [0, 1), one in each of `n` equal parts, in random order.

    Each is uniform by itself; together they cover the unit interval, which lowers the variance of a batch's loss
    (Kingma et al., Variational Diffusion Models, NeurIPS 2021, appendix I.1).
    """
    parts = torch.randperm(n, generator=generator, device=generator.device)
    return (parts + torch.rand(n, generator=generator, device=generator.device)) / n


class Diffusion(nn.Module, ABC):
    """One formulation. `t` is the formulation's own time, a float tensor of any shape; `s` is the noise level.

    Attributes:
        sigma_min: The smallest noise level that the network is trained on.
        sigma_max: The largest.
        sigma_data: The standard deviation of the normalised data.
    """

    sigma_min: float
    sigma_max: float
    sigma_data: float = 1.0

    @abstractmethod
    def level(self, t: Tensor) -> Tensor:
        """The noise level s(t) = sigma(t) / alpha(t)."""

    @abstractmethod
    def time(self, s: Tensor) -> Tensor:
        """The time t at which the noise level is `s`: the inverse of `level`."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The share alpha(t) of the data in x_t."""

    def sigma(self, t: Tensor) -> Tensor:
        """The share sigma(t) of the noise in x_t."""
        return self.alpha(t) * self.level(t)

    @abstractmethod
    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        """`(n,)` training times, drawn on the generator's device."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """The weight of the squared error of D in the training loss."""

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(c_skip, c_out, c_in, c_noise)` at times `t`, in the variables of x_t."""
        alpha, sigma, sd = self.alpha(t), self.sigma(t), self.sigma_data
        c_in = (alpha**2 * sd**2 + sigma**2).rsqrt()
        return alpha * sd**2 * c_in**2, sigma * sd * c_in, c_in, self.level(t).log() / 4

    @abstractmethod
    def levels(self, steps: int) -> Tensor:
        """`(steps + 1,)` levels from `sigma_max` down to 0 in float64, the formulation's own grid for sampling.

        Raises:
            ValueError: More steps than the formulation has levels.
        """


class EDM(Diffusion):
    """alpha = 1, sigma = t (Karras et al., NeurIPS 2022, table 1).

    Arguments:
        sigma_min: The smallest noise level.
        sigma_max: The largest noise level. At least ten times the square root of the leading eigenvalue of the data's
            covariance, or samples lose energy at the large scales; the training program puts that in place of `auto`.
        sigma_data: The standard deviation of the normalised data.
        noise: The law of the training levels: `log_uniform` over the range, or `log_normal` cut to it.
        P_mean: Mean of ln sigma where `noise` is `log_normal`.
        P_std: Standard deviation of ln sigma where `noise` is `log_normal`.
        rho: The exponent of the sampling grid.

    Raises:
        ValueError: Levels out of order, or a scale that is not positive.
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float | Literal["auto"] = 80.0,
        sigma_data: float = 1.0,
        noise: Literal["log_uniform", "log_normal"] = "log_uniform",
        P_mean: float = -1.2,
        P_std: float = 1.2,
        rho: float = 7.0,
    ) -> None:
        super().__init__()
        if sigma_max == "auto":
            raise ValueError("sigma_max must be a number here: 'auto' needs data, see data.statistics.measure")
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max is needed, got sigma_min={sigma_min}, sigma_max={sigma_max}")
        for name, value in (("sigma_data", sigma_data), ("P_std", P_std), ("rho", rho)):
            if value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.noise, self.P_mean, self.P_std, self.rho = noise, P_mean, P_std, rho

    def level(self, t: Tensor) -> Tensor:
        return t

    def time(self, s: Tensor) -> Tensor:
        return s

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        u = stratified(n, generator)
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        if self.noise == "log_uniform":
            return torch.exp(low + u * (high - low))
        # The normal law cut to the range: no level outside it, none heaped up at its ends.
        ends = (torch.tensor([low, high], dtype=torch.float64) - self.P_mean) / self.P_std
        first, last = torch.special.ndtr(ends).tolist()
        return torch.exp(self.P_mean + self.P_std * torch.special.ndtri((first + u * (last - first)).double())).to(u)

    def weight(self, t: Tensor) -> Tensor:
        return (t**2 + self.sigma_data**2) / (t * self.sigma_data) ** 2

    def levels(self, steps: int) -> Tensor:
        return karras(self.sigma_min, self.sigma_max, steps, self.rho)


class DDPM(Diffusion):
    """The discrete chain of Ho et al. (NeurIPS 2020): beta linear in t, the network predicts the noise.

    alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t) with abar_t the running product of 1 - beta_t, t = 0 .. T - 1.
    Between the integers, and beyond both ends, ln s is linear in t, so that any sampler may ask for any level.

    Arguments:
        beta_min: beta at t = 0.
        beta_max: beta at t = T - 1.
        T: The number of steps of the chain.
        sigma_data: The standard deviation of the normalised data; the published coefficients do not depend on it.

    Raises:
        ValueError: betas out of order or outside (0, 1), or fewer than two steps.
    """

    def __init__(self, beta_min: float = 1e-4, beta_max: float = 0.02, T: int = 1000, sigma_data: float = 1.0) -> None:
        super().__init__()
        if not 0 < beta_min <= beta_max < 1:
            raise ValueError(f"0 < beta_min <= beta_max < 1 is needed, got beta_min={beta_min}, beta_max={beta_max}")
        if T < 2:
            raise ValueError(f"T must be >= 2, got {T}")
        self.sigma_data, self.T = sigma_data, T
        log_abar = torch.log1p(-torch.linspace(beta_min, beta_max, T, dtype=torch.float64)).cumsum(0)
        # ln s = ln(sigma / alpha) = ln((1 - abar) / abar) / 2
        self.register_buffer("log_s", (torch.log(-torch.expm1(log_abar)) - log_abar) / 2, persistent=False)
        self.sigma_min, self.sigma_max = self.log_s[0].exp().item(), self.log_s[-1].exp().item()

    def level(self, t: Tensor) -> Tensor:
        low = t.double().floor().clamp(0, self.T - 2).long()
        part = t.double() - low
        return torch.lerp(self.log_s[low], self.log_s[low + 1], part).exp().to(t.dtype)

    def time(self, s: Tensor) -> Tensor:
        log_s = s.double().log()
        low = (torch.searchsorted(self.log_s, log_s.contiguous(), right=True) - 1).clamp(0, self.T - 2)
        part = (log_s - self.log_s[low]) / (self.log_s[low + 1] - self.log_s[low])
        return (low + part).to(s.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        return (1 + self.level(t) ** 2).rsqrt()

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        return (stratified(n, generator) * self.T).floor().clamp(max=self.T - 1)

    def weight(self, t: Tensor) -> Tensor:
        return self.level(t) ** -2

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha = self.alpha(t)
        return 1 / alpha, -self.level(t), torch.ones_like(t), t

    def levels(self, steps: int) -> Tensor:
        if steps > self.T:
            raise ValueError(f"steps must be <= T={self.T}, the steps of the chain, got {steps}")
        t = torch.linspace(self.T - 1, 0, steps, dtype=torch.float64).round()
        return torch.cat([self.level(t.to(self.log_s.device)).cpu(), torch.zeros(1, dtype=torch.float64)])


def karras(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> Tensor:
    """`(steps + 1,)` levels whose rho-th roots are evenly spaced, and 0 (Karras et al., NeurIPS 2022, equation 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    roots = sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    return torch.cat([roots**rho, torch.zeros(1, dtype=torch.float64)])
