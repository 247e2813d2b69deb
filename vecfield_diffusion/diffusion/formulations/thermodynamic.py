"""The variance-preserving path told as a bath whose temperature T(t) = beta(t) / 2 rises from T_min to T_max.

    dx = -T x dt + sqrt(2 T) dW,    alpha = exp(-integral of T),    s^2 = exp(B) - 1,    B(t) = 2 integral_0^t T dt',

so that x_t relaxes to N(0, I), the sooner the hotter. All schedules of T end at the same noise, `s(1) = sigma_max`,
which the data ask for, and differ in how time is spent on the way; with R = T_max / T_min

    schedule       T(t) / T_min                       B(t) is proportional to
    constant       1                                  t
    linear         1 + (R - 1) t                      t + (R - 1) t^2 / 2
    exponential    R^t                                (R^t - 1) / ln R
    cosine         1 + (R - 1) (1 - cos pi t) / 2     t + (R - 1) (t - sin(pi t) / pi) / 2
    learned        as the data ask for                see `Learned`

`linear` with R = 200 and sigma_max = 152 is VP with its published numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecfield_diffusion.diffusion.base import Prediction, SigmaMax, levels_in_order
from vecfield_diffusion.diffusion.formulations.preserving import VariancePreserving

Schedule = Literal["constant", "linear", "exponential", "cosine", "learned"]


class Rise(NamedTuple):
    """How a temperature rises, as functions of times and of R = T_max / T_min.

    `rate` is T(t) / T_min, `area` its integral from 0 to t, and `time` the inverse of that.
    """

    rate: Callable[[Tensor, float], Tensor]
    area: Callable[[Tensor, float], Tensor]
    time: Callable[[Tensor, float], Tensor]


def cosine_area(t: Tensor, R: float) -> Tensor:
    """Returns the integral of `1 + (R - 1) (1 - cos pi t) / 2` from 0 to t."""
    return t + (R - 1) * (t - torch.sin(math.pi * t) / math.pi) / 2


def cosine_rate(t: Tensor, R: float) -> Tensor:
    """Returns `1 + (R - 1) (1 - cos pi t) / 2`."""
    return 1 + (R - 1) * (1 - torch.cos(math.pi * t)) / 2


def cosine_time(area: Tensor, R: float) -> Tensor:
    """Returns the inverse of `cosine_area`, by Newton's steps, which all come from one side."""
    t = area.clamp(max=1.0)
    for _ in range(20):
        t = t - (cosine_area(t, R) - area) / cosine_rate(t, R)
    return t


RISES = {
    "constant": Rise(lambda t, R: torch.ones_like(t), lambda t, R: t, lambda area, R: area),
    "linear": Rise(
        lambda t, R: 1 + (R - 1) * t,
        lambda t, R: t + (R - 1) * t**2 / 2,
        lambda area, R: 2 * area / (1 + (1 + 2 * (R - 1) * area).sqrt()),
    ),
    "exponential": Rise(
        lambda t, R: R**t,
        lambda t, R: torch.expm1(t * math.log(R)) / math.log(R),
        lambda area, R: torch.log1p(area * math.log(R)) / math.log(R),
    ),
    "cosine": Rise(cosine_rate, cosine_area, cosine_time),
}


class Thermodynamic(VariancePreserving):
    """A bath of rising temperature; see the module. Inputs of unit variance and c_noise = ln(s) / 4.

    Arguments:
        schedule: How the temperature rises.
        ratio: R, the highest temperature over the lowest; of no effect for `constant` and `learned`.
        sigma_min: The smallest noise level.
        sigma_max: The largest; see `EDM`.
        prediction: What the network predicts.
        sigma_data: The standard deviation of the normalised data.

    Raises:
        ValueError: A schedule of another name, levels out of order, or a ratio that is not above 1.
    """

    published = False

    def __init__(
        self,
        schedule: Schedule = "linear",
        ratio: float = 200.0,
        sigma_min: float = 0.002,
        sigma_max: SigmaMax = 80.0,
        prediction: Prediction = "noise",
        sigma_data: float = 1.0,
    ) -> None:
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}, got {schedule}")
        if not 1 < ratio < math.inf:
            raise ValueError(f"ratio must be > 1, the highest temperature over the lowest, got {ratio}")
        low, high = levels_in_order(sigma_min, sigma_max)
        self.schedule, self.ratio = schedule, ratio
        self.rise = RISES.get(schedule)
        if self.rise is not None:
            one = torch.ones((), dtype=torch.float64)
            #: T_min, by which the area grows to B(1) = ln(1 + sigma_max^2) = 2 T_min area(1).
            self.coldest = math.log1p(high**2) / 2 / self.rise.area(one, ratio).item()
        first = 0.0 if self.rise is None else self._time(torch.tensor(low, dtype=torch.float64)).item()
        super().__init__(first, 1.0, prediction, sigma_data)
        self.learned = Learned(low, high) if schedule == "learned" else None
        self.learned_schedule = schedule == "learned"

    def _time(self, s: Tensor) -> Tensor:
        return self.rise.time(torch.log1p(s**2) / (2 * self.coldest), self.ratio)

    def temperature(self, t: Tensor) -> Tensor:
        """Returns T(t) = beta(t) / 2, per unit of the formulation's time."""
        if self.learned is None:
            return self.coldest * self.rise.rate(t, self.ratio)
        s = self.level(t)
        return (s**2 / (1 + s**2) / self.learned.density(s)).to(t.dtype)

    def level(self, t: Tensor) -> Tensor:
        if self.learned is not None:
            return self.learned.level(t)
        return torch.expm1(2 * self.coldest * self.rise.area(t, self.ratio)).sqrt()

    def time(self, s: Tensor) -> Tensor:
        return self._time(s) if self.learned is None else self.learned.time(s)

    def schedule_loss(self, s: Tensor, square: Tensor) -> Tensor:
        """Returns what trains the schedule, `(B,)`: of value 0, with a gradient; see `Learned`.

        Arguments:
            s: Levels drawn uniformly in t, `(B,)`.
            square: The mean squared errors of D at them, `(B,)`.
        """
        return self.learned.loss(s, square)


