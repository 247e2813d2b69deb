"""What every diffusion formulation is: how noise grows, where the network is trained, how its input and output scale.

Every Gaussian path `x_t = alpha(t) x0 + sigma(t) eps` is one problem in the variables

    s = sigma / alpha        (noise level)        z = x_t / alpha = x0 + s eps,

so denoisers and samplers speak `(z, s)` and a formulation owns what is left: the path, the training times, the loss
weight, the preconditioning and the levels that a sampler walks down. The preconditioner

    D(z, s) = c_skip x_t + c_out F(c_in x_t, c_noise)

turns the raw network F into the posterior mean D = E[x0 | x_t]. What F stands for is the prediction. With sd the
standard deviation of the data and a dot for d/dt,

    prediction   F is                                        c_skip                c_out
    noise        eps                                         1 / alpha             -sigma / alpha
    score        sigma grad log p(x_t) = -E[eps | x_t]       1 / alpha             +sigma / alpha
    sample       x0 / sd                                     0                     sd
    velocity     (alpha' x0 + sigma' eps) / |v|              sigma' / w            -sigma |v| / w
    edm          the mix whose error D amplifies least       alpha sd^2 c_in^2     sigma sd c_in

    c_in = 1 / sqrt(alpha^2 sd^2 + sigma^2),    |v| = sqrt(alpha'^2 sd^2 + sigma'^2),    w = alpha sigma' - sigma alpha'

each of which gives F a target of unit variance at every level (noise: Ho et al., NeurIPS 2020; velocity: Salimans & Ho,
ICLR 2022, and Lipman et al., ICLR 2023; edm: Karras et al., NeurIPS 2022, appendix B.6, written for any alpha). The
velocity is that of the path, so it does not depend on how time is counted. The training loss of every formulation is
the squared error of F, which is that of D with the weight 1 / c_out^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vecfield_diffusion.diffusion.observation import Observation
    from vecfield_diffusion.physics.grid import Grid

Prediction = Literal["noise", "sample", "velocity", "score", "edm"]
ScheduleName = Literal["native", "karras", "log_snr", "uniform_t"]
#: Whether c_in and c_noise are those of the paper; see `formulations`.
Inputs = Literal["published", "unit"]
SigmaMax = float | Literal["auto"]
#: A number, or one for each sample.
Level = TypeVar("Level", float, Tensor)


class Diffusion(nn.Module):
    """One formulation. `t` is its own time, a float tensor of any shape; `s` is the noise level.

    A path of your own is a subclass with `alpha` and `sigma`, a preconditioner of your own one with `preconditioning`;
    all else follows from them. The level must rise with t; to the denoising loss alpha and sigma are constants: a path
    that is learned has a loss of its own, `schedule_loss`.

    Arguments:
        t_min: The time of the lowest noise level that the network is trained on.
        t_max: The time of the highest.
        prediction: What the network predicts; see the module.
        sigma_data: The standard deviation of the normalised data.

    Raises:
        ValueError: Times out of order, a prediction that there is not, or a standard deviation that is not positive.
    """

    #: Whether the network gives, beside the mean, where the reverse variance lies between its bounds.
    learned_variance: bool = False
    #: Whether the path is trained beside the network, by `schedule_loss(s, square) -> (B,)`.
    learned_schedule: bool = False
    #: Whether the path runs through the background of the observation, which the network then sees.
    coupled: bool = False
    #: Whether there are noisy fields that a network could learn from; a regression has none.
    noisy: bool = True
    #: Whether the denoiser gives E[x0 | z], which guidance builds on; a network of few steps gives one field instead.
    gives_mean: bool = True
    #: Whether training begins with the weights of a network that was trained before.
    tunes: bool = False
    #: The most evaluations that a field is made in; None for any number.
    most_steps: int | None = None
    #: The exponent of the `karras` schedule.
    rho: float = 7.0

    def __init__(
        self,
        t_min: float = 1e-3,
        t_max: float = 1.0,
        prediction: Prediction = "edm",
        sigma_data: float = 1.0,
    ) -> None:
        super().__init__()
        if not t_min < t_max:
            raise ValueError(f"t_min must be below t_max={t_max}, got {t_min}")
        if prediction not in HEADS:
            raise ValueError(f"prediction must be one of {', '.join(HEADS)}, got {prediction}")
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be > 0, got {sigma_data}")
        self.t_min, self.t_max, self.prediction, self.sigma_data = t_min, t_max, prediction, sigma_data
        #: u(c_noise), the logarithm of the loss that is to be expected at a level; see `EDM`.
        self.uncertainty: nn.Module | None = None
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    # The path.

    def alpha(self, t: Tensor) -> Tensor:
        """Returns the share alpha(t) of the data in x_t."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Returns the share sigma(t) of the noise in x_t."""
        return t

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the direction `(alpha', sigma')` of the path, up to a positive factor.

        Here by automatic differentiation.
        """
        return derivative(self.alpha, t), derivative(self.sigma, t)

    def level(self, t: Tensor) -> Tensor:
        """Returns the noise level s(t) = sigma(t) / alpha(t)."""
        return self.sigma(t) / self.alpha(t)

    def time(self, s: Tensor) -> Tensor:
        """Returns the time t at which the noise level is `s`, the inverse of `level`.

        Here by a table of ln s and secant steps. The table goes on beyond the range as far as the path does, since some
        steps of a sampler look there; a level beyond the table has the time of its end.
        """
        nodes, logs = self._table(s.device)
        log_s = s.double().log().clamp(logs[0], logs[-1])
        low = (torch.searchsorted(logs, log_s.contiguous(), right=True) - 1).clamp(0, len(nodes) - 2)
        start, end = nodes[low], nodes[low + 1]
        slope = (end - start) / (logs[low + 1] - logs[low])
        t = start + slope * (log_s - logs[low])
        for _ in range(8):
            t = (t + slope * (log_s - self.level(t).log())).clamp(start, end)
        return t.to(s.dtype)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns times, and ln s at them: 4096 intervals over the range, and more on both sides.

        Made once on a device.
        """
        if device not in self._tables:
            self._tables[device] = self._tabulate(device)
        return self._tables[device]

    def _tabulate(self, device: torch.device) -> tuple[Tensor, Tensor]:
        where = {"dtype": torch.float64, "device": device}
        inside = torch.linspace(self.t_min, self.t_max, 4097, **where)
        above = self.t_max + (self.t_max - self.t_min) * torch.linspace(0, 0.5, 2049, **where)[1:]
        below = self.t_min * torch.logspace(-3, 0, 257, **where)[:-1] if self.t_min > 0 else inside[:0]
        nodes = torch.cat([below, inside, above])
        logs = self.level(nodes).log()
        faults = (~(logs[:-1].isfinite() & logs[1:].isfinite() & (logs.diff() > 0))).nonzero()[:, 0]
        # The rising stretch that holds the range.
        first = int(faults[faults < len(below)].max()) + 1 if (faults < len(below)).any() else 0
        beyond = faults[faults >= len(below)]
        last = int(beyond.min()) if len(beyond) else len(nodes) - 1
        if last < len(below) + len(inside) - 1:
            raise ValueError(
                f"the level sigma(t) / alpha(t) must be positive, finite and rise with t from t_min={self.t_min} to "
                f"t_max={self.t_max}"
            )
        return nodes[first : last + 1], logs[first : last + 1]

    @cached_property
    def sigma_min(self) -> float:
        """The smallest noise level that the network is trained on."""
        return self.level(torch.tensor(self.t_min, dtype=torch.float64)).item()

    @cached_property
    def sigma_max(self) -> float:
        """The largest noise level that the network is trained on."""
        return self.level(torch.tensor(self.t_max, dtype=torch.float64)).item()

    # Training.

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Returns `(n,)` training times in float64, drawn on the generator's device; here uniform over the range."""
        return self.t_min + (self.t_max - self.t_min) * stratified(n, generator)

    def weight(self, t: Tensor) -> Tensor:
        """Returns the weight of the squared error of D in the training loss: 1 / c_out^2, the squared error of F."""
        return self.preconditioning(t)[2] ** -2

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns `(c_in, c_noise, c_out, c_skip)` at times `t`, in the variables of x_t."""
        return *self.inputs(t), *HEADS[self.prediction](self, t)

    def inputs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `(c_in, c_noise)`: an input of unit variance, and ln(s) / 4 (Karras et al., 2022, table 1)."""
        return (self.alpha(t) ** 2 * self.sigma_data**2 + self.sigma(t) ** 2).rsqrt(), self.level(t).log() / 4

    def with_background(self, observation: Observation, grid: Grid) -> Observation:
        """Returns the observation with the background that the path runs through; here none is needed."""
        return observation

    # Sampling.

    def levels(self, steps: int, schedule: ScheduleName = "native") -> Tensor:
        """Returns `(steps + 1,)` levels from `sigma_max` down to 0 in float64.

        Arguments:
            steps: The number of steps.
            schedule: `native` is the formulation's own; `karras` spaces the rho-th roots evenly, `log_snr` ln s, and
                `uniform_t` the time of the formulation.

        Raises:
            ValueError: More steps than the formulation has levels, or a schedule of another name.
        """
        if schedule not in get_args(ScheduleName):
            raise ValueError(f"schedule must be one of {', '.join(get_args(ScheduleName))}, got {schedule}")
        if schedule == "karras":
            return karras(self.sigma_min, self.sigma_max, steps, self.rho)
        if schedule == "log_snr":
            return geometric(self.sigma_min, self.sigma_max, steps)
        return self.native(steps) if schedule == "native" else self.uniform(steps)

    def native(self, steps: int) -> Tensor:
        """Returns the formulation's own schedule of sampling; see `levels`."""
        return self.uniform(steps)

    def uniform(self, steps: int, t_min: float | None = None) -> Tensor:
        """Returns levels at times evenly spaced from `t_max` to `t_min`, and 0."""
        last = self.t_min if t_min is None else t_min
        return to_zero(self.level(torch.linspace(self.t_max, last, steps, dtype=torch.float64)))


