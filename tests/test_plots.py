"""What the pictures show, read back from the pixels and from the artists."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.quiver import Quiver, QuiverKey
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.plots import Coordinates, coast, figure_inpainting, sample_grid, when
from vecfield_diffusion.evaluation.plots.filled import _observed_panels, _truth_panel
from vecfield_diffusion.evaluation.plots.maps import draw_arrows, draw_field, explain_blanks, lay_out, round_speed
from vecfield_diffusion.evaluation.plots.style import (
    NARROW,
    WIDE,
    Look,
    colour_bar,
    look_of,
    new_figure,
    pretty,
    scalar,
    with_power,
)
from vecfield_diffusion.physics.grid import Grid

pytestmark = pytest.mark.usefixtures("rendered")

GEOGRAPHIC = ("longitude", "latitude")


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


def look(field: np.ndarray, grid: Grid, colour: str = "speed", coordinates: Coordinates | None = None) -> Look:
    return look_of(field, grid, colour=colour, coordinates=coordinates, arrows=10)


def shades(path: Path) -> np.ndarray:
    """The picture as bytes `(height, width, 3)`."""
    return np.round(imread(path)[..., :3] * 255).astype(int)


def test_scalars_are_speed_and_vorticity() -> None:
    grid = domain(12, 16, dy=-2.0, land=True)
    field, sea = vortex(grid), grid.valid.numpy()
    np.testing.assert_allclose(scalar(field, grid, "vorticity")[sea], 1.0)
    np.testing.assert_allclose(scalar(field, grid, "speed")[sea], np.sqrt(np.square(field[:, sea]).sum(0)))
    assert np.isnan(scalar(field, grid, "vorticity")[~sea]).all()


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
    quiver = draw_arrows(axis, np.where(np.arange(20) % 2 == 0, field, np.nan), shown)
    assert shown.step == 2 and len(quiver.U) == 100
    column, row = quiver.get_offsets().T.astype(int)
    assert set(column) == set(range(0, 20, 2))
    u, v = field[:, row, column]
    inside = np.hypot(u, v) <= shown.longest
    assert inside.sum() == 99  # the corner of the vortex is beyond the 99.5 % quantile
    np.testing.assert_allclose(np.stack((quiver.U, quiver.V))[:, inside], field[:, row, column][:, inside], rtol=1e-12)
    np.testing.assert_allclose(np.hypot(quiver.U, quiver.V)[~inside], shown.longest)


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
    """Square panels stand in one row of six, wide ones in two rows of three; land is the southern half."""
    grid = domain(20, width, land=True)
    field = vortex(grid)
    figure_inpainting(tmp_path / "f.png", field, np.zeros(grid.shape, dtype=bool), ensemble(field), grid, title="case")
    picture = shades(tmp_path / "f.png")
    assert picture.shape[1] == 1200
    grey = (np.abs(picture - 0.70 * 255) <= 1).all(-1)
    blank = (np.abs(picture - 0.96 * 255) <= 1).all(-1)
    starts = np.diff((grey.sum(0) > 10).astype(int)) == 1
    assert starts.sum() == (6 if width == 20 else 3)
    assert blank.sum() == pytest.approx(grey.sum() / 6, rel=0.1)


def test_lengths_are_true_on_the_ground() -> None:
    """Cells of 2 x 1 metres drawn in degrees: a cell is twice as wide as tall on paper."""
    grid = Grid(torch.ones(10, 10, dtype=torch.bool), 2.0, 1.0)
    shown = look(vortex(grid), grid, coordinates=Coordinates(np.arange(10) * 0.5, np.arange(10) * 0.1))
    axis = Figure().subplots()
    draw_field(axis, "", vortex(grid), grid.valid.numpy(), shown)
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
    assert pretty("m s-1") == "m s$^{-1}$"
    assert pretty("U") == "U"
    assert with_power(-5, "s-1") == "$10^{-5}$ s$^{-1}$"


def test_no_figure_is_left_open(tmp_path: Path) -> None:
    grid = domain()
    before = plt.get_fignums(), dict(matplotlib.rcParams)
    figure_inpainting(tmp_path / "f.png", vortex(grid), grid.valid.numpy(), ensemble(vortex(grid)), grid)
    assert (plt.get_fignums(), dict(matplotlib.rcParams)) == before


# What a picture says beside the fields.


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, in place of files."""
    figures: list[Figure] = []
    monkeypatch.setattr("vecfield_diffusion.evaluation.plots.filled.save", lambda figure, path: figures.append(figure))
    return figures


