"""The training loss of a conditional diffusion model: the denoising loss, and terms that may stand beside it.

For a time t drawn by the formulation, `x_t = alpha x0 + sigma eps`, and

    loss = weight(t) mean_measured (D(x_t / alpha, s, y) - x0)^2,

the mean taken over the cells where the truth is known and both components (Karras et al., NeurIPS 2022, equation 2).
A weight that is not a formulation's own is 1 / out^2 of the parametrization (`models/base.py`): the squared error of
the output of the network, whatever it stands for.
Training adds what a formulation learns beside the mean: the variational bound of a learned reverse variance, the
uncertainty of the levels, and a schedule that is learned. Of a network that estimates the averaged field on
its way (`models/cascade.py`) the error of that is added. Where the network predicts the mean mu(y) and denoises what it
misses, mu is a constant in all this, and its own mean squared error is added with the weight 1: the two share no
weights, each learns from its own.

With J = dD/dz, d values and the sign vector v, the other terms of a weighted sum (`Loss`) are

    sliced          weight(t) (|D - z|^2 + 2 s^2 v^T J v - s^2 d) / d, which has the mean of the denoising loss and
                    needs no x0 (Hyvarinen, 2005; Song et al., UAI 2019, equation 8, by s^4: the score is (D - z) / s^2)
    exact           weight(t) mean_measured (D - E[x0 | z, y])^2, where the law of the fields is known
    consistency     (mean of dU/d ln s)^2 for each value, of a network with an energy U = -ln p: with Z the integral of
                    exp(-U) it is (d ln Z / d ln s)^2, and 0 for an energy that is normalised alike at every level
    budget          how far the kinetic energy of a sequence changes otherwise than by viscosity and forcing
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vecfield_diffusion.axes import column, total
from vecfield_diffusion.diffusion.base import reverse_variances
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.models.cascade import averaged

#: `x_hat (B, 2, H, W), s (B,) -> (B,)`, such as the energy of what physics knows.
Penalty = Callable[[Tensor, Tensor], Tensor]

#: Half of the step in ln s over which the derivative of an energy by the level is taken.
STEP = 0.02


class Evaluated(NamedTuple):
    """What a term of the loss sees of a batch, normalised.

    Arguments:
        denoiser: What is trained.
        x0: The clean fields `(B, 2, H, W)`, 0 where not measured.
        measured: The cells where they are known, boolean `(B, 1, H, W)`.
        observation: What the network is conditioned on.
        s: The noise levels, `(B,)`.
        z: The noisy fields.
        x_hat: The estimate of the clean ones.
        weight: That of the squared error of the estimate, `(B,)`.
    """

    denoiser: Denoiser
    x0: Tensor
    measured: Tensor
    observation: Observation
    s: Tensor
    z: Tensor
    x_hat: Tensor
    weight: Tensor


#: A term of the loss, of every sample: `(B,)`.
Term = Callable[[Evaluated], Tensor]


@dataclass(frozen=True)
class Loss:
    """The weights of the terms of the training loss, see the module; 0 leaves a term out.

    Arguments:
        denoising: Of the squared error of the estimate, and of what a formulation learns beside it.
        sliced: Of sliced score matching.
        exact: Of the squared error against the exact posterior mean, of generated Gaussian fields.
        dual: Of the derivative of the energy by the noise level, of networks with one; see `diffusion/dual.py`.
        consistency: Of the derivative of the free energy by the noise level, of networks with an energy.
        budget: Of the energy budget of sequences.
        viscosity: nu of the budget, in m^(2 order) s^-1; `auto` is that of generated flows.
        order: The power of the Laplacian that nu belongs to; `auto` is that of generated flows.
        forcing: The kinetic energy that the flow is given, in m^2 s^-3.

    Raises:
        ValueError: A weight or a viscosity below 0, an order below 1, or weights that are all 0.
    """

    denoising: float = 1.0
    sliced: float = 0.0
    exact: float = 0.0
    dual: float = 0.0
    consistency: float = 0.0
    budget: float = 0.0
    viscosity: float | Literal["auto"] = "auto"
    order: int | Literal["auto"] = "auto"
    forcing: float = 0.0

    def __post_init__(self) -> None:
        for name, value in {**self.weights, "viscosity": self.viscosity}.items():
            if value != "auto" and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be >= 0, got {value}")
        if self.order != "auto" and self.order < 1:
            raise ValueError(f"order must be >= 1, got {self.order}")
        if not any(self.weights.values()):
            raise ValueError("denoising must be > 0 where no other term has a weight, got 0")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term by its name."""
        return {term.name: getattr(self, term.name) for term in fields(self) if term.name not in KNOWN}


