"""Cases of sequences: frame by frame those of snapshots, and the same in whatever sequence a frame is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vecfield_diffusion.data.context import Context
from vecfield_diffusion.data.draws import seeded
from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.masks import Full, Mask, Pixels
from vecfield_diffusion.data.sequences import Runs, Sequences, frame_numbers
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.inference.cases import Cases, make_cases, with_context
from vecfield_diffusion.physics.grid import Grid

H, W = 5, 6
#: A time is missing, and a second run follows.
TIME = np.array([0, 1, 2, 3, 5, 6, 7, 8, 30.5, 31.5, 32.5, 33.5, 34.5], dtype=float)
N = len(TIME)
GENERATOR = np.random.default_rng(0)
VELOCITY = GENERATOR.standard_normal((N, 2, H, W)).astype(np.float32)
VELOCITY[2] = np.nan
VELOCITY[5, 0, 1, 1] = np.nan
DEPTH = GENERATOR.standard_normal((N, 1, H, W)).astype(np.float32)


class Passing(Mask):
    """A column that passes over the domain, one on with every frame, from where the generator says."""

    way = "moving"

    def sequence(self, n: int, frames: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        first = torch.randint(W, (n, 1), generator=generator)
        column = (first + torch.arange(frames)) % W
        return (torch.arange(W) == column[..., None, None, None]).expand(-1, -1, 1, H, -1) & valid.view(-1, 1, H, W)

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        return self.sequence(n, 1, valid, generator)[:, 0, 0]


def fields(**changes: object) -> Fields:
    valid = torch.ones(H, W, dtype=torch.bool)
    valid[0, :2] = False
    given = {"time": TIME, "variables": {"depth": lambda i: DEPTH[i]}} | changes
    return Fields(MemoryReader(VELOCITY), N, Grid(valid), np.arange(W), np.arange(H), "here", ("u", "v"), **given)


NAMES = ("truth", "observed", "single", "y")


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(9e9), other.nan_to_num(9e9))


def test_frames_of_sequences_are_the_cases_of_their_snapshots() -> None:
    data = fields()
    sequences = Sequences.of(data, frames=3, stride=1).indices
    given = {"seed": 3, "sigma_obs": 0.2, "add_error": True, "hide": 0.3}
    cases = make_cases(data, sequences, Pixels(0.5), **given)
    assert cases.numbers == sequences.tolist() and cases.sigma_obs.shape == (len(sequences), 1, 1, 1, 1)
    shapes = {name: getattr(cases, name).shape[2:] for name in NAMES}
    assert shapes == {"truth": (2, H, W), "observed": (1, H, W), "single": (2, H, W), "y": (2, H, W)}
    alone = {number: make_cases(data, [number], Pixels(0.5), **given) for number in range(N)}
    seen = 0
    for row, numbers in enumerate(sequences.tolist()):
        for frame, number in enumerate(numbers):
            for name in NAMES:
                part = getattr(cases, name)[row, frame]
                if number >= 0:
                    assert same(part, getattr(alone[number], name)[0])
                else:
                    assert part.isnan().all() if part.is_floating_point() else not part.any()
            seen += number < 0
    assert seen == 2 and cases.single.any() and not cases.observed[sequences == 2].any()
    assert torch.equal(cases.hidden, cases.truth.isfinite().all(dim=2, keepdim=True) & ~cases.observed)


def test_a_mask_that_moves_goes_on_along_the_run() -> None:
    """A frame is seen alike in all sequences that hold it, and the mask goes on over a missing frame."""
    data = fields()
    cases = make_cases(data, Sequences.of(data, frames=4).indices, Passing(), seed=2)
    runs = Runs.of(data)
    first = [int(torch.randint(W, (1, 1), generator=seeded(2, run, 3))) for run in (0, 1)]
    assert first[0] != first[1]
    checked = set()
    for row, numbers in enumerate(cases.numbers):
        for frame, number in enumerate(numbers):
            if number < 0:
                assert not cases.observed[row, frame].any()
                continue
            column = (first[runs.run[number]] + runs.frame[number]) % W
            expected = torch.zeros(H, W, dtype=torch.bool)
            expected[:, column] = True
            expected &= cases.truth[row, frame].isfinite().all(dim=0)
            assert torch.equal(cases.observed[row, frame, 0], expected)
            checked.add(number)
    assert checked == set(range(N))
    some = make_cases(data, np.array([[8, 9, 10], [1, 2, 3]]), Passing(), seed=2, hide=0.5)
    whole = make_cases(data, np.array([[0, 1, 2, 3, -1, 4, 5, 6, 7]]), Passing(), seed=2, hide=0.5)
    assert torch.equal(some.observed[1], whole.observed[0, 1:4])
    assert (
        0 < some.observed.sum() < make_cases(data, np.array([[8, 9, 10], [1, 2, 3]]), Passing(), seed=2).observed.sum()
    )


def test_masks_of_sequences_by_themselves_see_what_each_frame_offers() -> None:
    """Time 2 measured nothing: neither it nor a frame that is missing offers a cell, and the others go on."""
    mask = Pixels(0.5, time="fixed")
    cases = make_cases(fields(), np.array([[2, -1], [2, 3]]), mask, seed=0, along=False)
    assert cases.observed.flatten(2).any(dim=2).tolist() == [[False, False], [False, True]]


def test_a_share_of_what_a_run_shows_is_hidden() -> None:
    """Cells whose error is not known show nothing that could be hidden."""
    sigma = torch.zeros(1, 2, 1, H, W)
    sigma[..., 3:] = torch.nan
    shown = [
        make_cases(fields(), np.array([[0, 1]]), Full(time="fixed"), seed=0, sigma_obs=sigma, hide=hide).observed
        for hide in (0.0, 0.5)
    ]
    counts = [part.flatten(2).sum(dim=2).tolist() for part in shown]
    assert counts == [[[13, 13]], [[7, 7]]]  # of 5 x 3 cells two are land; round(6.5) are hidden


def test_every_snapshot_has_an_error_of_its_own() -> None:
    cases = make_cases(fields(), [0, 1], Full(), seed=0, sigma_obs=0.5, add_error=True)
    first, second = (part[part.isfinite()] for part in cases.y - cases.truth)
    assert not torch.equal(first, second) and first.std() > 0.3 and second.std() > 0.3


def test_frames_that_are_given_are_known_without_error() -> None:
    """Where they are finite; single components of theirs are no longer alone, and later frames stay as they are."""
    cases = make_cases(fields(), np.array([[5, 6, 7]]), Full(), seed=0, sigma_obs=0.5)
    assert cases.single[0, 0].any()
    sampled = torch.full((1, 1, 2, H, W), 7.0)
    sampled[..., 4, 4] = torch.nan
    given = cases.given(sampled)
    known = sampled.isfinite().all(dim=2, keepdim=True)
    assert torch.equal(given.observed[:, :1], known | cases.observed[:, :1])
    assert not given.single.any() and (given.y[:, :1][known.expand_as(sampled)] == 7).all()
    assert (given.sigma_obs[:, :1][known] == 0).all() and (given.sigma_obs[:, :1][~known] == 0.5).all()
    assert given.sigma_obs[:, 1:].unique().tolist() == [0.5]
    assert same(given.y[:, 1:], cases.y[:, 1:]) and torch.equal(given.observed[:, 1:], cases.observed[:, 1:])


def test_a_run_is_drawn_once_whatever_is_looked_at_of_it() -> None:
    """By one mask; another seed, and another mask, draw their own."""
    drawn, seeds = [], []

    class Counted(Passing):
        def sequence(self, n: int, frames: int, valid: Tensor, generator: torch.Generator) -> Tensor:
            drawn.append(frames)
            seeds.append(generator.initial_seed())
            return super().sequence(n, frames, valid, generator)

    data, mask = fields(), Counted()
    parts = [make_cases(data, np.array([[n, n + 1]]), mask, seed=1) for n in (0, 1, 2, 8, 9, 3)]
    assert drawn == [9, 5] and seeds == [seeded(1, run, 3).initial_seed() for run in (0, 1)]
    for part in parts:
        assert torch.equal(part.observed, make_cases(data, np.array(part.numbers), Passing(), seed=1).observed)
    make_cases(data, np.array([[0, 1]]), mask, seed=2)
    make_cases(data, np.array([[0, 1]]), Counted(), seed=1)
    assert drawn == [9, 5, 9, 9]


def test_a_mask_may_begin_with_each_sequence() -> None:
    data = fields()
    sequences = np.array([[0, 1], [4, 5], [8, 9]])
    own = make_cases(data, sequences, Passing(), seed=1, along=False)
    for row, first in enumerate((0, 4, 8)):
        column = int(torch.randint(W, (1, 1), generator=seeded(1, first, 4)))
        for frame in range(2):
            assert set(own.observed[row, frame, 0].nonzero()[:, 1].tolist()) == {(column + frame) % W}
    again = make_cases(data, sequences[1:], Passing(), seed=1, along=False)
    assert torch.equal(again.observed, own.observed[1:])


def test_snapshots_know_no_run() -> None:
    """A mask that moves is, for a snapshot by itself, the mask that it draws for one."""
    cases = make_cases(fields(), [4, 0], Passing(), seed=1)
    column = int(torch.randint(W, (1, 1), generator=seeded(1, 4, 0)))
    assert cases.observed[0, 0, 3].nonzero().tolist() == [[column]]
    assert cases.frames is None and cases.noise_numbers == cases.numbers == [4, 0]


def test_each_frame_has_a_number_of_its_own() -> None:
    data = fields(stride=2)
    line = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13]  # the frame at time 4 is counted, those between runs are not
    whole = Runs.of(data).snapshots(0)
    assert whole.tolist() == [0, 1, 2, 3, -1, 4, 5, 6, 7]
    assert frame_numbers(data, whole[None]).tolist() == [list(range(9))]
    sequences = np.array([[2, -1, 5], [1, 3, 4], [9, 10, 11], [7, -1, -1], [-1, 4, 5]])
    numbers = frame_numbers(data, sequences)
    assert numbers.tolist() == [[2, 4, 6], [1, 3, 5], [10, 11, 12], [8, 10, 12], [4, 5, 6]]
    assert (numbers == np.array(line)[sequences])[sequences >= 0].all()
    cases = make_cases(data, sequences[:2], Full(), seed=0)
    assert cases.noise_numbers == cases.frames == [[2, 4, 6], [1, 3, 5]]
    part = cases[[1]]
    assert part.frames == [[1, 3, 5]] and part.numbers == [[1, 3, 4]] and same(part.y, cases.y[1:])


def test_what_a_denoiser_is_conditioned_on_has_frames() -> None:
    data = fields(frames=2, context=["depth"])
    normalizer = Normalizer(torch.full((2, H, W), 0.1), 2.0)
    context = Context.measure(data, range(N))
    sequences = Sequences.of(data).indices
    cases = with_context(make_cases(data, sequences, Full(), seed=0), data, context, normalizer, seed=0)
    given = cases.observation(normalizer, torch.device("cpu"))
    n = len(sequences)
    assert given.y.shape == (n, 2, 2, H, W) and given.valid.shape == given.observed.shape == (n, 2, 1, H, W)
    assert given.sigma_y.shape == (n, 1, 1, 1, 1) and given.context.shape == (n, 2, 2, H, W)
    alone = make_cases(data, sequences[0], Full(), seed=0)
    alone = with_context(alone, data, context, normalizer, seed=0).observation(normalizer, torch.device("cpu"))
    for name in ("y", "observed", "valid", "context"):
        assert torch.equal(getattr(given, name)[0], getattr(alone, name))
    lacking = torch.from_numpy(sequences < 0)
    assert lacking.any() and not given.observed[lacking].any() and given.valid[lacking].all(dim=0)[0, 1:].all()


@pytest.mark.parametrize("shape", [(3, 2, 1, H, W), (3, 2, 2, H, W)])
def test_errors_of_every_cell_of_every_frame(shape: tuple[int, ...]) -> None:
    sigma = torch.full(shape, 0.5)
    sigma[1, 1, :, 3, 3] = torch.nan
    given = {"seed": 0, "sigma_obs": sigma, "add_error": True}
    cases: Cases = make_cases(fields(), np.array([[0, 1], [3, 4], [8, 9]]), Full(), **given)
    assert not cases.observed[1, 1, 0, 3, 3] and cases.observed[1, 0, 0, 3, 3]
    error = ((cases.y - cases.truth) / 0.5)[cases.observed.expand_as(cases.y)]
    assert 0.85 < error.std() < 1.15