def words(figure: Figure) -> list[str]:
    """All that is written in a figure."""
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def test_a_picture_has_its_date_its_title_and_a_key_for_the_arrows(drawn: list[Figure]) -> None:
    grid = domain()
    field = vortex(grid)
    seen = np.eye(20, dtype=bool)
    figure_inpainting(
        "x", field, seen, ensemble(field), grid, title="block", date=when(np.datetime64("2002-07-02"), {})
    )
    (figure,) = drawn
    assert figure.get_suptitle() == "block, 2002-07-02"
    (key,) = figure.findobj(QuiverKey)
    rms = np.sqrt(np.square(np.hypot(*field)).mean())
    assert key.U == round_speed(rms) == 5.0 and key.label == "5 m s$^{-1}$"
    assert key.Q.scale == pytest.approx(look_of(field, grid).arrow * 20 / 0.9, rel=1e-3)


@pytest.mark.parametrize(("speed", "near"), [(0.34, 0.5), (0.3, 0.2), (1.0, 1.0), (77.0, 100.0), (3.3e-4, 5e-4)])
def test_the_key_has_a_round_speed(speed: float, near: float) -> None:
    assert round_speed(speed) == pytest.approx(near)


def test_the_error_is_drawn_where_the_truth_is_known(drawn: list[Figure]) -> None:
    """Members of the truth plus (3, 4): an error of 5 in every cell, on the scale of the spread, which is 0."""
    grid = domain(land=True)
    field = vortex(grid)
    members = np.stack([field + np.array([3.0, 4.0])[:, None, None]] * 3)
    figure_inpainting("x", field, np.zeros(grid.shape), members, grid)
    figure_inpainting("x", None, np.zeros(grid.shape), members, grid)
    maps = [{axis.get_title(): axis for axis in figure.axes} for figure in drawn]
    assert list(maps[0])[:6] == ["truth", "observed (0 %)", "ensemble mean", "member 1", "spread", "error"]
    assert "error" not in maps[1] and "spread" in maps[1]
    shown = np.asarray(maps[0]["error"].images[1].get_array().filled(np.nan))
    np.testing.assert_allclose(shown[10:], 5.0, rtol=1e-12)
    assert np.isnan(shown[:10]).all()
    assert maps[0]["error"].images[1].norm.vmax == pytest.approx(5.0)


def test_a_field_with_gaps_is_not_called_the_truth() -> None:
    grid = domain(land=True)
    field, valid = vortex(grid), grid.valid.numpy()
    assert _truth_panel(field, valid)[0][0] == "truth"
    field[:, 15, 3] = np.nan
    name, _, shown = _truth_panel(field, valid)[0]
    assert name == "as measured" and shown.sum() == valid.sum() - 1


def test_readings_of_a_radar_stand_along_its_lines_of_sight() -> None:
    grid = domain()
    valid = grid.valid.numpy()
    radial = np.where(np.arange(20) < 5, 0.5, np.nan) * np.array([0.6, 0.8])[:, None, None]
    radial = np.broadcast_to(radial, (2, 20, 20))
    panels = _observed_panels({"radar 1": radial, "radar 2": -radial}, None, vortex(grid), ~valid, valid)
    assert [name for name, _, _ in panels] == ["radar 1 (25 %)", "radar 2 (25 %)"]
    np.testing.assert_array_equal(panels[0][1], radial)
    assert panels[1][2].sum() == 100


