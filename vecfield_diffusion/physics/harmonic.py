"""The harmonic fill: the field that continues the known cells with no sources of its own.

In every valid cell c that is not known, the flow over its faces balances,

    sum over neighbours n of  w_cn (u_c - u_n) = 0,      w = face length / distance of the cell centres,

the 5-point Laplace equation in finite volumes. Known cells hold their values; a face of land, or of a boundary that is
not periodic, has w = 0 (no flux). In a region with a known cell this is the minimum of sum_faces w (u_c - u_n)^2, and
no filled value lies outside the range of the known ones.

The equations A u = f are solved directly, by nested dissection (George 1973, SIAM J. Numer. Anal. 10, 345): the grid is
cut into small blocks, the inside e of each block is eliminated,

    u_e = A_ee^-1 f_e - X u_b,   X = A_ee^-1 A_eb,   S = A_bb - A_eb^T X,   g = f_b - X^T f_e,

which leaves equations S u_b = g for its outline b; then blocks are joined in pairs, each time eliminating the line they
share, until the outline of the whole remains. The outline of the whole closes on itself, so that every grid is a torus;
a boundary is a line of faces with w = 0. The order depends on the shape alone, never on the masks, so that all samples
of a batch share every operation: O((H W)^1.5) of them per sample, nothing to iterate and nothing to synchronise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vecfield_diffusion.axes import by_frame

_LEAF = 4  # cells along the side of the smallest blocks, at most
_CELLS = 2**14  # cells solved at once on a CPU, so that the matrices of a step stay in its cache
# Relative excess of the diagonal. It makes a region without known cells definite (its answer is then exactly 0), moves
# others by about 1e-13 times the cells per known cell, and stands well above the rounding of the elimination.
_EXCESS = 1e-13

Node = tuple[int, int]
Runs = tuple[tuple[int, int], ...]  # a permutation as consecutive runs (start, length)


def harmonic_fill(
    values: Tensor,
    known: Tensor,
    valid: Tensor,
    periodic: tuple[bool, bool] = (False, False),
    dx: Tensor | float = 1.0,
    dy: Tensor | float = 1.0,
) -> Tensor:
    """Continue the known cells of `values` into all valid cells by the discrete Laplace equation.

    The solution is computed in float64 and returned in the dtype of `values`. Not differentiable in `values`.

    Arguments:
        values: The fields `(B, C, H, W)`, finite in known cells; what other cells hold, NaN included, has no effect.
            Sequences `(B, T, C, H, W)`, as are the masks then, are filled frame by frame.
        known: The cells whose values are given, boolean `(B, 1, H, W)`; those outside the domain are ignored.
        valid: The cells of the domain, boolean `(B, 1, H, W)`, or `(1, 1, H, W)` for all samples.
        periodic: Whether y and x close on themselves, as `Grid.periodic`.
        dx: The spacing along x, a number or one per row `(H,)`, as `Grid.dx`; only ratios matter.
        dy: The spacing along y, likewise.

    Returns:
        `(B, C, H, W)`: the given values in known cells, the solution in other valid cells, 0 outside the domain and in
        connected regions without any known cell.

    Raises:
        ValueError: A mask that is not boolean or whose shape does not fit `values`.
    """
    if values.ndim > 4:
        return by_frame(lambda *fields: harmonic_fill(*fields, periodic, dx, dy), values, known, valid)
    batch, _, height, width = values.shape
    for name, mask in (("known", known), ("valid", valid)):
        if mask.dtype != torch.bool or mask.shape not in ((batch, 1, height, width), (1, 1, height, width)):
            raise ValueError(
                f"{name} must be boolean {(batch, 1, height, width)}, got {mask.dtype} {tuple(mask.shape)}"
            )
    valid, known = valid.expand(batch, -1, -1, -1), known & valid
    given = torch.where(known, values, 0.0)
    chunk = batch if values.is_cuda else max(1, _CELLS // (_padded(height) * _padded(width)))
    with torch.no_grad():
        weights = _conductances(values.device, height, width, periodic, dx, dy)
        parts = zip(given.split(chunk), known.split(chunk), valid.split(chunk), strict=True)
        filled = [_fill(value, some[:, 0], inside[:, 0], *weights) for value, some, inside in parts]
        return torch.where(known, given, torch.cat(filled).to(values.dtype))


def _conductances(
    device: torch.device, height: int, width: int, periodic: tuple[bool, bool], dx: Tensor | float, dy: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Returns w of the far face of each cell along x and along y, `(H, W)` each, before any land."""
    dx, dy = (torch.as_tensor(d, dtype=torch.float64, device=device).abs().expand(height) for d in (dx, dy))
    x = (dy / dx)[:, None].repeat(1, width)
    y = ((dx + dx.roll(-1)) / (dy + dy.roll(-1)))[:, None].repeat(1, width)
    x[:, -1] *= periodic[1]
    y[-1] *= periodic[0]
    return x, y