#: The arguments of `Loss` that are no weights.
KNOWN = ("viscosity", "order", "forcing")


@dataclass(frozen=True)
class Objective:
    """What training minimises.

    Arguments:
        denoising: The weight of the denoising loss.
        terms: The weight of each other term, and the term.
        differentiates: Whether a term differentiates the denoiser, which then computes in float32.
    """

    denoising: float = 1.0
    terms: Sequence[tuple[float, Term]] = ()
    differentiates: bool = False

    @contextmanager
    def ready(self, denoiser: Denoiser) -> Iterator[Denoiser]:
        """The denoiser as the terms need it: one that can be differentiated twice, where one of them asks for it."""
        if not self.differentiates:
            yield denoiser
            return
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
            yield denoiser.in_float32()


#: The denoising loss alone.
DENOISING = Objective()


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    measured: Tensor,
    observation: Observation,
    t: Tensor,
    noise: Tensor,
    training: bool = False,
    penalty: Penalty | None = None,
    objective: Objective = DENOISING,
) -> Tensor:
    """Returns the loss of every sample, `(B,)`.

    Arguments:
        x0: Clean normalised fields `(B, 2, H, W)`; anything, NaN included, where not measured.
        measured: The cells where `x0` is known, boolean `(B, 1, H, W)`.
        observation: What the network is conditioned on.
        t: Times of the formulation, `(B,)`.
        noise: Unit normal noise, `(B, 2, H, W)`.
        training: Whether to add what is learned beside the mean.
        penalty: What is added for the estimate of the clean fields.
        objective: The weights of the terms, in training.
    """
    with objective.ready(denoiser) as denoiser:
        diffusion = denoiser.diffusion
        x0 = torch.where(measured, x0, 0.0)
        level = diffusion.level(t)
        s = level.to(x0.dtype)
        z = x0 + column(s, x0) * noise
        z = z.requires_grad_() if objective.differentiates else z
        mean = denoiser.mean(observation)
        x_hat, fraction, out, _, coarse = denoiser.estimate(z, s, observation, mean)
        weight = denoiser.weight(level, out)
        seen = Evaluated(denoiser, x0, measured, observation, s, z, x_hat, weight)
        further = [share * term(seen) for share, term in objective.terms]
    error = mean_measured((x_hat - x0).square(), measured)
    loss = weight * error
    if training and coarse is not None:
        misses = averaged(torch.where(measured, coarse - x0, 0.0), denoiser.parametrization.coarse_cells)
        loss = loss + weight * mean_measured(misses.square(), measured)
    if training and fraction is not None:
        bound = variational_bound(x0, x_hat.detach(), fraction, level, diffusion.below(level))
        # One of the M terms of the chain stands for all.
        loss = loss + diffusion.vlb_weight * diffusion.M * mean_measured(bound, measured)
    if penalty is not None:
        loss = loss + penalty(x_hat, s)
    if training and diffusion.uncertainty is not None:
        u = diffusion.uncertainty(diffusion.inputs(t)[1].to(x0.dtype))
        loss = loss / u.exp() + u
    if training and diffusion.learned_schedule:
        loss = loss + diffusion.schedule_loss(level, error)
    if training and mean is not None:
        square = mean_measured((mean - x0).square(), measured)
        denoiser.parametrization.track(square.detach().mean())
        loss = loss + square
    return sum(further, loss if objective.denoising == 1 else objective.denoising * loss)