class Learned(nn.Module):
    """Time as a monotone function of ln s, trained with the network so that entropy grows at the same rate in time.

    The entropy of x0 given z grows with ln s by the mean squared error of D over s^2, summed over the values (Guo et
    al., IEEE Trans. Inf. Theory 51, 1261, 2005): what one denoises. Time is piecewise linear in ln s, over `BINS` equal
    parts, with increments p_k that are softplus functions of parameters over their sum. With g_k the rate of part k,

        minimise  -sum_k g_k ln p_k,    which p_k = g_k / sum g solves,

    a cross-entropy, and convex in ln p; a level drawn uniformly in time estimates it by `-(g / p_k) ln p_k`, the
    factor held fixed. Nothing else trains the increments: the denoising loss takes levels as they are. So that no level
    goes untrained, `EVEN` of the time is spread evenly over ln s.

    The schedule that it is to recover is known where the errors are: for N(0, S) the rate is the trace of
    `S (S + s^2 I)^-1`, and t(s) its integral over ln s. A schedule counts as recovered where t(s) differs by less than
    .02 of all time at every level (tests/test_thermodynamic.py).

    Arguments:
        low: The level at t = 0.
        high: The level at t = 1.
    """

    #: The parts of ln s, and the share of the time that they have evenly.
    BINS, EVEN = 32, 0.05
    #: The parameters are multiplied by `GAIN`, so that they keep pace with a network at its learning rate, and their
    #: gradient by `SHARE`, so that it takes no part of what clipping leaves of the network's.
    GAIN, SHARE = 10.0, 0.01

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.first, self.width = math.log(low), math.log(high / low) / self.BINS
        self.increments = nn.Parameter(torch.zeros(self.BINS))

    def shares(self) -> Tensor:
        """Returns the time of each part, `(BINS,)` in float64, 1 in all."""
        increments = F.softplus(self.GAIN * self.increments.double())
        return torch.lerp(increments / increments.sum(), torch.full_like(increments, 1 / self.BINS), self.EVEN)

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Returns the times at the ends of the parts and ln s there, `(BINS + 1,)` each, as constants."""
        shares = self.shares().detach()
        logs = self.first + self.width * torch.arange(self.BINS + 1, dtype=torch.float64, device=shares.device)
        return F.pad(shares.cumsum(0), (1, 0)), logs

    def part(self, s: Tensor) -> Tensor:
        """Returns the part that each level lies in; those beyond the ends count to the first and the last."""
        return ((s.double().log() - self.first) / self.width).floor().clamp(0, self.BINS - 1).long()

    def density(self, s: Tensor) -> Tensor:
        """Returns dt / d ln s at levels `s`."""
        return self.shares().detach()[self.part(s)] / self.width

    def time(self, s: Tensor) -> Tensor:
        """Returns the time of levels; beyond the ends it goes on as in the first and the last part."""
        times, logs = self._at(s)
        return interpolate(s.double().log(), logs, times, self.part(s)).to(s.dtype)

    def level(self, t: Tensor) -> Tensor:
        """Returns the level at times."""
        times, logs = self._at(t)
        low = (torch.searchsorted(times, t.double().contiguous(), right=True) - 1).clamp(0, self.BINS - 1)
        return interpolate(t.double(), times, logs, low).exp().to(t.dtype)

    def _at(self, like: Tensor) -> tuple[Tensor, Tensor]:
        times, logs = self.nodes()
        return times.to(like.device), logs.to(like.device)

    def loss(self, s: Tensor, square: Tensor) -> Tensor:
        """See `Thermodynamic.schedule_loss`."""
        share = self.shares()[self.part(s)]
        rate = (square.double() / s.double() ** 2).detach()
        entropy = -self.SHARE * self.width * rate / share.detach() * share.log()
        return (entropy - entropy.detach()).to(square.dtype)


def interpolate(x: Tensor, places: Tensor, values: Tensor, low: Tensor) -> Tensor:
    """Returns the line through the nodes `low` and `low + 1` at `x`."""
    slope = (values[low + 1] - values[low]) / (places[low + 1] - places[low])
    return values[low] + slope * (x - places[low])