def _fill(given: Tensor, known: Tensor, valid: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Returns the solution `(b, C, H, W)` for `given` with 0 in unknown cells, and masks `(b, H, W)`."""
    height, width = valid.shape[-2:]
    high, wide = _padded(height), _padded(width)
    corner = (0, wide - width, 0, high - height)
    x = F.pad(_stretched(x * (valid & valid.roll(-1, -1)), wide), (0, 0, 0, high - height))
    y = F.pad(_stretched((y * (valid & valid.roll(-1, -2))).mT, high).mT, (0, wide - width))
    given, free = F.pad(given, corner), (~F.pad(known, corner)).double()
    total = (x + x.roll(1, -1) + y + y.roll(1, -2)) * free * (1 + _EXCESS)
    source = _pull(given, x[:, None], -1) + _pull(given, y[:, None], -2)
    solved = _solve(
        torch.where(total > 0, total, 1.0),  # cells that no equation holds become u = 0
        x * free * free.roll(-1, -1),
        y * free * free.roll(-1, -2),
        (source * free[:, None]).movedim(1, -1),
    )
    return solved[:, :height, :width].movedim(-1, 1)


def _pull(given: Tensor, w: Tensor, dim: int) -> Tensor:
    """Returns what each cell receives from its given neighbours along an axis."""
    return w * given.roll(-1, dim) + (w * given).roll(1, dim)


def _stretched(w: Tensor, wide: int) -> Tensor:
    """Returns conductances along the last axis of a ring that is widened to `wide` cells.

    The cells that are put in lie on the face that closes the ring: n resistors of 1 / (n w) in a row are one of 1 / w.
    """
    parts = wide - w.shape[-1] + 1
    return torch.cat((w[..., :-1], (parts * w[..., -1:]).expand(*w.shape[:-1], parts)), dim=-1)


# The order of elimination, from the shape alone.


@dataclass(frozen=True)
class _Plan:
    """How a torus is taken apart; nodes of a block of h x w cells are (0..h, 0..w), the far sides being shared.

    Attributes:
        leaf: Rows and columns of a smallest block.
        blocks: Their order, in which joined blocks are neighbours at every step, as indices of row-major blocks.
        nodes: Position of each cell of a leaf (row-major), and of its neighbours along x and y, among the leaf's nodes
            (outline first, then inside), `(3, h * w)`.
        joins: Of each step from small to large: the nodes on a shared line, and how the outline that it leaves is put
            in order for the next step, as runs and as the inverse permutation.
        ring: The cell of the torus that each node of the last outline is, `(m,)`, and the number of such cells.
    """

    leaf: tuple[int, int]
    blocks: Tensor
    nodes: Tensor
    joins: tuple[tuple[int, Runs, Tensor], ...]
    ring: tuple[Tensor, int]


def _splits(n: int) -> tuple[int, int]:
    """Returns cells of a leaf and the number of halvings (leaf, k) that cover n cells with the least leaf * 2^k."""
    halvings = max(0, (-(-n // _LEAF) - 1).bit_length())
    return max(2, -(-n // 2**halvings)), halvings


def _padded(n: int) -> int:
    leaf, halvings = _splits(n)
    return leaf * 2**halvings


def _outline(h: int, w: int, axis: int) -> list[Node]:
    """Returns the outline of a block, ordered for a join along `axis`.

    The order is: inside of the near side, its two ends, the middle, the two ends of the far side, its inside. So the
    nodes that a near block keeps, and those that a far block keeps, are one slice each, with the shared ends adjacent.
    """
    nodes = [(i, j) for i in range(h + 1) for j in range(w + 1) if i in (0, h) or j in (0, w)]
    far, across = (h, w)[axis], (h, w)[1 - axis]

    def place(node: Node) -> tuple[int, Node]:
        end = node[1 - axis] in (0, across)
        return {0: int(end), far: 4 - int(end)}.get(node[axis], 2), node

    return sorted(nodes, key=place)


@lru_cache(maxsize=64)
def _plan(height: int, width: int) -> _Plan:
    """Returns the plan of a torus of height x width cells, as `_padded` gives them."""
    h, w = leaf = _splits(height)[0], _splits(width)[0]
    inside = [(i, j) for i in range(1, h) for j in range(1, w)]
    cells = [(i, j) for i in range(h) for j in range(w)]
    axis = _next_axis(h, w, height, width)
    outline = _outline(h, w, axis)
    at = {node: k for k, node in enumerate(outline + inside)}
    nodes = torch.tensor([[at[i + a, j + b] for i, j in cells] for a, b in ((0, 0), (0, 1), (1, 0))])
    blocks = torch.arange((height // h) * (width // w)).view(height // h, width // w, 1)
    joins = []
    while (h, w) != (height, width):
        blocks = torch.cat(((blocks[::2], blocks[1::2]) if axis == 0 else (blocks[:, ::2], blocks[:, 1::2])), dim=-1)
        shift = (h, 0) if axis == 0 else (0, w)
        lines = (w if axis == 0 else h) - 1
        kept = outline[: len(outline) - lines] + [(i + shift[0], j + shift[1]) for i, j in outline[lines + 2 :]]
        h, w = h + shift[0], w + shift[1]
        axis = _next_axis(h, w, height, width)
        outline = _outline(h, w, axis)
        at = {node: k for k, node in enumerate(kept)}
        order = [at[node] for node in outline]
        joins.append((lines, _runs(order), torch.tensor(order).argsort()))
    ring = torch.tensor([(i % height) * width + j % width for i, j in outline]).unique(return_inverse=True)
    return _Plan(leaf, blocks.flatten(), nodes, tuple(joins), (ring[1], len(ring[0])))


def _next_axis(h: int, w: int, height: int, width: int) -> int:
    """Returns the axis to join along: the shorter one, so that outlines stay short, unless it is complete."""
    return 0 if w == width or (h < w and h < height) else 1


def _runs(order: Sequence[int]) -> Runs:
    starts = [k for k in range(len(order)) if k == 0 or order[k] != order[k - 1] + 1]
    return tuple((order[a], b - a) for a, b in zip(starts, [*starts[1:], len(order)], strict=True))


# The elimination. Matrices are (b * blocks, nodes, nodes), right-hand sides (b * blocks, nodes, C).


def _solve(diagonal: Tensor, x: Tensor, y: Tensor, source: Tensor) -> Tensor:
    """Returns the solution of A u = f on a torus.

    Arguments:
        diagonal: The diagonal of A, `(b, H, W)`.
        x: Minus the entry of A for each cell and the next one along x, `(b, H, W)`.
        y: Likewise along y.
        source: f, `(b, H, W, C)`.

    Returns:
        u, `(b, H, W, C)`.
    """
    plan = _plan(*diagonal.shape[1:])
    own = plan.nodes[0].to(diagonal.device)
    matrix, side = _leaves(plan, diagonal, x, y, source)
    kept = 2 * sum(plan.leaf)
    system = matrix[:, :kept, :kept].contiguous(), side[:, :kept]
    steps = [_eliminate(matrix[:, kept:, kept:], matrix[:, kept:, :kept], side[:, kept:], *system)]
    for lines, runs, _ in plan.joins:
        inner, coupling, force, *system = _joined(*system, lines)
        steps.append(_eliminate(inner, coupling, force, *system))
        system = _ordered(_ordered(system[0], runs, -1), runs, -2), _ordered(system[1], runs, -2)
    u = _close(*system, *plan.ring)
    for (_, _, back), (force, coupling) in zip(reversed(plan.joins), reversed(steps[1:]), strict=True):
        u = u[:, back.to(u.device)]
        inside, middle = force - coupling @ u, u.shape[1] // 2
        near = torch.cat((u[:, : middle + 1], inside), dim=1)
        far = torch.cat((inside, u[:, middle - 1 :]), dim=1)
        u = torch.stack((near, far), dim=1).flatten(0, 1)
    u = torch.cat((u, steps[0][0] - steps[0][1] @ u), dim=1)[:, own]
    return _from_blocks(u, plan, source.shape)


def _to_blocks(cells: Tensor, plan: _Plan) -> Tensor:
    """Returns `(b, H, W, ...)` as `(b * blocks, cells of a leaf, ...)`."""
    (h, w), (batch, height, width, *rest) = plan.leaf, cells.shape
    split = cells.reshape(batch, height // h, h, width // w, w, *rest).transpose(2, 3)
    return split.reshape(batch, -1, h * w, *rest)[:, plan.blocks.to(cells.device)].flatten(0, 1)


def _from_blocks(blocks: Tensor, plan: _Plan, shape: Sequence[int]) -> Tensor:
    """Returns the inverse of `_to_blocks`."""
    (h, w), (batch, height, width, *rest) = plan.leaf, shape
    back = plan.blocks.argsort().to(blocks.device)
    split = blocks.view(batch, -1, h * w, *rest)[:, back].view(batch, height // h, width // w, h, w, *rest)
    return split.transpose(2, 3).reshape(shape)


def _leaves(plan: _Plan, diagonal: Tensor, x: Tensor, y: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a and f of the smallest blocks; each cell and its far faces belong to one block."""
    own, east, north = plan.nodes.to(diagonal.device)
    force = _to_blocks(source, plan)
    count = (plan.leaf[0] + 1) * (plan.leaf[1] + 1)
    matrix = force.new_zeros(count * count, len(force))
    matrix[own * count + own] = _to_blocks(diagonal, plan).T
    for w, other in ((x, east), (y, north)):
        matrix[own * count + other] = matrix[other * count + own] = -_to_blocks(w, plan).T
    side = force.new_zeros(len(force), count, force.shape[-1])
    side[:, own] = force
    return matrix.T.contiguous().view(-1, count, count), side


def _eliminate(inner: Tensor, coupling: Tensor, force: Tensor, outer: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """Returns A_ee^-1 f_e and X; `outer` and `side` become S and g in place."""
    inverse = _inverse(inner)
    x = inverse @ coupling
    outer.baddbmm_(coupling.mT, x, alpha=-1)
    side.baddbmm_(x.mT, force, alpha=-1)
    return inverse @ force, x


def _inverse(matrix: Tensor) -> Tensor:
    # cholesky_ex does not wait for the device to report failure; the matrices are definite by construction.
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix).L)