def test_a_cell_where_one_component_is_known_is_drawn() -> None:
    grid = domain()
    measured = np.full((2, 20, 20), np.nan)
    measured[0, 3, :] = 2.0
    cells = np.zeros(grid.shape, dtype=bool)
    ((name, field, shown),) = _observed_panels(None, measured, vortex(grid), cells, grid.valid.numpy())
    assert name == "observed (5 %)" and shown.sum() == 20
    np.testing.assert_array_equal(field[:, 3, 0], [2.0, 0.0])


def test_one_outlying_value_does_not_hide_the_rest() -> None:
    """A value a thousand times the others, among fifty: the scale of the rest, and an arrow no longer than its end."""
    grid = domain()
    field = np.full((2, 20, 20), np.nan)
    field[:, :5, ::2] = vortex(grid)[:, :5, ::2]
    calm = look(field, grid)
    field[:, 2, 2] = 1000.0
    wild = look(field, grid)
    assert wild.norm.vmax < 3.1 * calm.norm.vmax and wild.arrow < 1.5 * calm.arrow
    quiver = draw_arrows(Figure().subplots(), field, wild)
    assert np.hypot(quiver.U, quiver.V).max() == pytest.approx(wild.longest)


def test_land_stands_apart_from_what_was_never_measured(drawn: list[Figure]) -> None:
    grid, land = domain(land=True), np.zeros((20, 20), dtype=bool)
    land[:5] = True
    field = vortex(grid)
    figure_inpainting("x", field, grid.valid, ensemble(field), grid, land=land)
    figure_inpainting("x", field, grid.valid, ensemble(field), grid)
    places = Coordinates(np.arange(20.0), np.arange(20.0), "longitude", "latitude")
    figure_inpainting("x", field, np.zeros(grid.shape), ensemble(field), grid, coordinates=places)
    told, unknown, geographic = (words(figure) for figure in drawn)
    assert {"land", "never measured"} <= set(told) and "not observed" not in told
    assert "outside the domain" in unknown and "land" not in unknown
    assert {"land, or never measured", "not observed"} <= set(geographic)
    outside = drawn[0].axes[0].images[0]
    colours = outside.cmap(outside.norm(outside.get_array()))[..., :3]
    assert colours[0, 0] == pytest.approx([0.70] * 3, abs=0.01) and colours[7, 0] != pytest.approx([0.70] * 3, abs=0.05)


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("known", [True, False])
def test_two_rows_have_no_empty_place_where_members_can_fill_it(m: int, known: bool, drawn: list[Figure]) -> None:
    grid = domain(10, 40)
    field = vortex(grid)
    figure_inpainting("x", field if known else None, grid.valid, ensemble(field, m), grid)
    maps = [axis for axis in drawn[0].axes if axis.images]
    assert len(maps) % 2 == 0 or m == 1
    assert len(maps) == {(1, True): 4, (1, False): 2, (2, True): 6, (5, True): 6}.get((m, known), 4)


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("x", [np.linspace(-123.4567, -117.1234, 30), np.linspace(351.25, 368.75, 30) - 360, "metres"])
def test_labels_do_not_collide(x: np.ndarray | str, width: float) -> None:
    grid = domain(20, 30)
    y = np.linspace(31.123, 35.456, 20)
    places = Coordinates(x, y, "longitude", "latitude")
    if isinstance(x, str):
        places = Coordinates(4_000_000 + 1e4 * np.arange(30), 1e7 + 1e4 * np.arange(20), "x [m]", "y [m]")
    shown = look(vortex(grid), grid, coordinates=places)
    figure, axes, _ = lay_out(4, shown, bars=2, columns=4 if width == WIDE else 2, width=width)
    for axis in axes:
        draw_field(axis, "speed", vortex(grid), grid.valid.numpy(), shown)
    figure.draw_without_rendering()
    boxes = [box for axis in axes for side in (axis.xaxis, axis.yaxis) for box in label_boxes(side)]
    assert len(boxes) >= 6
    assert not [(a, b) for k, a in enumerate(boxes) for b in boxes[:k] if a.overlaps(b)]
    assert not [axis for axis in axes if axis.xaxis.get_offset_text().get_text()]