def mean_measured(values: Tensor, measured: Tensor) -> Tensor:
    """Returns the mean of `(B, 2, H, W)` over the measured cells `(B, 1, H, W)` and both components, `(B,)`.

    0 without any.
    """
    return total(torch.where(measured, values, 0.0)) / (2 * total(measured).clamp(min=1))


def variational_bound(x0: Tensor, x_hat: Tensor, fraction: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """Returns KL(q(z_r | z_s, x0) || p(z_r | z_s)) of every value in nats, `(B, 2, H, W)`.

    Both are normal, with the means `x + (r / s)^2 (z - x)` of x0 and of x_hat and the variances `small` and
    `large^v small^(1 - v)` (Nichol & Dhariwal, ICML 2021, equations 7 to 15).

    Arguments:
        x0: The clean fields.
        x_hat: The estimate of them.
        fraction: v.
        s: The levels, `(B,)` in float64.
        r: The next lower levels, `(B,)` in float64, above 0.
    """
    small, large = reverse_variances(s, r)
    # Neighbouring levels are nearly the same: their differences are taken before the precision is given up.
    values = (large / small).log(), (1 - (r / s) ** 2) / small.sqrt()
    span, share = (column(value.to(x0.dtype), x0) for value in values)
    log_ratio = fraction * span  # of the variance of p to that of q
    return (log_ratio + (1 + (share * (x0 - x_hat)) ** 2) * torch.exp(-log_ratio) - 1) / 2


def sliced(seen: Evaluated) -> Tensor:
    """Returns the loss of sliced score matching, `(B,)`; its signs are drawn from the global generator, as dropout is.

    See the module; the mean over noise and signs is that of the denoising loss.
    """
    signs = torch.where(seen.measured, torch.randn_like(seen.z).sign(), 0.0)
    (row,) = torch.autograd.grad(seen.x_hat, seen.z, signs, create_graph=True)
    square = column(seen.s.square(), seen.z)
    values = (seen.x_hat - seen.z).square() + square * (2 * signs * row - 1)
    return seen.weight * mean_measured(values, seen.measured)


def exact(posterior: Callable[[Tensor, Tensor, Observation], Tensor]) -> Term:
    """Returns the term of the squared error against E[x0 | z, y], `posterior(z, s, observation) -> (B, 2, H, W)`."""

    def against(seen: Evaluated) -> Tensor:
        with torch.no_grad():
            target = posterior(seen.z, seen.s, seen.observation)
        return seen.weight * mean_measured((seen.x_hat - target).square(), seen.measured)

    return against


def consistency(seen: Evaluated) -> Tensor:
    """Returns the square of the mean of dU/d ln s for each value, `(B,)`; see the module.

    The square of a mean is the mean of the product of two independent samples at one level: the second half of the
    batch is brought to the levels of the first. Of an odd number the last one is left out.
    """
    half = len(seen.s) // 2
    s, first, second = seen.s[:half], slice(half), slice(half, 2 * half)
    eps = (seen.z[second] - seen.x0[second]) / column(seen.s[second], seen.z)
    z = seen.x0[second] + column(s, eps) * eps
    ours = level_rate(seen.denoiser, seen.z[first], s, seen.observation[first])
    theirs = level_rate(seen.denoiser, z, s, seen.observation[second])
    values = 4 * total(seen.measured[first]) * total(seen.measured[second])
    product = (ours * theirs / values.clamp(min=1)).to(seen.s.dtype)
    return torch.cat([product, product, seen.s.new_zeros(len(seen.s) - 2 * half)])


def level_rate(denoiser: Denoiser, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
    """Returns dU/d ln s of every sample in nats, `(B,)`, by a central difference."""
    above, below = (denoiser.energy(z, s * math.exp(sign * STEP), observation) for sign in (1, -1))
    return (above - below) / (2 * STEP)
