"""The formulations of the literature; `base.py` says what a formulation is, and how to write one.

    formulation   alpha(t)                          sigma(t)              training times             prediction
    EDM           1                                 t                     ln t normal or uniform     edm
    VE            1                                 geometric in t        uniform                    score
    VP            exp(-(beta_d t^2 / 2 + beta_min t) / 2)   sqrt(1 - alpha^2)   uniform              noise
    DDPM          sqrt(abar_t)                      sqrt(1 - abar_t)      uniform integers           noise
    IDDPM         1                                 t, from a table       uniform over the table     noise
    Flow          1 - t                             t                     uniform or logit-normal    velocity
    OU            sqrt(1 - t^2)                     t                     uniform                    noise
    Interpolant   1 - t                             gamma sqrt(t (1 - t))  uniform                   velocity
    Regression    1                                 t                     the last alone             sample

`inputs=published` keeps c_in and c_noise of the paper, for networks that were made for them; `inputs=unit` takes an
input of unit variance and ln(s) / 4 for all.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from vecfield_diffusion.diffusion.base import Diffusion, Prediction, geometric, karras, stratified, to_zero
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.models.layers import FourierEmbedding
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.harmonic import harmonic_fill

Inputs = Literal["published", "unit"]
SigmaMax = float | Literal["auto"]


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
        inputs: `published` or `unit`; see the module.
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
        inputs: `published` or `unit`; see the module.
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
        inputs: `published` or `unit`; see the module.
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
        inputs: `published`, c_in = 1 and c_noise = t, or `unit`; see the module.
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
        inputs: `published` or `unit`; see the module.
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


class Flow(Diffusion):
    """Flow matching on straight paths: alpha = 1 - t, sigma = t (Lipman et al., ICLR 2023; Liu et al., ICLR 2023).

    The network predicts the velocity `eps - x0`, in units of its standard deviation.

    Arguments:
        sigma_min: The smallest noise level, s = t / (1 - t).
        sigma_max: The largest; see `EDM`.
        times: The law of the training times: `uniform`, or `logit_normal` (Esser et al., ICML 2024, section 3.1).
        logit_mean: Mean of ln(t / (1 - t)) = ln s where `times` is `logit_normal`.
        logit_std: Standard deviation of it.
        prediction: What the network predicts.
        sigma_data: The standard deviation of the normalised data.

    Raises:
        ValueError: Levels out of order, or a scale that is not positive.
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: SigmaMax = 80.0,
        times: Literal["uniform", "logit_normal"] = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        prediction: Prediction = "velocity",
        sigma_data: float = 1.0,
    ) -> None:
        low, high = levels_in_order(sigma_min, sigma_max)
        if logit_std <= 0:
            raise ValueError(f"logit_std must be > 0, got {logit_std}")
        super().__init__(low / (1 + low), high / (1 + high), prediction, sigma_data)
        self.times, self.logit_mean, self.logit_std = times, logit_mean, logit_std
        self.sample_times(1, torch.Generator())

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, s: Tensor) -> Tensor:
        return s / (1 + s)

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        if self.times == "uniform":
            return super().sample_times(n, generator)
        ends = (math.log(t / (1 - t)) for t in (self.t_min, self.t_max))
        return torch.sigmoid(cut_normal(stratified(n, generator), "logit_mean", self.logit_mean, self.logit_std, *ends))


