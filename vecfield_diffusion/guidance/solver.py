"""The posterior mean's linear system at one noise level, and how it is solved.

With `D(z, s) = E[x0 | z]`, `V = Cov[x0 | z] = s^2 dD/dz` and whitened observations `y = A x + n`, the system is

    M w = y - A D,      M = I + A V A^T.

V is symmetric, so a product `V A^T w = s^2 grad_z <A D(z), w>` is one vector-Jacobian product (`Tangent`). Every scalar
of the solver is one of each sample, in float64; a sample that is done is frozen, so that results do not depend on the
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vecfield_diffusion.axes import column
from vecfield_diffusion.guidance.linear import LinearObservation
from vecfield_diffusion.samplers.base import BoundDenoiser

# How far M may be from symmetric, in q^T M p over the lengths of two directions with p^T M q = 0.
TWIST = 0.1
# Basis of the minimal residual method that takes over where the Jacobian is not symmetric enough.
KRYLOV = 8


class Tangent:
    """The estimate D at a state and the linear map V A^T there; whatever `posterior` differentiates goes through here.

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
        """Solves anew in `samples` `(B,)` by a run of GMRES (Saad & Schultz, 1986), which needs no symmetry.

        On a symmetric M that is not positive it is MINRES (Paige & Saunders, 1975). What conjugate gradients did before
        they met such a direction is dropped: it was no minimum of anything.
        """
        chosen, b = samples[:, None], self.tangent.missing
        self.w, self.residual = torch.where(chosen, 0.0, self.w), torch.where(chosen, b, self.residual)
        self.correction = torch.where(column(samples, self.correction), 0.0, self.correction)
        basis, pulled, images = [unit(self.residual)], [], []
        for _ in range(KRYLOV):
            pulled.append(self.tangent.pull(basis[-1]))
            images.append(basis[-1] + self.tangent.forward(pulled[-1]))
            basis.append(unit(orthogonal(images[-1], basis)))
        # M Q = Q' H, and the residual is the first vector of Q'. A pseudo-inverse, as Q may have closed on itself.
        hessenberg = torch.stack([torch.stack([dot(q, image) for image in images], dim=1) for q in basis], dim=1)
        weights = torch.linalg.pinv(hessenberg)[:, :, 0] * dot(self.residual, self.residual).sqrt()[:, None]
        weights = torch.where(chosen, weights, 0.0)
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
