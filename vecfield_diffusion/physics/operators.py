"""Derivatives on a grid: divergence, vorticity, gradient, Laplacian and the field of a stream function.

Divergence and vorticity, in s^-1 for velocities in m s-1, are balances over the faces of a cell (Gauss and Stokes),
with cell sides dx_j and dy_j of row j,

    div  = [(u_e - u_w) dy_j + (v dx)_n - (v dx)_s] / (dx_j dy_j)
    curl = [(v_e - v_w) dy_j - (u dx)_n + (u dx)_s] / (dx_j dy_j)

so that on the sphere, where dx_j = R cos(lat_j) dlon, the meridional terms carry the convergence of the meridians. The
value on a face is the mean of the two cells that share it; in the interior of a uniform grid this is the central
difference (f[i+1] - f[i-1]) / (2 dx). Rows that run southward have a negative dy_j, which turns n and s around.

Faces with a valid cell on one side only are

- for the divergence: 0 at land and at a `wall` (nothing flows through, the sum over a closed basin telescopes to 0);
  extrapolated at an `open` boundary;
- for the vorticity: extrapolated everywhere, because the velocity along a coast need not vanish (free slip).

Extrapolated is (4 f0 - 3 f1 + f2) / 2 from the valid cells next to the face, which makes the difference over the cell
the one-sided second-order one, (-3 f0 + 4 f1 - f2) / 2; with two valid cells (3 f0 - f1) / 2, with one f0.

The gradient is minus the adjoint of the divergence in the inner products weighted by the areas a_j = |dx_j dy_j|,

    sum a p div u = -sum a u . grad p,      grad p = -(F_x^T p / dx_j, F_y^T p / dy_j),

with F_x and F_y the differences of face values, as in div u = F_x u / dx_j + F_y (v dx) / (dx_j dy_j); the Laplacian is
div grad. In the interior that gradient is the central difference of p; in a cell at a coast or wall it is half the
difference from its neighbour away from it, so that the gradient of a constant vanishes in a closed basin. At an `open`
edge the adjoint is no derivative: what flows out there is free, which asks for p = 0 outside instead.

The field of a stream function psi is (-F_y psi / dy_j, F_x psi / dx_j) with the same F: psi = 0 on walls and coasts.
F_x acts within rows and F_y within columns, so that they commute on a grid without land, and the divergence vanishes to
rounding with all boundaries and any spacing of the rows. Land makes rows differ from each other: the divergence then
vanishes in cells with no land in the 3x3 cells around them (and no edge that is open), in others only if psi does.

A row at a pole is a point, written W times. Its W cells are the sectors of one cap, whose balance is the sum over all
of them: nothing but what crosses the faces to the next row counts, half of what that row carries, and all cells have
the same value, the mean. The velocities at the pole itself enter nothing, whatever they are (nor need they be known),
and those of potentials come out 0 there; a potential counts with its mean. The operators are C^T L P, P L* C and P R C,
with C that mean and P the removal of what a pole holds, so that adjoints and the identities above stay exact. On smooth
fields the error falls with the square of the spacing, but for the rows n = 1, 2, ... from a pole, where it is of first
order, 1 / n of its size in the first: the price of faces of second order: with the spacing h, a flow that
crosses the pole straight on has u ~ sin lon, whose central difference along a row misses h^2 / 6 of its derivative, and
the width of that row, R n h, divides it: h / (6 n R). The means on faces miss 4 times that of v dx, of other sign.
Only faces of fourth order would mend it, which need wider stencils than land and walls leave; sums over the sphere are
exact as it is.

All act on fields `(B, C, H, W)` and, frame by frame, on `(B, T, C, H, W)`.

Values in invalid cells are replaced before any arithmetic, so that a NaN there reaches neither results nor gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vecfield_diffusion.axes import u_and_v
from vecfield_diffusion.physics.grid import Grid

REACH = 3  # cells on either side of a face that its value may use


def divergence(velocity: Tensor, grid: Grid) -> Tensor:
    """Returns the divergence of `velocity` `(B, 2, H, W)` as `(B, 1, H, W)`, 0 in invalid cells."""
    u, v, dx, dy = _clean(velocity, grid)
    east = _difference(u, along(grid, 1, sealed=True), grid.boundary_x)
    north = _difference((v * dx).mT, along(grid, 0, sealed=True), grid.boundary_y).mT
    return _inside(_caps((east * dy + north) / (dx * dy), grid, gather=True), grid)


def vorticity(velocity: Tensor, grid: Grid) -> Tensor:
    """Returns the vorticity dv/dx - du/dy of `velocity` `(B, 2, H, W)` as `(B, 1, H, W)`, 0 in invalid cells."""
    u, v, dx, dy = _clean(velocity, grid)
    east = _difference(v, along(grid, 1, sealed=False), grid.boundary_x)
    north = _difference((u * dx).mT, along(grid, 0, sealed=False), grid.boundary_y).mT
    return _inside(_caps((east * dy - north) / (dx * dy), grid, gather=True), grid)


def strain(velocity: Tensor, grid: Grid) -> Tensor:
    """Returns the rate of strain of `velocity` `(B, 2, H, W)` as `(B, 1, H, W)`, 0 in invalid cells.

    It is sqrt(n^2 + s^2) of n = du/dx - dv/dy and s = dv/dx + du/dy, on rows of spacing dx_j

        n = F_x u / dx_j - dx_j F_y (v / dx) / dy_j,      s = F_x v / dx_j + dx_j F_y (u / dx) / dy_j,

    which on the sphere vanishes for every solid rotation. Faces at land are extrapolated as those of the vorticity.
    """
    u, v, dx, dy = _clean(velocity, grid)
    weights = along(grid, 1, sealed=False), along(grid, 0, sealed=False)
    east = [_difference(part, weights[0], grid.boundary_x) / dx for part in (u, v)]
    north = [dx * _difference((part / dx).mT, weights[1], grid.boundary_y).mT / dy for part in (u, v)]
    size = torch.hypot(east[0] - north[1], east[1] + north[0])
    return _inside(_caps(size, grid, gather=True), grid)


def gradient(potential: Tensor, grid: Grid) -> Tensor:
    """Returns minus the adjoint of `divergence` on `potential` `(B, 1, H, W)`, as `(B, 2, H, W)`.

    0 in invalid cells.
    """
    p = _caps(_inside(potential, grid), grid, gather=False)
    along_x = _adjoint_difference(p, along(grid, 1, sealed=True), grid.boundary_x)
    along_y = _adjoint_difference(p.mT, along(grid, 0, sealed=True), grid.boundary_y).mT
    return _flowing(torch.cat((along_x / grid.dx[:, None].to(p), along_y / grid.dy[:, None].to(p)), dim=-3), grid)


def slope(height: Tensor, grid: Grid) -> Tensor:
    """Returns (d/dx, d/dy) of a scalar `(B, 1, H, W)`, as `(B, 2, H, W)`, one-sided beside land, walls and open edges.

    NaN where a value that it needs is. Unlike `gradient` it is no adjoint, and exact for planes up to the coast.
    """
    h = _inside(height, grid)
    along_x = _difference(h, along(grid, 1, sealed=False), grid.boundary_x) / grid.dx[:, None].to(h)
    along_y = _difference(h.mT, along(grid, 0, sealed=False), grid.boundary_y).mT / grid.dy[:, None].to(h)
    return _inside(torch.cat((along_x, along_y), dim=-3), grid)


def rotated_gradient(stream: Tensor, grid: Grid) -> Tensor:
    """Returns the velocity (-dpsi/dy, dpsi/dx) of a stream function `(B, 1, H, W)`, as `(B, 2, H, W)`.

    0 in invalid cells.
    """
    psi = _caps(_inside(stream, grid), grid, gather=False)
    along_x = _difference(psi, along(grid, 1, sealed=True), grid.boundary_x)
    along_y = _difference(psi.mT, along(grid, 0, sealed=True), grid.boundary_y).mT
    return _flowing(torch.cat((-along_y / grid.dy[:, None].to(psi), along_x / grid.dx[:, None].to(psi)), dim=-3), grid)


def _clean(velocity: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the components `(B, 1, H, W)`, 0 in invalid cells and at poles, and the spacings `(H, 1)` alike."""
    velocity = _flowing(velocity, grid)
    return *u_and_v(velocity), grid.dx[:, None].to(velocity), grid.dy[:, None].to(velocity)