def _joined(outer: Tensor, side: Tensor, lines: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns A_ee, A_eb, f_e, A_bb and f_b of joined neighbours: e the inside of the shared line, of `lines` nodes.

    b is what the near block keeps, with the ends of the line last, then what the far block keeps, with the ends first.
    """
    near, far, g_near, g_far = outer[::2], outer[1::2], side[::2], side[1::2]
    keep = outer.shape[-1] - lines
    total = 2 * keep - 2
    inner = near[:, keep:, keep:] + far[:, :lines, :lines]
    coupling = outer.new_zeros(len(near), lines, total)
    coupling[..., :keep] = near[:, keep:, :keep]
    coupling[..., keep - 2 :] += far[:, :lines, lines:]
    joined = outer.new_zeros(len(near), total, total)
    joined[:, :keep, :keep] = near[:, :keep, :keep]
    joined[:, keep - 2 :, keep - 2 :] += far[:, lines:, lines:]
    force = F.pad(g_near[:, :keep], (0, 0, 0, keep - 2)) + F.pad(g_far[:, lines:], (0, 0, keep - 2, 0))
    return inner, coupling, g_near[:, keep:] + g_far[:, :lines], joined, force


def _ordered(x: Tensor, runs: Runs, dim: int) -> Tensor:
    # Copies of whole runs are several times faster than a gather of single entries.
    return torch.cat([x.narrow(dim, start, length) for start, length in runs], dim)


def _close(outer: Tensor, side: Tensor, ring: Tensor, count: int) -> Tensor:
    """Returns u on the outline of the whole, whose opposite sides are the same cells."""
    ring = ring.to(outer.device)
    rows = outer.new_zeros(len(outer), count, len(ring)).index_add_(1, ring, outer)
    matrix = outer.new_zeros(len(outer), count, count).index_add_(2, ring, rows)
    force = side.new_zeros(len(side), count, side.shape[-1]).index_add_(1, ring, side)
    return (_inverse(matrix) @ force)[:, ring]
