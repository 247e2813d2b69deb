"""The harmonic fill against a sparse direct solve of the equations written out cell by cell, and its own principles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import spsolve

from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.harmonic import harmonic_fill

TORUS, CHANNEL, BOX = (True, True), (False, True), (False, False)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixels(fraction, *shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < fraction


def full(*shape):
    return torch.ones(shape, dtype=torch.bool)


def faces(height, width, periodic, dx, dy):
    """Every face between two cells as (cell, cell, length / distance)."""
    for i in range(height):
        for j in range(width):
            if j + 1 < width or periodic[1]:
                yield (i, j), (i, (j + 1) % width), abs(dy[i] / dx[i])
            if i + 1 < height or periodic[0]:
                n = (i + 1) % height
                yield (i, j), (n, j), (abs(dx[i]) + abs(dx[n])) / (abs(dy[i]) + abs(dy[n]))


def reference(values, known, valid, periodic, dx=None, dy=None):
    """One sample, solved by SuperLU over the unknown cells of the regions that hold a known cell."""
    height, width = valid.shape
    dx, dy = (np.ones(height) if d is None else d for d in (dx, dy))
    graph = np.zeros((height * width, height * width))
    for a, b, w in faces(height, width, periodic, dx, dy):
        if valid[a] and valid[b] and a != b:
            k, n = np.ravel_multi_index(a, valid.shape), np.ravel_multi_index(b, valid.shape)
            graph[k, n] += w
            graph[n, k] += w
    region = connected_components(graph)[1]
    held = (known & valid).ravel()
    solved = np.isin(region, region[held]) & valid.ravel() & ~held
    matrix = sparse.csc_matrix(np.diag(graph.sum(1)) - graph)
    found = np.zeros((height * width, len(values)))
    found[held] = values.reshape(len(values), -1).T[held]
    if solved.any():
        found[solved] = spsolve(matrix[solved][:, solved], -matrix[solved][:, held] @ found[held]).reshape(
            -1, len(values)
        )
    return found.T.reshape(values.shape)


def agrees(values, known, valid, periodic, dx=1.0, dy=1.0, atol=1e-8):
    found = harmonic_fill(values, known, valid, periodic, dx, dy)
    rows = [torch.as_tensor(d, dtype=torch.float64).expand(values.shape[2]).numpy() for d in (dx, dy)]
    for b in range(len(values)):
        exact = reference(values[b].numpy(), known[b, 0].numpy(), valid[b, 0].numpy(), periodic, *rows)
        np.testing.assert_allclose(found[b].numpy(), exact, atol=atol)


def basins():
    """Two basins, a lake behind a ring of land, a one-cell strait, an island."""
    valid = full(1, 1, 24, 30)
    valid[..., :, 12] = False
    valid[..., 7, 12] = True
    valid[..., 14:20, 18:24] = False
    valid[..., 16:18, 20:22] = True
    valid[..., 4:8, 3:6] = False
    valid[..., 23, :] = False
    return valid


def block():
    known = full(1, 1, 32, 32)
    known[..., 6:28, 5:30] = False
    return known


def track():
    known = ~full(1, 1, 24, 30)
    known[..., torch.arange(24), torch.arange(24)] = True
    known[..., torch.arange(24), (40 - 2 * torch.arange(24)) % 30] = True
    return known


def corner_block():
    known = ~full(1, 1, 32, 32)
    known[..., 2:5, 28:32] = True
    return known


@pytest.mark.parametrize("periodic", [TORUS, CHANNEL, (True, False), BOX])
@pytest.mark.parametrize(
    ("known", "valid"),
    [
        (pixels(0.005, 2, 1, 32, 32, seed=3), full(2, 1, 32, 32)),
        (pixels(0.1, 2, 1, 32, 32), pixels(0.75, 2, 1, 32, 32, seed=2)),
        (pixels(0.02, 2, 1, 24, 30), basins().repeat(2, 1, 1, 1)),
        (track(), basins()),
        (block(), full(1, 1, 32, 32)),
        (corner_block(), full(1, 1, 32, 32)),
        (~full(1, 1, 24, 30), basins()),
        (full(1, 1, 24, 30), basins()),
    ],
    ids=["sparse", "islands", "basins", "track", "all but a block", "a block", "nothing", "everything"],
)
def test_solves_the_discrete_equations(known, valid, periodic):
    agrees(draw(len(known), 2, *known.shape[2:]), known, valid, periodic)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3, 40), (7, 13), (33, 17), (65, 6), (16, 64)])
@pytest.mark.parametrize("periodic", [TORUS, CHANNEL, (True, False), BOX])
def test_any_shape(shape, periodic):
    agrees(draw(3, 2, *shape), pixels(0.15, 3, 1, *shape), pixels(0.85, 3, 1, *shape, seed=2), periodic)


@pytest.mark.parametrize("periodic", [TORUS, BOX])
def test_spacing_of_a_sphere(periodic):
    lat = torch.linspace(70.0, -60.0, 21, dtype=torch.float64)
    grid = Grid.from_degrees(torch.arange(0.0, 34.0, 2.0), lat, full(21, 17), boundary_x="open")
    agrees(draw(1, 2, 21, 17), pixels(0.1, 1, 1, 21, 17), pixels(0.9, 1, 1, 21, 17, seed=2), periodic, grid.dx, grid.dy)


def test_only_ratios_of_the_spacing_matter():
    values, known, valid = draw(1, 1, 16, 16), pixels(0.1, 1, 1, 16, 16), full(1, 1, 16, 16)
    found = harmonic_fill(values, known, valid, TORUS, dx=3e4, dy=-3e4)
    torch.testing.assert_close(found, harmonic_fill(values, known, valid, TORUS))


def test_linear_fields_between_the_rims_of_a_box():
    i, j = torch.meshgrid(torch.arange(20).double(), torch.arange(33).double(), indexing="ij")
    field = torch.stack((0.3 * i - 0.7 * j + 2, i + j))[None]
    known = full(1, 1, 20, 33)
    known[..., 1:-1, 1:-1] = False
    torch.testing.assert_close(harmonic_fill(field, known, full(1, 1, 20, 33), BOX), field, atol=1e-9, rtol=0)


def test_linear_profile_round_a_ring_that_needs_padding():
    # Between cells 0 and 4 of a ring of 13: slope 1 over four faces, and -4 / 9 over the nine that close it.
    values = torch.zeros(1, 1, 1, 13, dtype=torch.float64)
    values[..., 4] = 4.0
    known = ~full(1, 1, 1, 13)
    known[..., [0, 4]] = True
    cells = torch.arange(13.0, dtype=torch.float64)
    exact = torch.where(cells <= 4, cells, 4 * (13 - cells) / 9)
    found = harmonic_fill(values, known, full(1, 1, 1, 13), CHANNEL)[0, 0, 0]
    torch.testing.assert_close(found, exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maximum_principle(fraction, dtype):
    values, known = draw(4, 2, 64, 48).to(dtype), pixels(fraction, 4, 1, 64, 48)
    found = harmonic_fill(values, known, full(4, 1, 64, 48), CHANNEL)
    low = torch.where(known, values, torch.inf).amin((2, 3), keepdim=True)
    high = torch.where(known, values, -torch.inf).amax((2, 3), keepdim=True)
    inside = (found >= low - 1e-6) & (found <= high + 1e-6)
    assert bool((inside | ~known.any(-1, keepdim=True).any(-2, keepdim=True)).all())
    assert found.dtype == dtype


def test_one_known_cell_spreads_over_its_region_only():
    values, valid = draw(1, 2, 24, 30), basins()
    known = ~full(1, 1, 24, 30)
    known[..., 16, 20] = True  # in the lake
    found = harmonic_fill(values, known, valid, BOX)
    lake = ~full(1, 1, 24, 30)
    lake[..., 16:18, 20:22] = True
    torch.testing.assert_close(found, torch.where(lake, values[..., 16:17, 20:21], 0.0), atol=1e-9, rtol=0)
    assert bool((found[~lake.expand_as(found)] == 0).all())


def test_one_known_cell_of_a_large_torus():
    values = torch.zeros(1, 1, 128, 128)
    values[..., 5, 77] = 3.0
    found = harmonic_fill(values, values != 0, full(1, 1, 128, 128), TORUS)
    torch.testing.assert_close(found, torch.full_like(values, 3.0), atol=1e-6, rtol=0)


def test_nothing_known_is_exactly_zero_at_every_size():
    for size in (1, 2, 3, 5, 8, 31, 64, 128):
        for periodic in (TORUS, BOX):
            mask = full(1, 1, size, size)
            assert bool((harmonic_fill(draw(1, 1, size, size), ~mask, mask, periodic) == 0).all())


def test_nan_outside_the_known_cells_changes_nothing():
    known, valid = pixels(0.1, 2, 1, 24, 30), basins().repeat(2, 1, 1, 1)
    values = draw(2, 2, 24, 30)
    spoilt = torch.where(known & valid, values, torch.nan)
    assert torch.equal(harmonic_fill(spoilt, known, valid, TORUS), harmonic_fill(values, known, valid, TORUS))


def test_known_values_are_kept_to_the_bit_and_land_is_zero():
    values, known, valid = draw(2, 2, 24, 30).float(), pixels(0.4, 2, 1, 24, 30), basins()
    found = harmonic_fill(values, known, valid, TORUS)
    kept = (known & valid).expand_as(values)
    assert torch.equal(found[kept], values[kept])
    assert bool((found[~valid.expand_as(found)] == 0).all())


def test_samples_do_not_depend_on_their_batch():
    # 40 samples of 32 x 32 are solved in several parts on a CPU.
    values, known, valid = draw(40, 2, 32, 32), pixels(0.05, 40, 1, 32, 32), pixels(0.8, 40, 1, 32, 32, seed=2)
    together = harmonic_fill(values, known, valid, CHANNEL)
    alone = torch.cat([harmonic_fill(values[b, None], known[b, None], valid[b, None], CHANNEL) for b in range(40)])
    torch.testing.assert_close(together, alone, atol=1e-11, rtol=0)


def test_single_precision_is_the_rounded_double():
    values, known, valid = draw(2, 2, 32, 32).float(), pixels(0.05, 2, 1, 32, 32), full(2, 1, 32, 32)
    found = harmonic_fill(values, known, valid, TORUS)
    assert torch.equal(found, harmonic_fill(values.double(), known, valid, TORUS).float())


@pytest.mark.parametrize(
    ("name", "known", "valid"),
    [
        ("known", torch.ones(2, 1, 8, 8), full(2, 1, 8, 8)),
        ("known", full(2, 2, 8, 8), full(2, 1, 8, 8)),
        ("valid", full(2, 1, 8, 8), full(8, 8)),
        ("valid", full(2, 1, 8, 8), full(2, 1, 8, 9)),
    ],
)
def test_masks_are_checked(name, known, valid):
    with pytest.raises(ValueError, match=f"^{name} must be boolean"):
        harmonic_fill(draw(2, 2, 8, 8), known, valid, BOX)