def _inside(field: Tensor, grid: Grid) -> Tensor:
    return torch.where(grid.valid.to(field.device), field, 0.0)


def _flowing(field: Tensor, grid: Grid) -> Tensor:
    """Returns `field` with 0 in invalid cells and in the rows of poles, P."""
    return torch.where(flowing(grid).to(field.device), field, 0.0)


def _caps(field: Tensor, grid: Grid, gather: bool) -> Tensor:
    """Returns `field` with one value in every row of a pole: C, the mean over valid cells, or C^T if `gather`.

    They differ where part of such a row is invalid: what crosses all its faces is shared by the cells that are valid.
    """
    for row, pole in zip((0, -1), grid.poles, strict=True):
        if pole:
            inside = grid.valid[row].to(field.device)
            values = field[..., row, :] if gather else torch.where(inside, field[..., row, :], 0.0)
            mean = values.sum(-1) / inside.sum().clamp(min=1)
            here = torch.zeros_like(grid.valid)
            here[row] = True
            field = torch.where(here.to(field.device), mean[..., None, None], field)
    return field


def flowing(grid: Grid) -> Tensor:
    """Returns the valid cells whose velocities count, `(H, W)`: all but those of a pole."""
    first, last = grid.poles
    inside = grid.valid.clone()
    inside[: int(first)] = False
    inside[len(inside) - int(last) :] = False
    return inside


