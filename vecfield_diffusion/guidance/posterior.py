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
side by side. Every scalar of the solver is one of each sample, in float64; a sample that is done is frozen, so that
results do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vecfield_diffusion.axes import column
from vecfield_diffusion.diffusion.denoiser import DenoiserFunction
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.inpainting import Bound, Inpainting
from vecfield_diffusion.guidance.linear import LinearObservation, cells, stack
from vecfield_diffusion.samplers.base import BoundDenoiser, Hook, NoiseFunction, Sampler

# The iterations of MMPS that k_max=auto allows a sample: a few where rows are fewer than `SPARSE` of the values of the
# field. Else more, and the more at levels below `LATE` (in standard deviations of the data), because an error in D at
# level s enters a sample only by about c / s, c the spread that the posterior has in its direction.
SPARSE, LATE = 0.15, 3.0
FEW, SOME, MANY = 3, 12, 64
# Directions of the last solve that the next one starts with: its solution and the one before.
MEMORY = 2
# How far M may be from symmetric, in q^T M p over the lengths of two directions with p^T M q = 0.
TWIST = 0.1
# Basis of the minimal residual method that takes over where the Jacobian is not symmetric enough.
KRYLOV = 8
# PiGDM's own system costs no derivative of the network.
WHITE_STEPS, WHITE_TOLERANCE = 200, 1e-5


class Tangent:
    """The estimate D at a state and the linear map V A^T there. The only place of this module that differentiates.

    Arguments:
        denoiser: D.
        z: The states `(B, 2, H, W)`.
        s: Their levels `(B,)`.
        rows: Flat observations.

    Attributes:
        x_hat: D(z, s), without a graph.
        missing: y - A D, `(B, K)`.
    """

    def __init__(self, denoiser: BoundDenoiser, z: Tensor, s: Tensor, rows: LinearObservation) -> None:
        with torch.enable_grad():
            self._z = z.detach().requires_grad_()
            x_hat = denoiser(self._z, s)
            self._image = rows.forward(x_hat)
        self.x_hat, self.forward = x_hat.detach(), rows.forward
        self.missing = rows.y - self._image.detach()
        self._square = column(s**2, z).to(z.dtype)

    def gradient(self, w: Tensor) -> Tensor:
        """Returns `grad_z <A D(z), w>`, `(B, 2, H, W)`, for w `(B, K)`."""
        return torch.autograd.grad(self._image, self._z, w.to(self._image.dtype), retain_graph=True)[0]

    def pull(self, w: Tensor) -> Tensor:
        """Returns `V A^T w`."""
        return self._square * self.gradient(w)


@dataclass
class Direction:
    """A direction p of w with M p, V A^T p and p^T M p; all 0, and 1, in samples that do not take it."""

    p: Tensor
    image: Tensor
    pulled: Tensor
    curvature: Tensor