# Predictions: `(c_out, c_skip)` of each; see the module.


def _noise(diffusion: Diffusion, t: Tensor) -> tuple[Tensor, Tensor]:
    return -diffusion.level(t), 1 / diffusion.alpha(t)


def _score(diffusion: Diffusion, t: Tensor) -> tuple[Tensor, Tensor]:
    return diffusion.level(t), 1 / diffusion.alpha(t)


def _sample(diffusion: Diffusion, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(t, diffusion.sigma_data), torch.zeros_like(t)


def _velocity(diffusion: Diffusion, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = diffusion.alpha(t), diffusion.sigma(t)
    d_alpha, d_sigma = diffusion.velocity(t)
    speed = (d_alpha**2 * diffusion.sigma_data**2 + d_sigma**2).sqrt()
    w = alpha * d_sigma - sigma * d_alpha
    return -sigma * speed / w, d_sigma / w


def _edm(diffusion: Diffusion, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma, sd = diffusion.alpha(t), diffusion.sigma(t), diffusion.sigma_data
    variance = alpha**2 * sd**2 + sigma**2
    return sigma * sd * variance.rsqrt(), alpha * sd**2 / variance


HEADS: dict[str, Callable[[Diffusion, Tensor], tuple[Tensor, Tensor]]] = {
    "noise": _noise,
    "sample": _sample,
    "velocity": _velocity,
    "score": _score,
    "edm": _edm,
}


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Returns the derivative of a function of each element of `t`."""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        value = function(t)
        return torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)


def reverse_variances(s: Level, r: Level) -> tuple[Level, Level]:
    """Returns `(small, large)`: the variance of z at level `r` given z at level `s > r`, for two extremes of the data.

    Small, `r^2 (1 - r^2 / s^2)`, is that of a known x0; large, `(1 + r^2)(s^2 - r^2) / (1 + s^2)`, that of data of unit
    variance. On a variance-preserving path they are the two choices of Ho et al. (NeurIPS 2020, section 3.2).
    """
    return r**2 * (1 - (r / s) ** 2), (1 + r**2) * (s**2 - r**2) / (1 + s**2)


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """Returns `n` numbers uniform in [0, 1), one in each of `n` equal parts, in random order, in float64.

    Each is uniform by itself; together they cover the unit interval, which lowers the variance of a batch's loss
    (Kingma et al., Variational Diffusion Models, NeurIPS 2021, appendix I.1).
    """
    parts = torch.randperm(n, generator=generator, device=generator.device)
    return (parts + torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)) / n


def to_zero(levels: Tensor) -> Tensor:
    """Returns the levels, and 0."""
    return torch.cat([levels, levels.new_zeros(1)])


def geometric(sigma_min: float, sigma_max: float, steps: int) -> Tensor:
    """Returns `(steps + 1,)` levels evenly spaced in ln s, and 0."""
    return to_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64).exp())


def karras(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> Tensor:
    """Returns `(steps + 1,)` levels with rho-th roots evenly spaced, and 0 (Karras et al., 2022, equation 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    roots = sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    return to_zero(roots**rho)


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