def along(grid: Grid, axis: int, sealed: bool) -> Tensor:
    """Returns the `face_weights` of the lines of an array axis, the lines first.

    Along y, nothing lies beyond a pole, and the row of a pole takes part where its neighbour does.
    """
    if axis == 1:
        return face_weights(grid.valid, grid.boundary_x, sealed)
    valid = grid.valid.clone()
    for row, beside, pole in zip((0, -1), (1, -2), grid.poles, strict=True):
        if pole:
            valid[row] = valid[beside]
    return face_weights(valid.mT, grid.boundary_y, sealed, closed=grid.poles)


def _difference(field: Tensor, weights: Tensor, boundary: str) -> Tensor:
    """Returns the value on the far face of each cell less that on its near face, along the last axis.

    Arguments:
        field: Cell values with 0 in invalid cells, `(..., H, W)`.
        weights: The `face_weights`, `(6, H, W + 1)`.
        boundary: `periodic`, `wall` or `open`.
    """
    faces, weights = weights.shape[-1], weights.to(field)
    cells = _ghosts(field, boundary)
    face = sum(weights[k] * cells[..., k : k + faces] for k in range(2 * REACH))
    return face.diff(dim=-1)


def _adjoint_difference(field: Tensor, weights: Tensor, boundary: str) -> Tensor:
    """Returns minus the transpose of `_difference`: every jump over a face goes to the cells of its value."""
    weights = weights.to(field)
    jumps = F.pad(field, (1, 1)).diff(dim=-1)
    last = 2 * REACH - 1
    cells = sum(F.pad(weights[k] * jumps, (k, last - k)) for k in range(last + 1))
    inner = cells[..., REACH:-REACH]
    if boundary == "periodic":
        rest = (*inner.shape[:-1], inner.shape[-1] - REACH)
        empty = inner.new_zeros(rest)
        inner = inner + torch.cat((cells[..., -REACH:], empty), -1) + torch.cat((empty, cells[..., :REACH]), -1)
    return inner


def _ghosts(cells: Tensor, boundary: str) -> Tensor:
    """Returns `cells` with ghost cells on both ends of the last axis: wrapped if periodic, else 0 (False)."""
    near, far = cells[..., :REACH], cells[..., -REACH:]
    if boundary == "periodic":
        return torch.cat((far, cells, near), dim=-1)
    empty = cells.new_zeros((*cells.shape[:-1], REACH))
    return torch.cat((empty, cells, empty), dim=-1)


def face_weights(valid: Tensor, boundary: str, sealed: bool, closed: tuple[bool, bool] = (False, False)) -> Tensor:
    """Returns what each face takes from the three cells before it and the three after it, `(6, H, W + 1)`.

    Arguments:
        valid: The valid cells, `(H, W)`.
        boundary: `periodic`, `wall` or `open`, along the last axis.
        sealed: Whether nothing passes land and walls; otherwise every one-sided face is extrapolated.
        closed: Whether the first and the last face have the value 0 whatever the boundary.
    """
    faces = valid.shape[-1] + 1
    cells = _ghosts(valid, boundary)
    ok = torch.stack([cells[..., k : k + faces] for k in range(2 * REACH)])
    both = ok[2] & ok[3]
    passes = torch.full_like(both, not sealed)
    if boundary == "open":
        passes[..., 0] = passes[..., -1] = True
    passes[..., 0] &= not closed[0]
    passes[..., -1] &= not closed[1]
    before = _one_sided(ok[:3].flip(0), ~ok[3] & passes).flip(0)
    after = _one_sided(ok[3:], ~ok[2] & passes)
    weights = torch.cat((before, after))
    weights[2:4] += 0.5 * both
    return weights


def _one_sided(ok: Tensor, needed: Tensor) -> Tensor:
    """Returns extrapolation weights of the cells at distance 1/2, 3/2 and 5/2 from a face, of which `ok` are valid."""
    one = ok[0] & needed
    two = one & ok[1]
    three = two & ok[2]
    return torch.stack((one + 0.5 * two + 0.5 * three, -0.5 * two - 1.0 * three, 0.5 * three))
