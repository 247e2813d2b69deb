"""Networks that make a field in one to four evaluations.

**Consistency.** The probability-flow ODE takes every z at level s to one field, the end f(z, s) of its path: one
evaluation of f is a sample. Easy consistency tuning (Geng et al., ICLR 2025, arXiv 2406.14548) begins with a trained
denoiser and asks that f be the same at two levels of one path, z_s = x0 + s eps and z_r = x0 + r eps:

    loss = sqrt(|f(z_s, s) - f(z_r, r)|^2 / out^2 + c^2) - c,    over 1 - r / s,    the second f without a gradient.

r = 0 is denoising, f(x0, 0) = x0; then r / s = 1 - g with g = 1/2, 1/4, .. 2^-n over the run. Two points with the same
x0 and eps lie on one path on average alone. For a Gaussian mode of variance v the minimiser is f(z_s) = a_s z_s with

    a_s = a_r (v + s r) / (v + s^2),    of the flow map    a_s = sqrt(v / (v + s^2)),

which is the same to first order in g; down from high noise the standard deviation comes out g / 4 too small. Around a
Gaussian field (`models/gaussian.py`) f begins as the flow map of that field given the observation, in closed form.

**CRPS.** A generator x = f(eps; y) of one evaluation, trained on the fair continuous ranked probability score

    mean_m |x_m - x0| - 1 / (2 M (M - 1)) sum_{m, n} |x_m - x_n|

of M members of the same observation (Gneiting & Raftery, JASA 2007; Ferro, QJRMS 2014; so trained are Lang et al.,
AIFS-CRPS, 2024, arXiv 2412.15832). Its expectation is least where every value of a member has the conditional law of
that value; how values hang together it does not see.

Neither gives E[x0 | x_t], which mmps, pigdm, dps, physics, guidance and likelihood build on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from vecfield_diffusion.axes import column
from vecfield_diffusion.diffusion.base import Diffusion, stratified, to_zero
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.losses import mean_measured
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.physics.grid import Grid


class FewSteps(Diffusion, ABC):
    """A formulation whose network gives a field in place of the mean of all; see the module.

    Attributes:
        members: The members that a sample is scored with.
    """

    gives_mean = False
    members: int = 2

    @abstractmethod
    def loss(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        measured: Tensor,
        observation: Observation,
        t: Tensor,
        noise: Tensor,
        progress: float,
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of every sample, `(B,)`, and the fields that the network gave, `(B, 2, H, W)`.

        Arguments:
            denoiser: The network with this formulation.
            x0: Clean normalised fields `(B, 2, H, W)`; anything, NaN included, where not measured.
            measured: The cells where `x0` is known, boolean `(B, 1, H, W)`.
            observation: What the network is conditioned on.
            t: Times of the formulation, `(B,)`.
            noise: Unit normal noise of `members` fields of each sample, `(M, B, 2, H, W)`.
            progress: The share of the training that is done.
        """

    def generate(self, denoiser: Denoiser, observation: Observation, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Returns fields `(B, 2, H, W)` made in one evaluation of unit noise, and what their output counts, `(B,)`."""
        s = noise.new_full((len(noise),), self.sigma_max)
        start = 0.0 if observation.background is None else observation.background
        field, _, out, *_ = denoiser.estimate(start + self.sigma_max * noise, s, observation)
        return field, out

    def score(
        self, denoiser: Denoiser, x0: Tensor, measured: Tensor, observation: Observation, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the fair CRPS of `members` fields, `(B,)`, one of them, and what its output counts; see `loss`."""
        made = [self.generate(denoiser, observation, eps) for eps in noise]
        members, truth = torch.stack([field for field, _ in made]), torch.where(measured, x0, 0.0)
        score = mean_measured(fair_crps(members, truth), measured)
        return score, *made[0]


class Consistency(FewSteps):
    """Easy consistency tuning along the path of a trained network; see the module.

    Arguments:
        formulation: That of this network, which `ckpt=` of the training program puts here; EDM if None.
        halvings: n: the gap g halves from 1/2 to 2^-n over the run.
        low: Levels below this one, in standard deviations of the data, are taken for 0.
        huber: c: squares of this size and below count as such, larger ones by their root.

    Raises:
        ValueError: A number that is not positive, or a formulation that is one of few steps itself.
    """

    tunes = True

    def __init__(
        self, formulation: Diffusion | None = None, halvings: int = 6, low: float = 0.01, huber: float = 0.03
    ) -> None:
        path = EDM() if formulation is None else formulation
        for name, value in (("halvings", halvings), ("low", low), ("huber", huber)):
            if value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        if not (path.gives_mean and path.noisy):
            raise ValueError("formulation must be that of a diffusion model, which gives E[x0 | x_t]")
        super().__init__(path.t_min, path.t_max, path.prediction, path.sigma_data)
        self.path, self.halvings, self.low, self.huber = path, halvings, low, huber
        self.learned_variance, self.coupled, self.rho = path.learned_variance, path.coupled, path.rho

    def alpha(self, t: Tensor) -> Tensor:
        return self.path.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.path.sigma(t)

    def level(self, t: Tensor) -> Tensor:
        return self.path.level(t)

    def time(self, s: Tensor) -> Tensor:
        return self.path.time(s)

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.path.preconditioning(t)

    def with_background(self, observation: Observation, grid: Grid) -> Observation:
        return self.path.with_background(observation, grid)

    def native(self, steps: int) -> Tensor:
        return self.path.native(steps)

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Returns times whose levels are even in ln s from `low` to the largest."""
        ends = math.log(max(self.low, self.sigma_min)), math.log(self.sigma_max)
        return self.time(torch.exp(ends[0] + stratified(n, generator) * (ends[1] - ends[0])))

    def lower(self, s: Tensor, progress: float) -> Tensor:
        """Returns the levels r that levels `s` are compared with when a share of the training is done."""
        gap = 0.5 ** min(1 + math.floor(progress * self.halvings), self.halvings)
        r = s * (1 - gap)
        return torch.where(r < self.low, 0.0, r)

    def loss(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        measured: Tensor,
        observation: Observation,
        t: Tensor,
        noise: Tensor,
        progress: float,
    ) -> tuple[Tensor, Tensor]:
        x0 = torch.where(measured, x0, 0.0)
        level = self.level(t)
        s, r = (each.to(x0.dtype) for each in (level, self.lower(level, progress)))
        # The same features are dropped at both levels.
        with torch.no_grad(), torch.random.fork_rng([x0.device] if x0.device.type == "cuda" else []):
            near = denoiser(x0 + column(r, x0) * noise[0], torch.where(r > 0, r, s), observation)
        aim = torch.where(column(r > 0, x0), near, x0)
        field, _, out, *_ = denoiser.estimate(x0 + column(s, x0) * noise[0], s, observation)
        square = mean_measured((field - aim).square(), measured) / out.square()
        return ((square + self.huber**2).sqrt() - self.huber) / (1 - r / s), field


class CRPS(FewSteps):
    """An ensemble made in one evaluation, trained on the fair CRPS; see the module.

    Arguments:
        members: M, the members that a sample is trained with.
        level: The level of the noise that the network sees, in standard deviations of the data: so high that noise
            alone is as good as a noisy field.

    Raises:
        ValueError: Fewer than two members, or a level that is not above 1.
    """

    most_steps = 1

    def __init__(self, members: int = 2, level: float = 1e4) -> None:
        if members < 2:
            raise ValueError(f"members must be >= 2, the fair CRPS compares them, got {members}")
        if level <= 1:
            raise ValueError(f"level must be > 1, got {level}")
        super().__init__(1.0, level, "sample")
        self.members = members

    def time(self, s: Tensor) -> Tensor:
        return s

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.full((n,), self.t_max, dtype=torch.float64, device=generator.device)

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return 1 / t, t.log() / 4, torch.ones_like(t), torch.zeros_like(t)

    def native(self, steps: int) -> Tensor:
        return to_zero(torch.tensor([self.sigma_max], dtype=torch.float64).expand(steps))

    def loss(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        measured: Tensor,
        observation: Observation,
        t: Tensor,
        noise: Tensor,
        progress: float,
    ) -> tuple[Tensor, Tensor]:
        score, field, out = self.score(denoiser, x0, measured, observation, noise)
        return score / out, field


def fair_crps(members: Tensor, truth: Tensor) -> Tensor:
    """Returns the fair CRPS of every value of `truth` `(...)`, from members `(M, ...)`, M at least 2."""
    count = len(members)
    error = (members - truth).abs().mean(dim=0)
    # The sum over all pairs: the k-th smallest member is above k others and below the rest.
    order = column(2.0 * torch.arange(count, device=members.device) - (count - 1), members).to(members)
    return error - (order * members.sort(dim=0).values).sum(dim=0) / (count * (count - 1))