class Solver:
    """Conjugate gradients on `M w = b`, `M = I + A V A^T`, for a batch of systems.

    Arguments:
        tangent: b, A and V A^T.
        tolerance: A sample is done where |b - M w| <= tolerance |b|.

    Attributes:
        correction: V A^T w, `(B, 2, H, W)`.
        stuck: Samples that met a direction p with p^T M p <= 0, or not conjugate from both sides to one before it:
            their V is no covariance.
    """

    def __init__(self, tangent: Tangent, tolerance: float) -> None:
        b = tangent.missing
        self.tangent, self.residual, self.w = tangent, b, torch.zeros_like(b)
        self.correction = torch.zeros_like(tangent.x_hat)
        self.enough = tolerance**2 * dot(b, b)
        self.active = dot(b, b) > self.enough
        self.stuck = torch.zeros_like(self.active)

    def solve(self, limit: Tensor, start: Sequence[Tensor]) -> list[Tensor]:
        """Runs `limit` `(B,)` iterations, or fewer, after those along `start`; returns the directions of the start.

        All directions are conjugate to those of the start (deflated conjugate gradients, Saad et al., SIAM J. Sci.
        Comput. 21, 1909, 2000), so that nothing that the start knew is found again.
        """
        known: list[Direction] = []
        for p in start:
            if not self.active.any():
                break
            q = conjugate(p, known)
            # What is left of a vector that the others know already is rounding.
            known.append(self.advance(torch.where((dot(q, q) > 1e-10 * dot(p, p))[:, None], q, 0.0), known))
        square, k = dot(self.residual, self.residual), 0
        p, last = conjugate(self.residual, known), []
        while (allowed := self.active & (k < limit)).any():
            self.active = allowed
            last = [self.advance(p, [*known, *last])]
            before, square, k = square, dot(self.residual, self.residual), k + 1
            ratio = torch.where(before > 0, square / before, 0.0)
            p = conjugate(self.residual, known) + per_row(ratio, p) * p
        return [direction.p for direction in known]

    def advance(self, p: Tensor, before: Sequence[Direction] = ()) -> Direction:
        """Goes to the minimum along `p`, conjugate to the directions before it, in samples that are under way."""
        pulled = self.tangent.pull(p)
        image = p + self.tangent.forward(pulled)
        curvature = dot(p, image)
        nothing = dot(p, p) == 0
        sound = curvature > 0
        for q in before:
            # q^T M p = 0 was made of p^T M q = 0: they are the same where M is symmetric.
            sound &= dot(q.p, image) ** 2 <= TWIST**2 * q.curvature * curvature
        self.stuck |= self.active & ~sound & ~nothing
        moves = self.active & sound
        # A direction of zeros is no fault: the start may have nothing new to say.
        self.active = self.active & (moves | nothing)
        curvature = torch.where(moves, curvature, 1.0)
        length = torch.where(moves, dot(p, self.residual) / curvature, 0.0)
        self.w = self.w + per_row(length, p) * p
        self.residual = self.residual - per_row(length, p) * image
        self.correction = self.correction + column(length, pulled).to(pulled.dtype) * pulled
        self.active = self.active & (dot(self.residual, self.residual) > self.enough)
        chosen = moves[:, None]
        return Direction(torch.where(chosen, p, 0.0), torch.where(chosen, image, 0.0), pulled, curvature)

    def minimise_residual(self, samples: Tensor) -> None:
        """Goes on in `samples` `(B,)` by a run of GMRES (Saad & Schultz, 1986), which needs no symmetry."""
        basis, pulled, images = [unit(self.residual)], [], []
        for _ in range(KRYLOV):
            pulled.append(self.tangent.pull(basis[-1]))
            images.append(basis[-1] + self.tangent.forward(pulled[-1]))
            basis.append(unit(orthogonal(images[-1], basis)))
        # M Q = Q' H, and the residual is the first vector of Q'. A pseudo-inverse, as Q may have closed on itself.
        hessenberg = torch.stack([torch.stack([dot(q, image) for image in images], dim=1) for q in basis], dim=1)
        weights = torch.linalg.pinv(hessenberg)[:, :, 0] * dot(self.residual, self.residual).sqrt()[:, None]
        weights = torch.where(samples[:, None], weights, 0.0)
        for weight, q, image, pull in zip(weights.T, basis[:-1], images, pulled, strict=True):
            self.w = self.w + per_row(weight, q) * q
            self.residual = self.residual - per_row(weight, q) * image
            self.correction = self.correction + column(weight, pull).to(pull.dtype) * pull


def orthogonal(rows: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """Returns rows `(B, K)` less what they have of an orthonormal basis; 0 where nothing but rounding is left."""
    q = rows
    for _ in range(2):  # the second pass removes what the rounding of the first left
        for unit_row in basis:
            q = q - per_row(dot(unit_row, q), q) * unit_row
    noise = 1e3 * torch.finfo(q.dtype).eps * dot(rows, rows).sqrt()
    return torch.where((dot(q, q).sqrt() > noise)[:, None], q, 0.0)


def unit(rows: Tensor) -> Tensor:
    """Returns rows `(B, K)` of length 1, or 0 where they are 0."""
    size = dot(rows, rows).sqrt()
    return per_row(torch.where(size > 0, 1 / size, 0.0), rows) * rows


def conjugate(p: Tensor, known: Sequence[Direction]) -> Tensor:
    """Returns `p` less what it has, in the inner product of M, of the directions."""
    for q in known:
        p = p - per_row(dot(q.image, p) / q.curvature, p) * q.p
    return p


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Returns the inner product `(B,)` of rows `(B, K)` in float64."""
    return (a.double() * b.double()).sum(dim=1)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes `(B,)` to `(B, 1)` in the dtype of `like`."""
    return values[:, None].to(like.dtype)


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
            self.memory = [solver.w, *known][:MEMORY] if method.warm_start else []
            if stuck := int(solver.stuck.sum()):
                method.guard += stuck
                solver.minimise_residual(solver.stuck)
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
