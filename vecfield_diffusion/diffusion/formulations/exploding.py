"""Paths that leave the field alone and let the noise grow, alpha = 1: EDM, VE and IDDPM."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vecfield_diffusion.diffusion.base import (
    Diffusion,
    Inputs,
    Prediction,
    SigmaMax,
    cut_normal,
    karras,
    levels_in_order,
    stratified,
    to_zero,
)
from vecfield_diffusion.models.layers import FourierEmbedding


class EDM(Diffusion):
    """alpha = 1, sigma = t (Karras et al., NeurIPS 2022, table 1).

    With `uncertainty`, a small network learns ln of the loss to be expected at a level, u, and training minimises
    `loss / e^u + u`, so that all levels pull with the same strength (Karras et al., EDM2, CVPR 2024, equation 14).

    Arguments:
        sigma_min: The smallest noise level.
        sigma_max: The largest noise level. At least ten times the square root of the leading eigenvalue of the data's
            covariance, or samples lose energy at the large scales; the training program puts that in place of `auto`.
        noise: The law of the training levels: `log_uniform` over the range, or `log_normal` cut to it.
        P_mean: Mean of ln sigma where `noise` is `log_normal`.
        P_std: Standard deviation of ln sigma where `noise` is `log_normal`.
        rho: The exponent of the schedule of sampling.
        uncertainty: Whether the weight of the levels is learned.
        prediction: What the network predicts.
        sigma_data: The standard deviation of the normalised data.

    Raises:
        ValueError: Levels out of order, or a scale that is not positive.
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: SigmaMax = 80.0,
        noise: Literal["log_uniform", "log_normal"] = "log_uniform",
        P_mean: float = -1.2,
        P_std: float = 1.2,
        rho: float = 7.0,
        uncertainty: bool = False,
        prediction: Prediction = "edm",
        sigma_data: float = 1.0,
    ) -> None:
        super().__init__(*levels_in_order(sigma_min, sigma_max), prediction, sigma_data)
        for name, value in (("P_std", P_std), ("rho", rho)):
            if value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        self.noise, self.P_mean, self.P_std, self.rho = noise, P_mean, P_std, rho
        if noise == "log_normal":
            self.sample_times(1, torch.Generator())
        if uncertainty:
            self.uncertainty = LogLoss()

    def time(self, s: Tensor) -> Tensor:
        return s

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        u = stratified(n, generator)
        low, high = math.log(self.t_min), math.log(self.t_max)
        if self.noise == "log_uniform":
            return torch.exp(low + u * (high - low))
        return torch.exp(cut_normal(u, "P_mean", self.P_mean, self.P_std, low, high))

    def native(self, steps: int) -> Tensor:
        return karras(self.sigma_min, self.sigma_max, steps, self.rho)


class LogLoss(nn.Module):
    """u(c_noise) of `EDM`: `(B,)` to `(B,)`, 0 at the start."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.features, self.out = FourierEmbedding(features), nn.Linear(features, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, c_noise: Tensor) -> Tensor:
        return self.out(self.features(c_noise))[:, 0]


class VE(Diffusion):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t, t in [0, 1] (Song et al., ICLR 2021, equation 31).

    Published (in the form of Karras et al., 2022, table 1): c_in = 1, c_noise = ln(sigma / 2), F = sigma score.

    Arguments:
        sigma_min: The smallest noise level.
        sigma_max: The largest; see `EDM`.
        inputs: `published` or `unit`; see the package.
        prediction: What the network predicts.
        sigma_data: The standard deviation of the normalised data.

    Raises:
        ValueError: Levels out of order, or a standard deviation that is not positive.
    """

    def __init__(
        self,
        sigma_min: float = 0.02,
        sigma_max: SigmaMax = 100.0,
        inputs: Inputs = "published",
        prediction: Prediction = "score",
        sigma_data: float = 1.0,
    ) -> None:
        super().__init__(0.0, 1.0, prediction, sigma_data)
        self.low, high = (math.log(level) for level in levels_in_order(sigma_min, sigma_max))
        self.span, self.published = high - self.low, inputs == "published"

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(self.low + t * self.span)

    def time(self, s: Tensor) -> Tensor:
        return (s.log() - self.low) / self.span

    def inputs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.ones_like(t), (self.sigma(t) / 2).log()) if self.published else super().inputs(t)


