"""Projections and Poisson solvers against dense pseudo-inverses, analytic parts, each other and principles."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

from vecfield_diffusion.physics import poisson
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.multigrid import Multigrid
from vecfield_diffusion.physics.operators import divergence, gradient, rotated_gradient
from vecfield_diffusion.physics.projection import (
    helmholtz,
    leray,
    project,
)

NAMES = ("periodic", "wall", "open")
PAIRS = [{"boundary_x": x, "boundary_y": y} for x in NAMES for y in NAMES]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pixels(share, *shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def full(*shape):
    return torch.ones(shape, dtype=torch.bool)


def basins(height=9, width=12):
    """A land bridge from south to north, an island in one basin, and a basin of one cell."""
    valid = full(height, width)
    valid[:, 6] = False
    valid[3:5, 2:4] = False
    valid[5:8, 8:11] = False
    valid[6, 9] = True
    return valid


def coast(size, seed=0):
    """Ragged land on three tenths of a square, with many lakes and islands: a rough random height cut at a level."""
    k = torch.fft.fftfreq(size, 1 / size).square()[:, None] + torch.fft.rfftfreq(size, 1 / size).square()
    waves = torch.fft.rfft2(draw(size, size, seed=seed).float()) * k.clamp(min=1) ** -0.9
    height = torch.fft.irfft2(waves, s=(size, size))
    return height > height.quantile(0.3)


def sphere(valid, **boundaries):
    height, width = valid.shape
    lon, lat = torch.linspace(10, 50, width), torch.linspace(75, 30, height)
    return Grid.from_degrees(lon, lat, valid, **boundaries)


def globe(valid, south=-90.0, **boundaries):
    """Rows from `south` to the north pole, the poles among them where they are reached."""
    height, width = valid.shape
    lon, lat = torch.arange(width) * 360 / width, torch.linspace(90, south, height)
    return Grid.from_degrees(lon, lat, valid, **boundaries)


def continents(height=9, width=12):
    """Land around one pole, an island, and a continent."""
    valid = full(height, width)
    valid[-1] = valid[-2, :4] = False
    valid[3, 2] = valid[4:7, 5:8] = False
    return valid


SMALL = [
    *(Grid(full(8, 11), 2.0, 0.7, **pair) for pair in PAIRS),  # an even periodic axis and an odd one
    *(sphere(full(9, 12), **pair) for pair in PAIRS),
    *(Grid(basins(), 2.0, 0.7, **pair) for pair in PAIRS),
    *(sphere(basins(), **pair) for pair in PAIRS[1::3]),
    Grid(pixels(0.5, 9, 12), 1.0, 1.0, "periodic", "open"),
    Grid(basins().T, torch.linspace(1, 3, 12), 0.7, "open", "periodic"),
    globe(full(9, 12)),
    globe(full(8, 11)),
    globe(full(7, 12), south=30.0),
    globe(continents()),
]
LARGE = [
    *(Grid(coast(64), 2.0, 0.7, name, name) for name in NAMES),
    sphere(coast(64), boundary_x="wall", boundary_y="open"),
    Grid(full(48, 31), 2.0, -0.7, "wall", "periodic"),
    sphere(full(40, 50), boundary_x="periodic", boundary_y="wall"),
    globe(coast(64)),
]


def areas(grid):
    return (grid.dx * grid.dy).abs()[:, None].expand(grid.shape)


def weights(grid, channels):
    """The root of the area of every value, 0 on land, `(channels H W,)`."""
    return (areas(grid).sqrt() * grid.valid).expand(channels, -1, -1).flatten()


def dense(operator, grid, channels):
    """The matrix of an operator between fields that are scaled by the roots of their areas."""
    count = channels * grid.valid.numel()
    images = operator(torch.eye(count, dtype=torch.float64).view(count, channels, *grid.shape), grid)
    root = areas(grid).sqrt().flatten()
    out, into = (root.repeat(part) for part in (images.shape[1], channels))
    return out[:, None] * images.flatten(1).T / into


def scaled(fields, grid):
    return (torch.where(grid.valid, fields, 0.0) * areas(grid).sqrt()).flatten(1).T


def unscaled(flat, grid):
    return flat.T.reshape(flat.shape[1], -1, *grid.shape) / areas(grid).sqrt()


def inner(a, b, grid):
    return (areas(grid) * a * b).sum((1, 2, 3))


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol * float(expected.abs().max().clamp(min=1e-300)))


def pinv(matrix):
    return torch.linalg.pinv(matrix, rtol=1e-11)


@pytest.mark.parametrize("grid", SMALL)
def test_leray_is_the_dense_projection(grid):
    matrix = dense(divergence, grid, 2)
    velocity = draw(3, 2, *grid.shape)
    flat = scaled(velocity, grid)
    close(leray(velocity, grid), unscaled(flat - pinv(matrix) @ (matrix @ flat), grid))


@pytest.mark.parametrize("grid", [*SMALL, *LARGE])
def test_leray_leaves_no_divergence_and_is_idempotent(grid):
    velocity = draw(2, 2, *grid.shape)
    once = leray(velocity, grid)
    assert divergence(once, grid).abs().max() < 1e-10 * divergence(velocity, grid).abs().max()
    close(leray(once, grid), once)
    removed = torch.where(grid.valid, velocity, 0.0) - once
    assert (inner(removed, once, grid).abs() < 1e-10 * inner(once, once, grid)).all()  # nearest: orthogonal


def test_known_fields_on_the_plane_are_taken_apart():
    """On a periodic plane: a mean, a stream function and a potential, each one wave."""
    grid = Grid(full(18, 30), 2.0, 0.7, "periodic", "periodic")
    y, x = (torch.arange(n, dtype=torch.float64) * 2 * math.pi / n for n in grid.shape)
    psi = (x[None, :].sin() * (2 * y[:, None]).cos())[None, None]
    phi = ((3 * x[None, :]).cos() + y[:, None].sin())[None, None]
    mean = torch.tensor([0.3, -1.2], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 18, 30)
    velocity = rotated_gradient(psi, grid) + gradient(phi, grid) + mean
    rotational, divergent, harmonic = helmholtz(velocity, grid)
    close(rotational, rotated_gradient(psi, grid))
    close(divergent, gradient(phi, grid))
    close(harmonic, mean)
    close(leray(velocity, grid), velocity - gradient(phi, grid))


@pytest.mark.parametrize("grid", SMALL)
def test_helmholtz_parts_are_the_dense_ones(grid):
    matrix, rotation = dense(divergence, grid, 2), dense(rotated_gradient, grid, 1)
    both = torch.cat((matrix, rotation.T))
    velocity = draw(3, 2, *grid.shape)
    flat = scaled(velocity, grid)
    solenoidal = flat - pinv(matrix) @ (matrix @ flat)
    harmonic = flat - pinv(both) @ (both @ flat)
    parts = helmholtz(velocity, grid)
    for found, expected in zip(parts, (solenoidal - harmonic, flat - solenoidal, harmonic), strict=True):
        torch.testing.assert_close(found, unscaled(expected, grid), rtol=0, atol=1e-9)


@pytest.mark.parametrize("grid", [*SMALL, *LARGE])
def test_helmholtz_parts_are_orthogonal_and_sum_to_the_field(grid):
    velocity = draw(2, 2, *grid.shape)
    rotational, divergent, harmonic = helmholtz(velocity, grid)
    close(rotational + divergent + harmonic, torch.where(grid.valid, velocity, 0.0), 1e-14)
    energy = inner(velocity, torch.where(grid.valid, velocity, 0.0), grid)
    for a, b in ((rotational, divergent), (rotational, harmonic), (divergent, harmonic)):
        assert (inner(a, b, grid).abs() < 1e-11 * energy).all()
    size = divergence(velocity, grid).abs().max()
    assert divergence(rotational, grid).abs().max() < 1e-10 * size
    assert divergence(harmonic, grid).abs().max() < 1e-10 * size


def test_flow_around_an_island_is_harmonic():
    """In a walled ring nothing but a harmonic field circulates; a box without an island holds none but sawteeth."""
    grid = Grid(full(15, 15), 1.0, 1.0, "wall", "wall")
    grid.valid[5:10, 5:10] = False
    y, x = (torch.arange(15).double() - 7).view(-1, 1), (torch.arange(15).double() - 7).view(1, -1)
    circling = leray(torch.stack((-y / (x**2 + y**2), x / (x**2 + y**2)))[None].nan_to_num(), grid)
    _, divergent, harmonic = helmholtz(circling, grid)
    assert divergent.abs().max() < 1e-10
    assert inner(harmonic, circling, grid) > 0.7 * inner(circling, circling, grid)


@pytest.mark.parametrize("grid", SMALL)
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_project_is_the_dense_least_squares_with_held_cells(grid, share):
    """The shortest change of the free cells with the least divergence: u - L_f^+ L u."""
    velocity, held = draw(3, 2, *grid.shape), pixels(share, 3, 1, *grid.shape)
    found = project(velocity, grid, held)
    matrix, flat = dense(divergence, grid, 2), scaled(velocity, grid)
    for b in range(3):
        free = matrix * (~held[b]).flatten().repeat(2)
        expected = flat[:, b] - pinv(free) @ (matrix @ flat[:, b])
        torch.testing.assert_close(found[b], unscaled(expected[:, None], grid)[0], rtol=0, atol=1e-8)
    kept = held.expand_as(velocity) & grid.valid
    assert torch.equal(found[kept], velocity[kept])


def test_project_reaches_what_the_held_cells_allow_at_a_coast():
    grid = Grid(coast(64), 2.0, 0.7, "wall", "open")
    velocity = draw(2, 2, 64, 64)
    few, most = pixels(0.05, 2, 1, 64, 64), pixels(0.75, 2, 1, 64, 64)
    assert divergence(project(velocity, grid, few), grid).std() < 0.1 * divergence(velocity, grid).std()
    for held in (few, most):
        left = divergence(project(velocity, grid, held), grid)
        slope = torch.where(held, 0.0, gradient(left, grid))  # stationary: no change of a free cell lowers it
        assert slope.abs().max() < 1e-9 * gradient(divergence(velocity, grid), grid).abs().max()
    close(project(velocity, grid, torch.zeros_like(few)), leray(velocity, grid), 1e-8)
    assert torch.equal(project(velocity, grid), leray(velocity, grid))


@pytest.mark.parametrize("held", [full(2, 1, 8, 10), full(1, 2, 8, 11), torch.ones(2, 1, 8, 11)])
def test_held_of_another_shape_or_type_is_refused(held):
    with pytest.raises(ValueError, match="^held must be boolean"):
        project(draw(2, 2, 8, 11), SMALL[0], held)


MAPS = {
    "leray": leray,
    "project": lambda u, grid: project(u, grid, pixels(0.3, len(u), 1, *grid.shape)),
    "rotational": lambda u, grid: helmholtz(u, grid)[0],
    "divergent": lambda u, grid: helmholtz(u, grid)[1],
    "harmonic": lambda u, grid: helmholtz(u, grid)[2],
}
#: Those that the other two are differences of.
SOLVES = ("leray", "project", "harmonic")


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("grid", [SMALL[k] for k in (0, 8, 16, 22, 24, 27, -4, -1)])
def test_derivative_is_the_transposed_matrix(name, grid):
    """One pass back of random cotangents is the transpose of the matrix read off from all unit vectors, twice over."""
    count = 2 * grid.valid.numel()
    call = MAPS[name] if name != "project" else partial(project, held=pixels(0.3, 1, 1, *grid.shape))
    basis = torch.eye(count, dtype=torch.float64).view(count, 2, *grid.shape)
    matrix = call(basis, grid=grid).flatten(1).T
    velocity = draw(1, 2, *grid.shape).requires_grad_()
    result = call(velocity, grid=grid)
    cotangent = draw(*result.shape, seed=5).requires_grad_()
    (slope,) = torch.autograd.grad(result, velocity, cotangent, create_graph=True)
    close(slope.flatten(), matrix.T @ cotangent.detach().flatten(), 1e-8)
    (again,) = torch.autograd.grad(slope, cotangent, velocity.detach())
    close(again, result.detach(), 1e-8)


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("grid", [LARGE[0], LARGE[5], LARGE[6]])
def test_adjoint_identity_on_large_grids(name, grid):
    """<F u, g> = <u, F^T g>, through multigrid too."""
    velocity = draw(1, 2, *grid.shape).requires_grad_()
    result = MAPS[name](velocity, grid)
    cotangent = draw(*result.shape, seed=5)
    (slope,) = torch.autograd.grad(result, velocity, cotangent)
    other = draw(1, 2, *grid.shape, seed=6)
    left, right = MAPS[name](other, grid) * cotangent, other * slope
    assert abs(left.sum() - right.sum()) < 1e-10 * left.abs().sum()


@pytest.mark.parametrize("name", MAPS)
def test_land_never_matters_and_is_zero(name):
    grid = Grid(basins(), 2.0, 0.7, "periodic", "open")
    clean = draw(2, 2, *grid.shape).requires_grad_()
    dirty = torch.where(grid.valid, clean.detach(), math.nan).requires_grad_()
    found, expected = MAPS[name](dirty, grid), MAPS[name](clean, grid)
    assert torch.equal(found, expected)
    assert (found[..., ~grid.valid] == 0).all()
    found.square().sum().backward()
    assert dirty.grad.isfinite().all() and (dirty.grad[..., ~grid.valid] == 0).all()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("grid", [LARGE[1], LARGE[4]])
def test_batches_and_float32(name, grid):
    velocity = draw(3, 2, *grid.shape) * torch.tensor([1e-3, 1.0, 0.0]).view(3, 1, 1, 1)
    held = pixels(0.3, 3, 1, *grid.shape)
    call = MAPS[name] if name != "project" else lambda u, grid: project(u, grid, held[: len(u)])
    together = call(velocity, grid)
    close(call(velocity[:1], grid), together[:1], 1e-9)
    assert (together[2] == 0).all()
    narrow = call(velocity.float(), grid)
    assert narrow.dtype == torch.float32
    close(narrow.double(), together, 1e-5)


@pytest.mark.parametrize("grid", [LARGE[4], LARGE[5], replace(LARGE[5], boundary_y="open")])
def test_multigrid_and_the_direct_solver_agree(grid):
    """The same equations on a grid without land, for L and for the stream function."""
    eqs = poisson.equations(grid, torch.device("cpu"))
    cells = torch.stack((eqs._cells // grid.shape[1], eqs._cells % grid.shape[1]))
    for inverse, factor in ((eqs.poisson, eqs._coo[0]), (eqs.vorticity, eqs._coo[1].t().coalesce())):
        matrix = torch.sparse.mm(factor, factor.t()).coalesce()
        cycle = Multigrid(matrix, eqs._root, cells, torch.device("cpu"))
        assert len(cycle.levels) >= 1 and inverse.direct
        source = inverse.factor @ draw(inverse.factor.rows.shape[1], 2)
        iterated = replace(inverse, approximate=cycle, direct=False)(source)
        close(inverse.factor.T @ iterated, inverse.factor.T @ inverse(source), 1e-9)
        if "open" not in (grid.boundary_x, grid.boundary_y):
            close(iterated, inverse(source), 1e-9)


def iterations(grid):
    """The cycles of multigrid that a projection takes."""
    eqs = poisson.Equations(grid, torch.device("cpu"))
    calls = []
    inverse = eqs.poisson
    counted = replace(inverse, approximate=lambda r: calls.append(1) or inverse.approximate(r))
    source = eqs.divergence @ draw(eqs.divergence.rows.shape[1], 1)
    solution = counted(source)
    assert (eqs.divergence @ (eqs.divergence.T @ solution) - source).norm() < 1e-11 * source.norm()
    return len(calls)


@pytest.fixture
def by_multigrid(monkeypatch):
    """No equations are factorised."""
    monkeypatch.setattr(poisson, "MOST", 0)


def test_iterations_hardly_grow_with_the_grid(by_multigrid):
    counts = [iterations(Grid(coast(size), 1.0, 1.0, "wall", "wall")) for size in (64, 128, 256)]
    assert counts[-1] < 80 and counts[-1] < 2 * counts[0]
    assert iterations(sphere(coast(128))) < 200


@pytest.mark.parametrize("grid", [Grid(coast(128), 1.0, 1.0, "wall", "wall"), sphere(coast(128))])
def test_factorised_a_handful_of_iterations_is_enough(grid):
    assert iterations(grid) < 10


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("grid", [LARGE[0], LARGE[6]])
def test_factorised_and_iterated_are_the_same(name, grid, monkeypatch):
    velocity = draw(2, 2, *grid.shape)
    found = MAPS[name](velocity, grid)
    poisson.equations.cache_clear()
    monkeypatch.setattr(poisson, "MOST", 0)
    expected = MAPS[name](velocity, grid)
    poisson.equations.cache_clear()
    close(found, expected, 1e-8)


def test_factorisations_are_kept_for_the_masks_used_last():
    eqs = poisson.Equations(LARGE[0], torch.device("cpu"))
    free = pixels(0.5, len(eqs._cells), 12)
    assert eqs.holding(free) is None  # too many at once
    for column in range(12):
        assert eqs.holding(free[:, [column, column]]) is not None
    kept = eqs._held.factored(free[:, 5])
    assert len(eqs._held.kept) == 8 and eqs._held.factored(free[:, 5]) is kept
    assert eqs._held.factored(free[:, 0]) is not kept and len(eqs._held.kept) == 8


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_land_like_salt_and_pepper(share, by_multigrid):
    """Thousands of small basins, or one that is full of holes, take no longer."""
    assert iterations(Grid(pixels(share, 160, 160), 1.0, 1.0, "wall", "wall")) < 150


def test_multigrid_cycle_is_symmetric_and_definite(by_multigrid):
    eqs = poisson.Equations(LARGE[0], torch.device("cpu"))
    a, b = draw(len(eqs._cells), 1), draw(len(eqs._cells), 1, seed=1)
    cycle = eqs.poisson.approximate
    assert len(cycle.levels) == 2
    assert abs((cycle(a) * b).sum() - (a * cycle(b)).sum()) < 1e-12 * a.norm() * cycle(b).norm()
    assert (a * cycle(a)).sum() > 0


@pytest.mark.parametrize("count", [1, 2, 7, 12])
def test_cosine_transform(count):
    n = torch.arange(count, dtype=torch.float64)
    matrix = torch.cos(math.pi * n[:, None] * (n + 0.5) / count)
    x = draw(3, count)
    close(poisson.dct(x), x @ matrix.T, 1e-14)
    close(poisson.inverse_dct(poisson.dct(x)), x, 1e-14)


def test_a_finished_column_stays_as_it_is():
    """A unit vector is solved in one step; it does not move while its neighbour goes on."""
    matrix = torch.diag(torch.linspace(1, 2, 9).double())
    both = torch.stack((matrix[3], draw(9)), dim=1)
    sizes = torch.tensor([1e16, 0.0], dtype=torch.float64)  # and with a generous size, not even the first
    alone = poisson.conjugate_gradients(lambda x: matrix @ x, lambda x: x, both[:, :1])
    assert torch.equal(poisson.conjugate_gradients(lambda x: matrix @ x, lambda x: x, both)[:, :1], alone)
    found = poisson.conjugate_gradients(lambda x: matrix @ x, lambda x: x, both, sizes)
    assert (found[:, 0] == 0).all()
    close(found[:, 1], both[:, 1] / matrix.diagonal())


def test_a_solve_that_does_not_converge_says_so():
    matrix = torch.diag(torch.linspace(1, 2, 9).double())
    with pytest.warns(RuntimeWarning, match="no solution within 2 iterations"):
        poisson.conjugate_gradients(lambda x: matrix @ x, lambda x: x, draw(9, 1), limit=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        poisson.conjugate_gradients(lambda x: matrix @ x, lambda x: x, draw(9, 1))


@pytest.mark.parametrize("valid", [torch.zeros(6, 7, dtype=torch.bool), torch.eye(7, dtype=torch.bool)[:6]])
def test_no_cells_or_only_cells_of_their_own(valid):
    """A basin of one cell has no divergence, whatever flows in it."""
    grid, velocity = Grid(valid, 1.0, 1.0, "wall", "wall"), draw(2, 2, 6, 7)
    expected = torch.where(valid, velocity, 0.0)
    assert torch.equal(leray(velocity, grid), expected)
    assert torch.equal(project(velocity, grid, pixels(0.5, 2, 1, 6, 7)), expected)
    assert torch.equal(sum(helmholtz(velocity, grid)), expected)
