"""Samples of the posterior of a prior that was trained without observations: MMPS, PiGDM and DPS.

With `D(z, s) = E[x0 | z]` the prior's denoiser, Tweedie's second-order formula gives `Cov[x0 | z] = V = s^2 dD/dz`, and
for observations `y = A x + n`, `n ~ N(0, R)`, the Gaussian approximation of p(x0 | z) has the posterior mean

    D_y = D + V A^T w,      (R + A V A^T) w = y - A D.

- MMPS (Rozet et al., NeurIPS 2024, arXiv 2405.13712) solves this system by conjugate gradients. V is symmetric, so a
  product `V A^T w = s^2 grad_z <A D(z), w>` is one vector-Jacobian product. Exact for Gaussian fields.
- PiGDM (Song et al., ICLR 2023) has `r^2 I`, `r^2 = s^2 / (1 + s^2)`, in the place of V within the system, which then
  costs no derivative of the network: `w = (y - A D) / (sigma^2 + r^2)` where cells are observed. Biased, robust.
- DPS (Chung et al., ICLR 2023) leaves D alone and after a step subtracts `(zeta / n) grad_z |y - A D|` from the state,
  n the number of steps and the norm that of each sample by itself. Biased.

Observations are whitened, `A <- R^(-1/2) A`, so that the system is `M = I + A V A^T` and those of different units stand
side by side; `solver.py` solves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import DenoiserFunction
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.inpainting import Bound, Inpainting
from vecfield_diffusion.guidance.linear import LinearObservation, cells, stack
from vecfield_diffusion.guidance.solver import Solver, Tangent, unit
from vecfield_diffusion.samplers.base import BoundDenoiser, Hook, NoiseFunction, Sampler

# The iterations of MMPS that k_max=auto allows a sample: a few where rows are fewer than `SPARSE` of the values of the
# field. Else more, and the more at levels below `LATE` (in standard deviations of the data), because an error in D at
# level s enters a sample only by about c / s, c the spread that the posterior has in its direction.
SPARSE, LATE = 0.15, 3.0
FEW, SOME, MANY = 3, 12, 64
# Directions of the last solve that the next one starts with: its solution and the one before.
MEMORY = 2
# PiGDM's own system costs no derivative of the network.
WHITE_STEPS, WHITE_TOLERANCE = 200, 1e-5


def prior(denoiser: DenoiserFunction, observation: Observation) -> BoundDenoiser:
    """Returns the denoiser of the prior, which has no observation."""
    return Bound(denoiser, observation.nothing())


def all_rows(observation: Observation, rows: Sequence[LinearObservation]) -> LinearObservation:
    """Returns the measured cells of the observation and further observations, flat."""
    return stack([cells(observation), *rows])


def split(
    denoiser: DenoiserFunction, observation: Observation, rows: Sequence[LinearObservation], conditions: bool
) -> tuple[BoundDenoiser, LinearObservation]:
    """Returns the denoiser and the observations that it is to agree with.

    These are all; where the network is conditioned on the observed cells (`conditions`), those beside.
    """
    if not conditions:
        return prior(denoiser, observation), all_rows(observation, rows)
    beside = replace(observation, observed=torch.zeros_like(observation.observed))
    return Bound(denoiser, observation), all_rows(beside, rows)


class MMPS(Inpainting):
    """Moment-matching posterior sampling: exact for Gaussian fields, as far as the system is solved.

    A solve ends for a sample where the residual is at most `tolerance` of its right-hand side, or after `k_max`
    iterations; each is one vector-Jacobian product, and one more for each of up to two vectors of the warm start.

    Arguments:
        k_max: The largest number of iterations of a solve. `auto` takes 3 for a sample with fewer rows than 15 % of the
            values of its field, else 12 at noise levels from 3 standard deviations of the data upward and 64 below.
        tolerance: The residual relative to the right-hand side, in (0, 1).
        warm_start: Whether a solve begins with the solution of the last step and the one before.
        solver: `cg` goes over to `gmres` by itself in samples where the Jacobian of the network proves to be no
            covariance; `gmres` (8 iterations, whatever `k_max`) takes it from the start, cold.
        conditioned: Whether the network is conditioned on the observed cells, as it was trained to be: it then gives
            E[x0 | z, y] by itself, and what is added are those beside: of physics, observation operators and single
            components.

    Attributes:
        solves: The number of systems that were solved: one for each sample and evaluation.
        guard: In how many of them conjugate gradients met a Jacobian that is no covariance and gave way to GMRES.

    Raises:
        ValueError: A number of iterations below 1 or a tolerance outside (0, 1).
    """

    name = "mmps"
    takes_rows = weighs_rows = differentiates = True

    def __init__(
        self,
        k_max: int | Literal["auto"] = "auto",
        tolerance: float = 1e-3,
        warm_start: bool = True,
        solver: Literal["cg", "gmres"] = "cg",
        conditioned: bool = False,
    ) -> None:
        if k_max != "auto" and k_max < 1:
            raise ValueError(f"k_max must be >= 1 or auto, got {k_max}")
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {tolerance}")
        if solver not in ("cg", "gmres"):
            raise ValueError(f"solver must be cg or gmres, got {solver}")
        self.k_max, self.tolerance, self.warm_start, self.solver = k_max, tolerance, warm_start, solver
        self.conditions = conditioned
        self.solves = self.guard = 0

    def bind(
        self, denoiser: DenoiserFunction, observation: Observation, rows: Sequence[LinearObservation] = ()
    ) -> BoundDenoiser:
        """Returns D_y of the observation and the further observations."""
        bound, stacked = split(denoiser, observation, rows, self.conditions)
        share = stacked.present.sum(dim=1) / (2 * observation.valid.flatten(1).sum(dim=1)).clamp(min=1)
        return BoundMMPS(self, bound, stacked.whitened(), share)

    def limit(self, share: Tensor, s: Tensor) -> Tensor:
        """Returns the iterations `(B,)` of samples with observations of `share` of their values, at levels `s`."""
        if self.k_max != "auto":
            return torch.full_like(s, self.k_max)
        return torch.where(share < SPARSE, FEW, torch.where(s < LATE, MANY, SOME))

    def summary(self) -> str | None:
        """Returns how often the Jacobian of the network was no covariance."""
        if not self.guard:
            return None
        return (
            f"mmps: in {self.guard / self.solves:.0%} of the systems the network's Jacobian was no covariance (not "
            "symmetric, or not positive); GMRES solved them in place of conjugate gradients"
        )


class BoundMMPS:
    """D_y of one run. It remembers the last solutions, and nothing else, from step to step."""

    def __init__(self, method: MMPS, denoiser: BoundDenoiser, rows: LinearObservation, share: Tensor) -> None:
        self.method, self.denoiser, self.rows, self.share = method, denoiser, rows, share
        self.memory: list[Tensor] = []

    def __call__(self, z: Tensor, s: Tensor) -> Tensor:
        tangent = Tangent(self.denoiser, z, s, self.rows)
        solver, method = Solver(tangent, self.method.tolerance), self.method
        if method.solver == "gmres":
            solver.minimise_residual(solver.active)
        else:
            known = solver.solve(method.limit(self.share, s), self.memory)
            if stuck := int(solver.stuck.sum()):
                method.guard += stuck
                solver.minimise_residual(solver.stuck)
            self.memory = [solver.w, *known][:MEMORY] if method.warm_start else []
        method.solves += len(z)
        return tangent.x_hat + solver.correction


class PiGDM(Inpainting):
    """Pseudo-inverse guidance: the covariance of x0 given z is taken to be `r^2 I`, `r^2 = s^2 / (1 + s^2)`.

    One vector-Jacobian product an evaluation, and nothing to tune. Where observations overlap (footprints, physics) the
    system `I + r^2 A A^T` is solved by conjugate gradients that leave the network alone.

    Arguments:
        conditioned: See `MMPS`.
    """

    name = "pigdm"
    takes_rows = weighs_rows = differentiates = True

    def __init__(self, conditioned: bool = False) -> None:
        self.conditions = conditioned

    def bind(
        self, denoiser: DenoiserFunction, observation: Observation, rows: Sequence[LinearObservation] = ()
    ) -> BoundDenoiser:
        """Returns D_y of the observation and the further observations."""
        bound, stacked = split(denoiser, observation, rows, self.conditions)
        whitened = stacked.whitened()

        def guided(z: Tensor, s: Tensor) -> Tensor:
            tangent = Tangent(bound, z, s, whitened)
            # The same system with the identity for a denoiser at level r, whose V is r^2 I.
            white = Tangent(lambda x, r: x, tangent.x_hat, s / (1 + s**2).sqrt(), whitened)
            solver = Solver(white, WHITE_TOLERANCE)
            solver.solve(torch.full_like(s, WHITE_STEPS), [])
            return tangent.x_hat + tangent.pull(solver.w)

        return guided


class DPS(Inpainting):
    """Diffusion posterior sampling: after each step, `z <- z - (zeta / n) grad_z |y - A D(z, s)|`.

    The gradient is that at the first evaluation of the step, whatever the sampler does within it, and it is subtracted
    after the step. The norm is that of each sample by itself, over its rows in standard deviations of the data: errors
    of the observation play no part. It needs many steps (100 and more), and its best zeta depends on the data.

    Arguments:
        zeta: The sum of the lengths of all steps, >= 0; a step has zeta / n. About 100 for fields of unit variance.

    Raises:
        ValueError: A negative zeta.
    """

    name = "dps"
    changes_state = takes_rows = differentiates = True

    def __init__(self, zeta: float = 100.0) -> None:
        if zeta < 0:
            raise ValueError(f"zeta must be >= 0, got {zeta}")
        self.zeta = zeta

    def bind(
        self, denoiser: DenoiserFunction, observation: Observation, rows: Sequence[LinearObservation] = ()
    ) -> BoundDPS:
        """Returns the denoiser of the prior, which keeps the gradient of the misfit for `hook`."""
        return BoundDPS(prior(denoiser, observation), all_rows(observation, rows))

    def hook(
        self, observation: Observation, noise: NoiseFunction, bound: BoundDenoiser | None = None, steps: int = 1
    ) -> Hook:
        """Returns the step along the gradient.

        Arguments:
            observation: That of `bind`.
            noise: Not used.
            bound: What `bind` gave.
            steps: The number of steps n of the sampler.

        Raises:
            ValueError: A denoiser that this method did not bind.
        """
        if not isinstance(bound, BoundDPS):
            raise ValueError(f"bound must be the denoiser that DPS.bind gave, got {bound!r}")

        def subtract(z: Tensor, r: float) -> Tensor:
            if r == 0:
                return z  # the last step gives the estimate itself
            return torch.sub(z, bound.take(), alpha=self.zeta / steps)

        return subtract

    def advice(self, sampler: Sampler) -> str | None:
        """Warns of few steps."""
        if sampler.steps < 50:
            return "dps takes long strides in few steps; give sampler.steps=100 or more"
        return None


class BoundDPS:
    """The denoiser of the prior, with the gradient of the misfit at its first call since `take`."""

    def __init__(self, denoiser: BoundDenoiser, rows: LinearObservation) -> None:
        self.denoiser, self.rows = denoiser, rows
        self.gradient: Tensor | None = None

    def __call__(self, z: Tensor, s: Tensor) -> Tensor:
        if self.gradient is not None:
            return self.denoiser(z, s)
        tangent = Tangent(self.denoiser, z, s, self.rows)
        # grad |b| = -grad <A D, b / |b|>
        self.gradient = -tangent.gradient(unit(tangent.missing))
        return tangent.x_hat

    def take(self) -> Tensor:
        """Returns the gradient, which is then forgotten."""
        gradient, self.gradient = self.gradient, None
        return gradient