class IDDPM(Diffusion):
    """Improved DDPM (Nichol & Dhariwal, ICML 2021) in the form of Karras et al. (2022, table 1): alpha = 1, sigma = t.

    The levels are those of the cosine schedule, u_M = 0 and

        u_{j-1} = sqrt((u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1) - 1),    abar_j = sin^2(pi / 2 j / (M (C_2 + 1)))

    for j = M .. 1; c_in = 1 / sqrt(sigma^2 + 1), c_noise = M - 1 - argmin_j |sigma - u_j|. With `learned_variance` the
    network gives a second output v in [0, 1] for every value, the reverse variance has the logarithm
    `v ln large + (1 - v) ln small` (`reverse_variances`), and training adds `vlb_weight` times the variational bound of
    it, the mean held fixed (their equations 15 and 16).

    Arguments:
        C_1: The floor of abar_{j-1} / abar_j.
        C_2: The offset of the cosine.
        M: The number of levels.
        j_0: The first level of the table that is used: lower ones have more noise; 8 is where sampling was published
            to begin, at s = 80.
        learned_variance: Whether the reverse variance is learned.
        vlb_weight: The weight of the variational bound over the whole chain, in nats per value.
        inputs: `published` or `unit`; see the package.
        prediction: What the network predicts.
        sigma_data: The standard deviation of the normalised data.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        j_0: int = 1,
        learned_variance: bool = False,
        vlb_weight: float = 0.001,
        inputs: Inputs = "published",
        prediction: Prediction = "noise",
        sigma_data: float = 1.0,
    ) -> None:
        if M < 2:
            raise ValueError(f"M must be >= 2, got {M}")
        if not 0 <= j_0 < M - 1:
            raise ValueError(f"j_0 must be in [0, M - 2 = {M - 2}], got {j_0}")
        for name, value in (("C_1", C_1), ("C_2", C_2)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be in (0, 1), got {value}")
        if vlb_weight < 0:
            raise ValueError(f"vlb_weight must be >= 0, got {vlb_weight}")
        rising = iddpm_table(C_1, C_2, M)[:M].flip(0)
        super().__init__(rising[0].item(), rising[M - 1 - j_0].item(), prediction, sigma_data)
        self.M, self.j_0, self.published = M, j_0, inputs == "published"
        self.learned_variance, self.vlb_weight = learned_variance, vlb_weight
        self.register_buffer("rising", rising, persistent=False)  # u_{M-1} .. u_0

    def time(self, s: Tensor) -> Tensor:
        return s

    def nearest(self, sigma: Tensor) -> Tensor:
        """Returns M - 1 - argmin_j |sigma - u_j|: the place of the nearest level in the rising table."""
        table = self.rising.to(sigma.device)
        middles = (table[1:] + table[:-1]) / 2
        return torch.searchsorted(middles, sigma.double().contiguous())

    def inputs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return ((t**2 + 1).rsqrt(), self.nearest(t).to(t.dtype)) if self.published else super().inputs(t)

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        used = self.M - self.j_0
        return self.rising.to(generator.device)[(stratified(n, generator) * used).long().clamp(max=used - 1)]

    def native(self, steps: int) -> Tensor:
        used = self.M - self.j_0
        if steps > used:
            raise ValueError(f"steps must be <= {used}, the levels of the table, got {steps}")
        places = (torch.linspace(0, used - 1, steps, dtype=torch.float64) + 0.5).floor().long()
        return to_zero(self.rising.cpu()[used - 1 - places])

    def below(self, sigma: Tensor) -> Tensor:
        """Returns the next lower level of the table; half the lowest below that one, since the chain ends at 0."""
        place = self.nearest(sigma)
        table = self.rising.to(sigma.device)
        return torch.where(place > 0, table[(place - 1).clamp(min=0)], table[0] / 2).to(sigma.dtype)


def iddpm_table(C_1: float, C_2: float, M: int) -> Tensor:
    """Returns u_0 .. u_M of `IDDPM`, falling to 0, `(M + 1,)` in float64."""

    def abar(j: int) -> float:
        return math.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2

    levels = [0.0]
    for j in range(M, 0, -1):
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(abar(j - 1) / abar(j), C_1) - 1))
    return torch.tensor(levels[::-1], dtype=torch.float64)
