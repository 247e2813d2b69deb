"""A filled series as a moving picture: every time once, on one scale, with its date; what cannot be written is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.quiver import Quiver
from PIL import Image

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.plots import Moment, animation, check_moving, figure_animation
from vecfield_diffusion.evaluation.plots.animation import FRAMES, Picture, shown_of
from vecfield_diffusion.physics.grid import Grid

H, W = 12, 20
GRID = Grid(torch.ones(H, W, dtype=torch.bool), 1000.0, 1000.0)


def moment(number: int, members: int = 3) -> Moment:
    """Fields of speed `number` + 1 to the east, members that differ by 0.1, every second column observed."""
    ensemble = np.zeros((members, 2, H, W), dtype=np.float32)
    ensemble[:, 0] = number + 1 + 0.1 * np.arange(members)[:, None, None]
    measured = ensemble[0].copy()
    measured[..., ::2] = np.nan
    return Moment(f"day {number}", measured, ensemble)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[Picture]:
    """The pictures that are made."""
    made: list[Picture] = []

    class Kept(Picture):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(animation, "Picture", Kept)
    return made


@pytest.mark.parametrize("members", [1, 3])
def test_a_gif_has_every_time_once_and_each_as_long(tmp_path: Path, members: int) -> None:
    assert figure_animation(tmp_path / "a.gif", lambda k: moment(k, members), 5, GRID) == [0, 1, 2, 3, 4]
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 5 and film.info["loop"] == 0
        frames = []
        for number in range(5):
            film.seek(number)
            assert film.info["duration"] == animation.DURATION
            frames.append(np.asarray(film.convert("RGB")))
    assert all((first != second).any() for first, second in zip(frames[:-1], frames[1:], strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


def test_what_a_picture_shows_is_of_its_moment(tmp_path: Path, pictures: list[Picture]) -> None:
    """The speed of each map, the arrows, the share and the date follow the moment; the scale is that of all."""
    figure_animation(tmp_path / "a.gif", moment, 4, GRID)
    (picture,) = pictures
    # The mean of the last one is 4.1, the end of the scale for all of them.
    assert picture.look.norm.vmax == pytest.approx(4.1)
    for number in (2, 0):
        picture.drawn(moment(number))
        shown = {name: axis.images[-1].get_array() for name, axis in picture.axes.items()}
        np.testing.assert_allclose(shown["ensemble mean"], number + 1.1, rtol=1e-6)
        np.testing.assert_allclose(shown["member 1"], number + 1, rtol=1e-6)
        np.testing.assert_allclose(shown["spread"], 0.1, rtol=1e-5)
        known = np.ma.getmaskarray(np.ma.masked_invalid(shown["observed"]))
        assert known[:, ::2].all() and not known[:, 1::2].any()
        assert picture.axes["observed"].get_title() == "observed (50 %)"
        assert picture.figure.get_suptitle() == f"day {number}"
        for name in ("observed", "ensemble mean", "member 1"):
            arrows = [each for each in picture.axes[name].collections if isinstance(each, Quiver)]
            (visible,) = [each for each in arrows if each.get_visible()]
            np.testing.assert_allclose(visible.U, number + 1 + 0.1 * (name == "ensemble mean"), rtol=1e-6)


def test_no_more_times_are_drawn_than_can_be_watched() -> None:
    assert shown_of(FRAMES) == list(range(FRAMES))
    for count in (FRAMES + 1, 365, 8760):
        shown = shown_of(count)
        assert FRAMES / 2 <= len(shown) <= FRAMES and shown[0] == 0 and len(set(np.diff(shown))) == 1


def test_a_time_that_measured_nothing_is_drawn(tmp_path: Path) -> None:
    nothing = Moment("now", np.full((2, H, W), np.nan), moment(0).members)
    figure_animation(tmp_path / "a.gif", lambda k: nothing if k == 1 else moment(k), 3, GRID, colour="vorticity")
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3


def test_files_that_do_not_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="moving pictures are written as .gif or .mp4, not as '.avi'"):
        figure_animation(tmp_path / "a.avi", moment, 3, GRID)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_moving("a.gif")
    with pytest.raises(UserError, match="figure=a.mp4: mp4 is written by the program ffmpeg, which is not found"):
        check_moving("a.mp4")
    with pytest.raises(UserError, match="Give a .gif"):
        figure_animation(tmp_path / "a.mp4", moment, 3, GRID)
    assert list(tmp_path.iterdir()) == []


def stand_in(folder: Path, script: str) -> None:
    """A program called ffmpeg, whose last argument is the file that it is to write."""
    program = folder / "ffmpeg"
    program.write_text(f"#!/bin/sh\nfor last; do :; done\n{script}\n")
    program.chmod(0o755)


def test_a_film_is_given_to_ffmpeg_picture_by_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stand_in(tmp_path, 'echo "$@" > "$0.said"; cat > "$last"')
    figure_animation(tmp_path / "a.mp4", moment, 3, GRID)
    said = (tmp_path / "ffmpeg.said").read_text().split()
    width, height = map(int, said[said.index("-s") + 1].split("x"))
    assert width % 2 == height % 2 == 0 and "mp4" in said
    raw = np.fromfile(tmp_path / "a.mp4", dtype=np.uint8).reshape(3, height, width, 3)
    assert (raw[0] != raw[1]).any() and raw[0, 0, 0].tolist() == [255, 255, 255]
    stand_in(tmp_path, "echo no such codec >&2; exit 3")
    with pytest.raises(UserError, match="ffmpeg could not write the film: no such codec"):
        figure_animation(tmp_path / "b.mp4", moment, 3, GRID)
    assert not (tmp_path / "b.mp4").exists()
