"""Frames at equal steps, runs and sequences, against what a loop over frames finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.data.sequences import BEFORE, Runs, Sequences, frame_numbers, read_sequences
from vecfield_diffusion.data.splits import TimeBlocks
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import Grid

H, W = 3, 4
AGULHAS = Path(__file__).parents[2] / "shared/data/globcurrent_agulhas/globcurrent_agulhas_2002.nc"
DAY = np.timedelta64(1, "D")


def fields(time: np.ndarray | None, n: int | None = None, **changes: object) -> Fields:
    n = len(time) if n is None else n
    values = np.random.default_rng(0).standard_normal((n, 2, H, W)).astype(np.float32)
    grid = Grid(torch.ones(H, W, dtype=torch.bool))
    return Fields(
        MemoryReader(values), n, grid, np.arange(W), np.arange(H), "here", ("u", "v"), time=time, **changes
    )  # fmt: skip


def listed(time: list[float], runs: list[int], frames: int, stride: int, inside: range) -> list[list[int]]:
    """What `Sequences` is to find of whole times, by looking up every time."""
    found = []
    for first in inside:
        wanted = [time[first] + stride * k for k in range(frames)]
        at = {time[i]: i for i in inside if runs[i] == runs[first]}
        if wanted[-1] <= max(at):
            row = [at.get(moment, -1) for moment in wanted]
            found += [row] if 2 * sum(i >= 0 for i in row) >= frames else []
    return found


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_sequences_are_those_that_a_search_finds(frames: int, stride: int) -> None:
    """Missing times, two runs of a file, and the block of a split that begins in the one and ends in the other."""
    time = [0, 1, 2, 4, 5, 6, 7, 9, 12, 13, 14, 15] + [0, 1, 2, 3, 4, 6, 7, 8]
    runs = [0] * 12 + [1] * 8
    data = fields(np.array(time, dtype=float), runs=np.array(runs), frames=frames, stride=stride)
    for inside in (range(20), range(2, 17), range(2, 12)):
        wanted = listed(time, runs, frames, stride, inside)
        assert Sequences.of(data, inside).indices.tolist() == wanted
        assert len(wanted) > 0


def test_more_than_half_of_the_frames_missing_is_no_sequence() -> None:
    data = fields(np.array([0.0, 1.0, 2.0, 5.0, 9.0, 10.0]))
    found = Sequences.of(data, frames=4).indices.tolist()
    assert found == [[0, 1, 2, -1], [1, 2, -1, -1], [2, -1, -1, 3]]  # not [3, -1, -1, -1], and none begins with -1


def test_times_within_the_tolerance_are_frames_and_others_begin_a_run() -> None:
    """Steps of 1.09 and 0.91 are one step, of 1.11 none; 2.05 are two; a time that comes again begins a run."""
    steps = np.array([1, 1.09, 0.91, 2.05, 1, 1.11, 1, 1, 0, 1, -3, 1])
    runs = Runs.of(fields(np.concatenate(([0.0], np.cumsum(steps))), time_attrs={"units": "hours since 2020-01-01"}))
    assert runs.run.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert runs.frame.tolist() == [0, 1, 2, 3, 5, 6, 0, 1, 2, 0, 1, 0, 1]
    assert runs.lengths.tolist() == [7, 3, 2, 2]
    assert (runs.step, runs.unit) == (1.0, "hours")
    assert runs.words == (
        "13 times, 1 hours apart, 1 missing between them (tolerance 0.1 hours); cut into 4 runs where they jump"
    )
    assert runs.line(4).tolist() == [0, 1, 2, 3, 5, 6, 10, 11, 12, 16, 17, 21, 22]


def test_dates_have_a_step_in_hours_and_months_are_equal_steps() -> None:
    months = np.arange("2019-01", "2022-01", dtype="datetime64[M]").astype("datetime64[D]")
    runs = Runs.of(fields(np.delete(months, [5, 6])))
    assert runs.run.max() == 0 and runs.frame.tolist() == np.delete(np.arange(36), [5, 6]).tolist()
    assert runs.unit == "h" and runs.words.startswith("34 times, 744 h apart, 2 missing")


def test_without_times_frames_are_snapshots_and_runs_those_of_the_file() -> None:
    data = fields(None, 7, runs=np.repeat([0, 1], [3, 4]))
    assert Sequences.of(data, frames=3).indices.tolist() == [[0, 1, 2], [3, 4, 5], [4, 5, 6]]
    assert "taken as equally far apart" in Runs.of(data).words
    assert Sequences.of(fields(None, 1), frames=1).indices.tolist() == [[0]]


def test_the_step_is_that_within_runs() -> None:
    """Many short runs: most intervals are jumps, and count for nothing."""
    time = (np.arange(2) + 50 * np.arange(9)[:, None]).ravel().astype(float)
    runs = Runs.of(fields(time, runs=np.repeat(np.arange(9), 2)))
    assert runs.step == 1.0 and runs.lengths.tolist() == [2] * 9


def test_no_sequence_leaves_its_split() -> None:
    data = fields(np.datetime64("2020-01-01") + np.arange(60) * DAY, frames=4, stride=2)
    for block in TimeBlocks(0.6, 0.2, 0.2, guard=1).split(data).values():
        found = Sequences.of(data, block).indices
        assert found.min() == block.start and found.max() == block.stop - 1 and len(found) == len(block) - 6
    pieces = [*range(10), *range(12, 20)]  # snapshots left out are another's, not missing
    assert Sequences.of(data, pieces, frames=3, stride=1).indices.tolist() == [
        [i, i + 1, i + 2] for i in [*range(8), *range(12, 18)]
    ]


@pytest.mark.parametrize(
    ("time", "frames", "stride", "match"),
    [
        (
            np.arange(6.0),
            7,
            1,
            r"no sequence of 7 frames lies within the 6 snapshots 0 to 5: it takes .* 7 times, and the longest has 6\.",
        ),
        (
            np.arange(6.0),
            3,
            3,
            r"3 frames 3 steps apart lies .* run of 7 times, .* has 6.* fewer dataset.frames, a smaller dataset.stride",
        ),
        (np.array([0.0, 1.0, 2.0, 9.5, 10.5]), 4, 1, "the longest has 3"),
        (np.array([0.0, 1.0, 2.0, 12.0]), 12, 1, "more than half of the frames of each are missing"),
    ],
)
def test_sequences_that_there_are_none_of(time: np.ndarray, frames: int, stride: int, match: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{match}"):
        Sequences.of(fields(time), frames=frames, stride=stride)


def test_what_is_read_is_snapshots_side_by_side() -> None:
    data, counted = fields(np.array([0.0, 1.0, 2.0, 4.0, 5.0, 6.0])), []
    values = data.reader.array
    values[1, 0, 2, 3] = np.nan  # one component alone
    data = replace(data, reader=lambda indices: counted.append(indices.tolist()) or values[indices])
    found = Sequences.of(data, frames=4, stride=1).indices
    assert found.tolist() == [[0, 1, 2, -1], [1, 2, -1, 3], [2, -1, 3, 4]]
    read = read_sequences(data, found)
    assert counted == [[0, 1, 2, 3, 4]] and read.dtype == torch.float32 and read.shape == (3, 4, 2, H, W)
    for row, sequence in zip(read, found, strict=True):
        for frame, number in zip(row, sequence, strict=True):
            expected = data.read([max(number, 0)])[0] if number >= 0 else torch.full((2, H, W), torch.nan)
            torch.testing.assert_close(frame, expected, rtol=0, atol=0, equal_nan=True)
    assert read_sequences(data, found, partial=True)[0, 1, 1, 2, 3] == values[1, 1, 2, 3]
    assert read_sequences(data, np.full((1, 2), -1)).isnan().all()


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"stride": -1}, {"frames": 2.0}])
def test_numbers_of_frames_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be a whole number of at least 1"):
        fields(np.arange(3.0), **wrong)


def test_history_does_not_go_with_frames() -> None:
    with pytest.raises(UserError, match=r"^dataset.history=\[1\] with dataset.frames=3: .* Leave dataset.history out"):
        fields(np.arange(3.0), frames=3, history=[1])


@pytest.mark.skipif(not AGULHAS.exists(), reason="real data are not here")
def test_a_year_of_currents() -> None:
    data = open_fields(AGULHAS, frames=5, stride=2)
    assert (data.frames, data.stride) == (5, 2)
    runs, found = Runs.of(data), Sequences.of(data)
    assert runs.words.startswith(f"{len(data)} times, 24 h apart") and runs.lengths[0] >= len(data)
    assert len(found) == len(data) - 8 and (np.diff(found.indices, axis=1) == 2).all()
    torch.testing.assert_close(
        read_sequences(data, found.indices[:2]),
        torch.stack([data.read(range(first, first + 10, 2)) for first in (0, 1)]),
        equal_nan=True,
    )


def test_frames_before_the_first_have_numbers_of_their_own() -> None:
    """Which are those of the same frame in whatever sequence, and never those of another one."""
    data = fields(np.arange(6.0))
    numbers = frame_numbers(data, np.array([[-1, -1, 0, 1], [-1, 0, 1, 2], [2, 3, 4, 5]]))
    assert numbers.min() >= 0 and numbers[:, 2:].tolist() == [[0, 1], [1, 2], [4, 5]]
    assert numbers[0, 1] == numbers[1, 0] != numbers[0, 0] and numbers[:2, 0].min() > BEFORE
