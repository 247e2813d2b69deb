"""What the pictures show, read back from the pixels and from the artists."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from vecfield_diffusion.evaluation import plots
from vecfield_diffusion.evaluation.plots import Coordinates, figure_inpainting, sample_grid
from vecfield_diffusion.physics.grid import Grid


def vortex(grid: Grid, spin: float = 0.5) -> np.ndarray:
    """Solid-body rotation `(2, H, W)`, vorticity 2 spin, NaN on land."""
    height, width = grid.shape
    x = (np.arange(width) - width / 2) * grid.dx[0].item()
    y = (np.arange(height) - height / 2) * grid.dy[0].item()
    field = np.stack(np.broadcast_arrays(-spin * y[:, None], spin * x))
    return np.where(grid.valid.numpy(), field, np.nan)


def domain(height: int = 20, width: int = 20, dy: float = 1.0, land: bool = False) -> Grid:
    valid = torch.ones(height, width, dtype=torch.bool)
    if land:
        valid[: height // 2] = False
    return Grid(valid, 1.0, dy)


def ensemble(field: np.ndarray, m: int = 5) -> np.ndarray:
    return field + 0.3 * np.random.default_rng(0).standard_normal((m, *field.shape))


def look(field: np.ndarray, grid: Grid, colour: str = "speed", coordinates: Coordinates | None = None) -> plots._Look:
    return plots._look(field, grid, colour, coordinates, 10)


def shades(path: Path) -> np.ndarray:
    """The picture as bytes `(height, width, 3)`."""
    return np.round(imread(path)[..., :3] * 255).astype(int)


def test_scalars_are_speed_and_vorticity() -> None:
    grid = domain(12, 16, dy=-2.0, land=True)
    field, sea = vortex(grid), grid.valid.numpy()
    np.testing.assert_allclose(plots._scalar(field, grid, "vorticity")[sea], 1.0)
    np.testing.assert_allclose(plots._scalar(field, grid, "speed")[sea], np.sqrt(np.square(field[:, sea]).sum(0)))
    assert np.isnan(plots._scalar(field, grid, "vorticity")[~sea]).all()


def test_scale_is_that_of_the_truth() -> None:
    grid = domain()
    field = vortex(grid)
    speed = look(field, grid)
    assert speed.norm.vmin == 0 and speed.norm.vmax == pytest.approx(np.quantile(np.hypot(*field), 0.995))
    assert look(0 * field, grid).norm.vmax == 1
    turning = look(field, grid, "vorticity").norm
    assert (turning.vmin, turning.vmax) == (pytest.approx(-1), pytest.approx(1))


def test_arrows_stand_on_known_cells_one_a_block() -> None:
    """20 x 20 cells in blocks of 2 x 2; cells of even columns are known: 100 arrows, at columns 0, 2, .. 18."""
    grid = domain()
    field = vortex(grid)
    shown = look(field, grid)
    axis = Figure().subplots()
    plots._arrows(axis, np.where(np.arange(20) % 2 == 0, field, np.nan), shown)
    (quiver,) = axis.collections
    assert shown.step == 2 and len(quiver.U) == 100
    column, row = quiver.get_offsets().T.astype(int)
    assert set(column) == set(range(0, 20, 2))
    np.testing.assert_array_equal(np.stack((quiver.U, quiver.V)), field[:, row, column])


@pytest.mark.parametrize("coordinates", [True, False])
def test_north_is_up_whatever_the_order_of_rows(coordinates: bool, tmp_path: Path) -> None:
    grid, x, y = domain(land=True), np.arange(20.0), np.arange(30.0, 50.0)
    field, seen = vortex(grid), np.random.default_rng(1).random(grid.shape) < 0.5
    members = ensemble(field)
    places = (Coordinates(x, y), Coordinates(x, y[::-1])) if coordinates else (None, None)
    figure_inpainting(tmp_path / "up.png", field, seen, members, grid, coordinates=places[0])
    down = Grid(grid.valid.flip(0), 1.0, -1.0)
    turned = field[:, ::-1], seen[::-1], members[..., ::-1, :]
    figure_inpainting(tmp_path / "down.png", *turned, down, coordinates=places[1])
    difference = np.abs(shades(tmp_path / "up.png") - shades(tmp_path / "down.png")).max(-1)
    assert (difference > 8).mean() < 1e-3


@pytest.mark.parametrize("width", [20, 40])
def test_land_is_grey_in_every_panel_and_hidden_cells_blank(width: int, tmp_path: Path) -> None:
    """Square panels stand in one row of five, wide ones in two rows of three; land is the southern half."""
    grid = domain(20, width, land=True)
    field = vortex(grid)
    figure_inpainting(tmp_path / "f.png", field, np.zeros(grid.shape, dtype=bool), ensemble(field), grid, title="case")
    picture = shades(tmp_path / "f.png")
    assert picture.shape[1] == 1200
    grey = (np.abs(picture - 0.70 * 255) <= 1).all(-1)
    blank = (np.abs(picture - 0.96 * 255) <= 1).all(-1)
    starts = np.diff((grey.sum(0) > 10).astype(int)) == 1
    assert starts.sum() == (5 if width == 20 else 3)
    panels = 5 if width == 20 else 6
    assert blank.sum() == pytest.approx(grey.sum() / panels, rel=0.1)


def test_lengths_are_true_on_the_ground() -> None:
    """Cells of 2 x 1 metres drawn in degrees: a cell is twice as wide as tall on paper."""
    grid = Grid(torch.ones(10, 10, dtype=torch.bool), 2.0, 1.0)
    shown = look(vortex(grid), grid, coordinates=Coordinates(np.arange(10) * 0.5, np.arange(10) * 0.1))
    axis = Figure().subplots()
    plots._draw(axis, vortex(grid), grid.valid.numpy(), shown)
    assert axis.get_aspect() == pytest.approx((0.5 / 2) / (0.1 / 1))
    assert axis.get_xlim() == pytest.approx((-0.25, 4.75)) and axis.get_ylim() == pytest.approx((-0.05, 0.95))


def test_without_truth_with_one_member_and_with_gaps(tmp_path: Path) -> None:
    grid = domain(20, 40, land=True)
    field = vortex(grid)
    seen = np.random.default_rng(1).random(grid.shape) < 0.3
    measured = np.where(seen, field, np.nan)
    for colour in ("speed", "vorticity"):
        figure_inpainting(tmp_path / "a.png", None, seen, ensemble(field), grid, colour=colour, measured=measured)
        figure_inpainting(tmp_path / "b.png", measured, seen, ensemble(field, 1), grid, colour=colour)
        assert shades(tmp_path / "a.png").std() > 10 and shades(tmp_path / "b.png").std() > 10
    nothing = torch.full((2, 20, 40), torch.nan)
    figure_inpainting(tmp_path / "c.png", nothing, torch.zeros(1, 20, 40, dtype=torch.bool), ensemble(field), grid)
    figure_inpainting(tmp_path / "d.png", None, np.zeros(grid.shape, dtype=bool), ensemble(field), grid)
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "d.png").read_bytes()


def test_sample_grid_has_a_row_per_case(tmp_path: Path) -> None:
    grid = domain()
    fields = np.stack([vortex(grid)] * 3)
    seen = np.zeros((3, 1, 20, 20), dtype=bool)
    members = torch.from_numpy(ensemble(fields, 2))
    sample_grid(tmp_path / "s.png", torch.from_numpy(fields), torch.from_numpy(seen), members, grid, "m s-1")
    blank = (np.abs(shades(tmp_path / "s.png") - 0.96 * 255) <= 1).all(-1)
    assert (np.diff((blank.sum(1) > 50).astype(int)) == 1).sum() == 3
    assert (np.diff((blank.sum(0) > 50).astype(int)) == 1).sum() == 1


def test_units() -> None:
    assert plots._pretty("m s-1") == "m s$^{-1}$"
    assert plots._pretty("U") == "U"


def test_no_figure_is_left_open(tmp_path: Path) -> None:
    grid = domain()
    before = plt.get_fignums(), dict(matplotlib.rcParams)
    figure_inpainting(tmp_path / "f.png", vortex(grid), grid.valid.numpy(), ensemble(vortex(grid)), grid)
    assert (plt.get_fignums(), dict(matplotlib.rcParams)) == before
