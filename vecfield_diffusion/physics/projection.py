"""Projections of a velocity on its grid: without divergence, with observed cells held, and the Helmholtz parts.

All distances are those of the energy of the grid, |u|^2 = sum a (u^2 + v^2) with the cell areas a, in which `gradient`
is minus the adjoint L* of the divergence L and R is `rotated_gradient`:

    leray       P u = u - L* (L L*)^+ L u                      the nearest field with L u = 0
    project     u - L_f^+ L u                                  L_f is L on the cells that are free to change
    helmholtz   u = P u - h  +  h  +  u - P u                  h = u - B^+ B u,  B = (L, R*)

`leray` is divergence-free by the very stencil of `operators.divergence`, with any boundaries, spacing and land. Of the
Helmholtz parts, the divergent one is a gradient; the harmonic one has neither divergence nor curl (R*): means, flows
along channels and around islands, and at coasts what no stream function that vanishes there can hold; the rotational
part is the rest, and all three are orthogonal. Without land, the rotational part is R psi.

All act on fields `(B, C, H, W)` and, frame by frame, on `(B, T, C, H, W)`.

Everything is computed in float64 and returned in the dtype given. Each map is linear; its derivative is its adjoint,
which is another such solve, so that memory does not grow with the iterations. Land changes nothing and comes out 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion.axes import by_frame
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.multigrid import peak
from vecfield_diffusion.physics.poisson import Equations, Map, conjugate_gradients, equations, least_squares

# Iterations with held cells, per cell of the sides of the grid. Half of the cells at random take most, about 15.
_HELD_ITERATIONS = 30


def leray(velocity: Tensor, grid: Grid) -> Tensor:
    """Returns the nearest field without divergence to `velocity` `(B, 2, H, W)`; 0 in invalid cells."""
    eqs = equations(grid, velocity.device)
    return _apply(velocity, eqs, lambda u: _leray(u, eqs), lambda u: _leray(u, eqs))


def project(velocity: Tensor, grid: Grid, held: Tensor | None = None) -> Tensor:
    """Returns the nearest field with the least divergence that leaves the held cells as they are.

    Where the held cells leave a divergence that no change of the others can remove, its sum of squares (by area) is the
    least possible. With cells held there is no bound on the condition of the equations: they are solved to a residual
    of 1e-12 or for 30 (H + W) iterations, after which the held cells are still exact.

    Arguments:
        velocity: The fields `(B, 2, H, W)`.
        grid: Their grid.
        held: The cells to keep, boolean `(B, 1, H, W)` or `(1, 1, H, W)`; None holds no cell: `leray`.

    Raises:
        ValueError: `held` is not boolean, or its shape does not fit.
    """
    if held is None:
        return leray(velocity, grid)
    if velocity.ndim > 4:
        return by_frame(lambda fields, cells: project(fields, grid, cells), velocity, held)
    shape = (len(velocity), 1, *grid.shape)
    if held.dtype != torch.bool or held.shape not in (shape, (1, *shape[1:])):
        raise ValueError(f"held must be boolean {shape}, got {held.dtype} {tuple(held.shape)}")
    eqs = equations(grid, velocity.device)
    div, limit = eqs.divergence, _HELD_ITERATIONS * sum(grid.shape)
    cells = (~held.expand(shape)[..., eqs.valid]).flatten(1).T
    free, solve = cells.double().repeat(2, 1), eqs.holding(cells)

    def onto(d: Tensor) -> Tensor:
        return div @ (free * d)

    def back(p: Tensor) -> Tensor:
        return free * (div.T @ p)

    ways: tuple[dict[str, Map], dict[str, Map]] = ({}, {})
    if solve is not None:
        ways = {"precondition": lambda s: back(solve(solve(onto(s))))}, {"precondition": solve}
    projected = _apply(
        velocity,
        eqs,
        lambda u: u - least_squares(onto, back, div @ u, limit, **ways[0]),
        lambda g: g - div.T @ least_squares(back, onto, g, limit, **ways[1]),
    )
    return torch.where(held & grid.valid.to(held.device), velocity, projected)


def helmholtz(velocity: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rotational, the divergent and the harmonic part of `velocity` `(B, 2, H, W)`.

    Their sum is the field.
    """
    eqs = equations(grid, velocity.device)
    solenoidal = leray(velocity, grid)
    harmonic = _apply(velocity, eqs, lambda u: _harmonic(u, eqs), lambda u: _harmonic(u, eqs))
    inside = torch.where(grid.valid.to(velocity.device), velocity, 0.0)
    return solenoidal - harmonic, inside - solenoidal, harmonic


def _leray(u: Tensor, eqs: Equations) -> Tensor:
    div = eqs.divergence
    return u - div.T @ eqs.poisson(div @ u, _size(div.rows, u))


def _harmonic(u: Tensor, eqs: Equations) -> Tensor:
    """Returns u - B^T (B B^T)^+ B u with B = (L, R^T), which is block diagonal without land."""
    div, curl = eqs.divergence, eqs.stream.T
    n = div.rows.shape[0]

    def stacked(w: Tensor) -> Tensor:
        return torch.cat((div @ w, curl @ w))

    def adjoint(p: Tensor) -> Tensor:
        return div.T @ p[:n] + curl.T @ p[n:]

    def precondition(r: Tensor) -> Tensor:
        return torch.cat((eqs.poisson.approximate(r[:n]), eqs.vorticity.approximate(r[n:])))

    return u - adjoint(conjugate_gradients(lambda p: stacked(adjoint(p)), precondition, stacked(u), _size(div.rows, u)))


def _size(matrix: Tensor, u: Tensor) -> Tensor:
    """Returns the size of the terms that A u is the sum of, `(B,)`: what rounding errors are relative to."""
    return peak(matrix.values()) * u.norm(dim=0)


class _Linear(torch.autograd.Function):
    """A linear map of flat fields whose derivative is its adjoint, to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Map, adjoint: Map) -> Tensor:
        ctx.maps = forward, adjoint
        return forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        forward, adjoint = ctx.maps
        return _Linear.apply(gradient, adjoint, forward), None, None


def _apply(fields: Tensor, eqs: Equations, forward: Map, adjoint: Map) -> Tensor:
    """Returns a map of flat fields on fields `(B, 2, H, W)`."""

    def apply(fields: Tensor) -> Tensor:
        return eqs.unpack(_Linear.apply(eqs.pack(fields), forward, adjoint))

    return by_frame(apply, fields).to(fields.dtype)