class Interpolant(Diffusion):
    """The stochastic interpolant between the field and a first guess of it (Albergo et al., 2023, arXiv 2303.08797).

        x_t = (1 - t) x0 + t x1 + gamma sqrt(t (1 - t)) eps

    with x1 the harmonic fill of the observed cells, a smooth field through them (0 where nothing is observed). The
    network sees x1, and given x1 the difference `x_t - t x1` is a Gaussian path with alpha = 1 - t and
    sigma = gamma sqrt(t (1 - t)): it stands for x_t in all that follows, scaled to unit variance it is what the
    network sees, and every sampler serves it. The velocity that is predicted is its own, -x0 + gamma' eps, which is
    that of the interpolant less x1. Sampling starts from noise around x1.

    Arguments:
        gamma: The noise on the way.
        sigma_min: The smallest noise level, s = gamma sqrt(t / (1 - t)).
        sigma_max: The largest; see `EDM`.
        prediction: What the network predicts.
        sigma_data: The standard deviation of the normalised data.

    Raises:
        ValueError: Levels out of order, or a scale that is not positive.
    """

    coupled = True

    def __init__(
        self,
        gamma: float = 1.0,
        sigma_min: float = 0.002,
        sigma_max: SigmaMax = 80.0,
        prediction: Prediction = "velocity",
        sigma_data: float = 1.0,
    ) -> None:
        if gamma <= 0:
            raise ValueError(f"gamma must be > 0, got {gamma}")
        low, high = (level**2 / (gamma**2 + level**2) for level in levels_in_order(sigma_min, sigma_max))
        super().__init__(low, high, prediction, sigma_data)
        self.gamma = gamma

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return self.gamma * (t * (1 - t)).sqrt()

    def level(self, t: Tensor) -> Tensor:
        return self.gamma * (t / (1 - t)).sqrt()

    def time(self, s: Tensor) -> Tensor:
        return s**2 / (self.gamma**2 + s**2)

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # Times 2 sqrt(t (1 - t)), which is finite at both ends.
        return -2 * (t * (1 - t)).sqrt(), self.gamma * (1 - 2 * t)

    def native(self, steps: int) -> Tensor:
        return geometric(self.sigma_min, self.sigma_max, steps)  # even steps in t leave out what lies below s = 0.2

    def with_background(self, observation: Observation, grid: Grid) -> Observation:
        cells = observation.observed, observation.valid
        return replace(observation, background=harmonic_fill(observation.y, *cells, grid.periodic, grid.dx, grid.dy))


class Regression(Diffusion):
    """No diffusion, a baseline: the network sees the observation alone and gives the mean of the field, D = F(0, y).

    c_in = c_skip = 0 and c_out = 1 at every level, so that D is that of infinite noise, the loss is the mean squared
    error, and whatever the sampler, every member is the mean: `sampler.steps=1` is enough. There is no spread, and no
    derivative by the state for methods that ask for one.

    Arguments:
        conditioned_as: A formulation whose background the network sees as well; None for none.
    """

    noisy = False

    def __init__(self, conditioned_as: Diffusion | None = None) -> None:
        super().__init__(1.0, 1e3, "sample")
        self.conditioned_as = conditioned_as
        self.coupled = conditioned_as is not None and conditioned_as.coupled

    def with_background(self, observation: Observation, grid: Grid) -> Observation:
        return observation if self.conditioned_as is None else self.conditioned_as.with_background(observation, grid)

    def time(self, s: Tensor) -> Tensor:
        return s

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.full((n,), self.t_max, dtype=torch.float64, device=generator.device)

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        nothing = torch.zeros_like(t)
        return nothing, nothing, torch.ones_like(t), nothing


def levels_in_order(sigma_min: float, sigma_max: SigmaMax) -> tuple[float, float]:
    """Returns both levels. Raises ValueError where they are not numbers in order."""
    if sigma_max == "auto":
        raise ValueError("sigma_max must be a number here: 'auto' needs data, see data.statistics.measure")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min must be above 0 and below sigma_max={sigma_max}, got {sigma_min}")
    return sigma_min, sigma_max


def cut_normal(u: Tensor, name: str, mean: float, std: float, low: float, high: float) -> Tensor:
    """Returns numbers of the normal law cut to [low, high], none heaped up at its ends, from `u` uniform in [0, 1).

    Raises:
        ValueError: Next to nothing of the law lies in the range; `name` is what the mean is called.
    """
    ends = (torch.tensor([low, high], dtype=torch.float64) - mean) / std
    first, last = torch.special.ndtr(ends).tolist()
    if last - first < 1e-6:
        raise ValueError(f"{name} must lie near the range of the levels, {low:.3g} to {high:.3g}, got {mean}")
    return mean + std * torch.special.ndtri((first + u * (last - first)).double())