def label_boxes(side: Axis) -> list[Bbox]:
    """Where the labels of the ticks stand that lie inside the axes: others are not drawn."""
    low, high = sorted(side.get_view_interval())
    ticks = [tick for tick in side.get_major_ticks() if low <= tick.get_loc() <= high]
    return [tick.label1.get_window_extent() for tick in ticks if tick.label1.get_visible()]


def test_degrees_have_their_side() -> None:
    grid = domain(20, 20)
    shown = look(vortex(grid), grid, coordinates=Coordinates(np.arange(350.0, 370), np.arange(-10.0, 10), *GEOGRAPHIC))
    figure, (axis,), _ = lay_out(1, shown, bars=1, columns=1, width=WIDE)
    draw_field(axis, "", vortex(grid), grid.valid.numpy(), shown)
    assert {"5°W", "0°", "5°E", "5°S", "5°N"} <= set(words(figure))


def test_unit_and_power_of_ten_stand_in_one_place() -> None:
    figure = new_figure(6, 1)
    axis = figure.subplots()
    colour_bar(figure, axis, Normalize(-4e-5, 4e-5), "viridis", ("vorticity", "s-1"))
    found = words(figure)
    assert "vorticity [$10^{-5}$ s$^{-1}$]" in found and "4" in found
    assert axis.xaxis.get_offset_text().get_text() == ""


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_ending_chooses_the_format(ending: str, start: bytes, tmp_path: Path) -> None:
    grid = domain()
    figure_inpainting(tmp_path / f"f.{ending}", None, grid.valid, ensemble(vortex(grid)), grid)
    assert (tmp_path / f"f.{ending}").read_bytes().startswith(start)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    grid = domain()
    with pytest.raises(UserError, match="written as .png, .pdf, .svg, not as '.docx'"):
        figure_inpainting(tmp_path / "f.docx", None, grid.valid, ensemble(vortex(grid)), grid)
    assert list(tmp_path.iterdir()) == []


def test_coastlines_enter_whatever_the_turn_of_the_longitudes(monkeypatch: pytest.MonkeyPatch) -> None:
    line = np.array([[-5.0, 0.0], [-1.0, 2.0]])
    monkeypatch.setattr(coast, "_all", lambda: [line])
    (found,) = coast.coastlines((350.0, 370.0, -5.0, 5.0))
    np.testing.assert_array_equal(found, line + [360.0, 0.0])
    (found,) = coast.coastlines((-10.0, 10.0, 5.0, -5.0))  # rows from the north
    np.testing.assert_array_equal(found, line)
    assert coast.coastlines((10.0, 20.0, -5.0, 5.0)) == [] and coast.coastlines((-10.0, 10.0, 3.0, 5.0)) == []
    grid = domain()
    shown = look(vortex(grid), grid, coordinates=Coordinates(np.arange(-10.0, 10), np.arange(-10.0, 10), *GEOGRAPHIC))
    axis = Figure().subplots()
    draw_field(axis, "", vortex(grid), grid.valid.numpy(), shown)
    assert [type(part) for part in axis.collections] == [LineCollection, Quiver]
    assert axis.get_xlim() == (-10.5, 9.5)


def test_nothing_is_explained_that_is_not_there() -> None:
    figure = new_figure(3, 3)
    explain_blanks(figure, look(vortex(domain()), domain()), hidden=False)
    assert figure.legends == []


@pytest.mark.parametrize(
    ("time", "attrs", "text"),
    [
        (np.datetime64("2002-07-02T00:00:00"), {}, "2002-07-02"),
        (np.datetime64("2022-02-21T12:30:00.000000001", "ns"), {}, "2022-02-21 12:30"),
        (3.5, {"units": "s"}, "time 3.5 s"),
        (7, {}, "time 7"),
    ],
)
def test_times_in_words(time: object, attrs: dict[str, str], text: str) -> None:
    assert when(time, attrs) == text
