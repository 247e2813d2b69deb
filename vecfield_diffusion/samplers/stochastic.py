"""Samplers that draw fresh noise on the way, each from the reverse of the diffusion or from Langevin dynamics.

In `(z, s)` every formulation diffuses alike: with `u = s^2` as time, `dz = dW`, whose reverse (Anderson, 1982) is

    dz = -score du + dW,    score = (D(z, s) - z) / s^2,    u falling.

For D held fixed over a step it is solved exactly, with `q = (r / s)^2`, by the posterior of z_r given z and x0 = D:

    z_r = D + q (z - D) + r sqrt(1 - q) eps.

Langevin dynamics `z + delta score + sqrt(2 delta) eps` leaves the density at one level as it is, as delta -> 0.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.base import ScheduleName, reverse_variances
from vecfield_diffusion.samplers.base import LevelDenoiser, NoiseFunction, Sampler


def langevin(denoise: LevelDenoiser, z: Tensor, s: float, share: float, noise: NoiseFunction) -> Tensor:
    """Takes one Langevin step at level `s` with `delta = share s^2`: `z + share (D - z) + s sqrt(2 share) eps`.

    On N(0, lambda) data the variance settles at `v / (1 - delta / (2 v))` instead of `v = lambda + s^2`; the step is
    stable below `share = 2`.
    """
    return torch.lerp(z, denoise(z, s), share).add_(noise(), alpha=s * math.sqrt(2 * share))


class DDIM(Sampler):
    """Between the ODE and the ancestral chain (Song et al., ICLR 2021, equations 12 and 16).

        tau = eta^2 (1 - (r / s)^2),    z_r = D + (r / s) sqrt(1 - tau) (z - D) + r sqrt(tau) eps

    Arguments:
        steps: The number of steps and of evaluations.
        schedule: How the levels of the steps are laid: `native` is the formulation's own.
        eta: The share of the noise that is fresh: 0 is the Euler step of the ODE, 1 the ancestral step.
        temperature: T of the law p^(1/T) that is sampled; see `base.py`.

    Raises:
        ValueError: eta outside [0, 1].
    """

    def __init__(
        self, steps: int = 50, schedule: ScheduleName = "native", eta: float = 0.0, temperature: float = 1.0
    ) -> None:
        super().__init__(steps, schedule, temperature)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        self.eta = eta

    @property
    def evaluations(self) -> int:
        return self.steps

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        tau = self.eta**2 * (1 - (r / s) ** 2)
        mean = torch.lerp(denoise(z, s), z, r / s * math.sqrt(1 - tau))
        return mean.add_(noise(), alpha=r * math.sqrt(tau)) if r * tau > 0 else mean


class Ancestral(Sampler):
    """The chain of DDPM (Ho et al., NeurIPS 2020, section 3.2 and algorithm 2) on any levels.

        z_r = D + (r / s)^2 (z - D) + sqrt(variance) eps

        small:      r^2 (1 - (r / s)^2)                     the posterior of a known x0: exact for one field
        large:      (1 + r^2)(s^2 - r^2) / (1 + s^2)        exact for white data of unit variance
        learned:    exp(v ln large + (1 - v) ln small)      v in [0, 1] from the denoiser

    On a variance-preserving path they are `tilde beta_t` and `beta_t` divided by `alpha_r^2`; `learned` is Nichol &
    Dhariwal, ICML 2021, equation 15. The last step, r = 0, returns D.

    Arguments:
        steps: The number of steps and of evaluations.
        schedule: How the levels of the steps are laid: `native` is the formulation's own.
        variance: The variance of a step; `learned` asks for a denoiser that was trained to give it.
        temperature: T of the law p^(1/T) that is sampled; see `base.py`.

    Raises:
        ValueError: A variance of another name.
    """

    def __init__(
        self,
        steps: int = 256,
        schedule: ScheduleName = "native",
        variance: Literal["small", "large", "learned"] = "small",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(steps, schedule, temperature)
        if variance not in ("small", "large", "learned"):
            raise ValueError(f"variance must be one of small, large, learned, got {variance}")
        self.variance, self.needs_variance = variance, variance == "learned"

    @property
    def evaluations(self) -> int:
        return self.steps

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        if r == 0:
            return denoise(z, s)
        small, large = reverse_variances(s, r)
        if self.variance != "learned":
            scale = math.sqrt(small if self.variance == "small" else large)
            return torch.lerp(denoise(z, s), z, (r / s) ** 2).add_(noise(), alpha=scale)
        x_hat, fraction = denoise.moments(z, s)
        scale = (fraction * (math.log2(large / small) / 2)).exp2_()
        return torch.lerp(x_hat, z, (r / s) ** 2).addcmul_(scale, noise(), value=math.sqrt(small))


class EulerMaruyama(Sampler):
    """Euler-Maruyama on the reverse diffusion: weak order 1 (Song et al., ICLR 2021, equation 46).

        z_r = z + (1 - (r / s)^2)(D - z) + sqrt(s^2 - r^2) eps

    The last step, r = 0, returns D: the noise of its Euler step would be as large as what it removes.
    """

    def __init__(self, steps: int = 256, schedule: ScheduleName = "native", temperature: float = 1.0) -> None:
        super().__init__(steps, schedule, temperature)

    @property
    def evaluations(self) -> int:
        return self.steps

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        x_hat = denoise(z, s)
        if r == 0:
            return x_hat
        return torch.lerp(x_hat, z, (r / s) ** 2).add_(noise(), alpha=math.sqrt(s**2 - r**2))


class HeunSDE(Sampler):
    """Stochastic Heun on the reverse diffusion, exact but for D: weak order 2.

        n   = r sqrt(1 - (r / s)^2) eps,    z' = D(z, s) + (r / s)^2 (z - D(z, s)) + n
        M   = (D(z, s) + D(z', r)) / 2,     z_r = M + (r / s)^2 (z - M) + n

    With y = z / s^2 the reverse diffusion reads `dy = -D du / u^2 + dW / u`, so that D enters through its mean over the
    step in 1 / u, here by the trapezium rule, and all else is exact. The noise is additive, for which the trapezium
    rule with one shared noise is of weak order 2 (Kloeden & Platen, 1992, section 15.1). The last step, r = 0, returns
    D; a run costs 2 n - 1 evaluations.
    """

    def __init__(self, steps: int = 64, schedule: ScheduleName = "native", temperature: float = 1.0) -> None:
        super().__init__(steps, schedule, temperature)

    @property
    def evaluations(self) -> int:
        return 2 * self.steps - 1

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        x_hat = denoise(z, s)
        if r == 0:
            return x_hat
        q, eps = (r / s) ** 2, noise()
        scale = r * math.sqrt(1 - q)
        euler = torch.lerp(x_hat, z, q).add_(eps, alpha=scale)
        mean = torch.lerp(x_hat, denoise(euler, r), 0.5)
        return mean.lerp_(z, q).add_(eps, alpha=scale)


class PredictorCorrector(EulerMaruyama):
    """A step of the reverse diffusion, then Langevin steps at the level reached (Song et al., ICLR 2021, algorithm 2).

        predictor:      z_r = z + (1 - (r / s)^2)(D - z) + sqrt(s^2 - r^2) eps
        corrector:      z_r <- z_r + delta score + sqrt(2 delta) eps,    delta = 2 (snr r)^2

    In algorithm 4 delta has the norms of a batch's noise and scores; here it has their expected values `sqrt(d)` and
    `sqrt(d) / r`, so that no sample depends on its neighbours. The last step, r = 0, returns D without a corrector: a
    run costs n + corrector_steps (n - 1) evaluations.

    Arguments:
        steps: The number of steps n of the predictor.
        schedule: How the levels of the steps are laid: `native` is the formulation's own.
        corrector_steps: The number of Langevin steps after each; 0 leaves the predictor alone.
        snr: The signal-to-noise ratio of a Langevin step, below 1, where the steps cease to be stable.
        temperature: T of the law p^(1/T) that is sampled; see `base.py`.

    Raises:
        ValueError: Fewer than no corrector steps, or a ratio outside (0, 1).
    """

    def __init__(
        self,
        steps: int = 256,
        schedule: ScheduleName = "native",
        corrector_steps: int = 1,
        snr: float = 0.16,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(steps, schedule, temperature)
        if corrector_steps < 0:
            raise ValueError(f"corrector_steps must be >= 0, got {corrector_steps}")
        if not 0 < snr < 1:
            raise ValueError(f"snr must be in (0, 1), got {snr}")
        self.corrector_steps, self.snr = corrector_steps, snr

    @property
    def evaluations(self) -> int:
        return self.steps + self.corrector_steps * (self.steps - 1)

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        z = super().step(denoise, z, s, r, noise, memory)
        for _ in range(self.corrector_steps if r > 0 else 0):
            z = langevin(denoise, z, r, 2 * self.snr**2, noise)
        return z


class Langevin(Sampler):
    """Annealed Langevin dynamics (Song & Ermon, NeurIPS 2019, algorithm 1) and a last denoising.

    At each of the n levels above 0, the first included, `corrections` steps

        z <- z + delta score + sqrt(2 delta) eps,    delta = step_size s^2,

    then D. A step of the sampler ends with those of the level that it goes to, so that hooks and trajectories see a
    state of that level; a run costs corrections n + 1 evaluations. The spread is too large, by a part of order
    step_size and because the noise of a level needs `1 / step_size` corrections to fade, while the level falls on: a
    tenth of the variance at the defaults. For comparison; `MALA` decides on each step, and has no such bias.

    Arguments:
        steps: The number of levels n.
        schedule: How the levels of the steps are laid: `native` is the formulation's own.
        corrections: The number of Langevin steps at each level; in the paper 100 at each of 10 levels.
        step_size: delta / s^2, below 2, where the steps cease to be stable; 0.1 is the paper's.
        temperature: T of the law p^(1/T) that is sampled; see `base.py`.

    Raises:
        ValueError: Fewer than one correction, or a step size outside (0, 2).
    """

    def __init__(
        self,
        steps: int = 256,
        schedule: ScheduleName = "native",
        corrections: int = 5,
        step_size: float = 0.1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(steps, schedule, temperature)
        if corrections < 1:
            raise ValueError(f"corrections must be >= 1, got {corrections}")
        if not 0 < step_size < 2:
            raise ValueError(f"step_size must be in (0, 2), got {step_size}")
        self.corrections, self.step_size = corrections, step_size

    @property
    def evaluations(self) -> int:
        return self.corrections * self.steps + 1

    def step(
        self, denoise: LevelDenoiser, z: Tensor, s: float, r: float, noise: NoiseFunction, memory: dict[str, Any]
    ) -> Tensor:
        if not memory:
            z = self.correct(denoise, z, s, noise)
            memory["begun"] = True
        return self.correct(denoise, z, r, noise) if r > 0 else denoise(z, s)

    def correct(self, denoise: LevelDenoiser, z: Tensor, s: float, noise: NoiseFunction) -> Tensor:
        """Takes the Langevin steps at level `s`."""
        for _ in range(self.corrections):
            z = langevin(denoise, z, s, self.step_size, noise)
        return z
