"""Masks through time: what is fixed stays, what moves goes on, what is drawn anew owes nothing to the frame before."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import label
from scipy.stats import multivariate_normal, norm
from torch import Tensor

from vecfield_diffusion.config.build import build
from vecfield_diffusion.config.program import option
from vecfield_diffusion.data.gaps import OtherTimes
from vecfield_diffusion.data.masks import (
    Ahead,
    Block,
    Border,
    Clouds,
    Drawn,
    Empty,
    Full,
    Mask,
    MaskFile,
    Missing,
    Mixture,
    Pixels,
    Swath,
    Track,
)
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.calibration import describe_process, find_factor

EVERYWHERE = torch.ones(24, 30, dtype=torch.bool)
#: Every option of `mask=` that draws.
NAMES = ["pixels", "block", "track", "swath", "clouds", "border", "missing", "gaps", "none", "mixture"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coast() -> Tensor:
    """A domain with land in one corner."""
    y, x = torch.meshgrid(torch.arange(24), torch.arange(30), indexing="ij")
    return x + y > 12


def shipped(name: str, **keys: object) -> Mask:
    return build(option("mask", name) | keys, "mask", trusted=True)


def choices() -> list[tuple[str, str]]:
    """Every option of `mask=` with every way through time that it knows."""
    return [(name, way) for name in NAMES for way in ("auto", *shipped(name).ways)]


def going(name: str, way: str) -> Mask:
    mask = shipped(name)
    return mask if way == "auto" else mask.through(way)


@pytest.mark.parametrize(("name", "way"), choices())
def test_a_longer_sequence_begins_with_the_shorter_one_and_observes_valid_cells(name: str, way: str) -> None:
    mask, valid = going(name, way), coast()
    if name == "mixture":  # what lies ahead is counted from the end
        mask.frames, mask.shares = {"missing": mask.frames["missing"]}, {"missing": 0.5}
    long = mask.sequence(6, 14, valid, seeded())
    assert long.shape == (6, 14, 1, 24, 30) and long.dtype == torch.bool
    assert torch.equal(mask.sequence(6, 7, valid, seeded()), long[:, :7])
    assert not (long & ~valid).any()
    if not mask.may_be_empty:
        assert long.flatten(2).any(2).all()
    torch.manual_seed(3)
    assert torch.equal(mask.sequence(6, 14, valid, seeded()), long)


@pytest.mark.parametrize(("name", "way"), choices())
def test_what_a_frame_may_observe_can_differ_from_frame_to_frame(name: str, way: str) -> None:
    valid = coast().repeat(5, 1, 1)
    valid[1] = False  # a snapshot that measured nothing
    valid[2, :, :20] = False
    observed = going(name, way).sequence(6, 5, valid, seeded())
    assert not (observed & ~valid[:, None]).any() and not observed[:, 1].any()
    with pytest.raises(UserError, match="no cell of the field is valid"):
        going(name, way).sequence(2, 3, torch.zeros(24, 30, dtype=torch.bool), seeded())


@pytest.mark.parametrize("mask", [shipped(name) for name in NAMES[:6]], ids=NAMES[:6])
def test_fixed_masks_are_those_of_a_snapshot_in_every_frame(mask: Mask) -> None:
    fixed = mask.through("fixed").sequence(5, 6, coast(), seeded())
    assert torch.equal(fixed, mask(5, coast(), seeded()).unsqueeze(1).expand(5, 6, 1, 24, 30))


@pytest.mark.parametrize("mask", [shipped(name) for name in NAMES[:6]], ids=NAMES[:6])
def test_masks_drawn_anew_are_independent_snapshots(mask: Mask) -> None:
    generator = seeded()
    anew = mask.through("anew").sequence(3, 4, coast(), seeded())
    assert torch.equal(anew, torch.stack([mask(3, coast(), generator) for _ in range(4)], dim=1))
    if not isinstance(mask, Border):
        assert not torch.equal(anew[:, 0], anew[:, 1])


def test_pixels_of_two_frames_agree_as_often_as_chance_has_it() -> None:
    """Independent in each frame, cells are observed in both of two frames with the square of their share."""
    assert Pixels(0.3).way == "anew"
    observed = Pixels(0.3).sequence(40, 6, EVERYWHERE, seeded()).double()
    both = (observed[:, 1:] * observed[:, :-1]).mean().item()
    assert observed.mean().item() == pytest.approx(0.3, abs=0.005) and both == pytest.approx(0.09, abs=0.004)


def connected(cells: Tensor) -> bool:
    """Whether cells `(H, W)` hang together, over corners too."""
    return label(cells.numpy(), structure=np.ones((3, 3)))[1] == 1


@pytest.mark.parametrize("speed", [None, 4.0, 0.3])
def test_a_vehicle_goes_on_where_it_was(speed: float | None) -> None:
    observed = Track(0.02, speed=speed).sequence(10, 12, EVERYWHERE, seeded())[:, :, 0]
    for frames in observed:
        assert all(connected(frame) for frame in frames) and connected(frames.any(0))
        assert (frames[1:] & frames[:-1]).flatten(1).any(1).all()  # the end of a frame is the start of the next
    if speed is None:
        assert (observed.flatten(2).sum(2) == round(0.02 * 24 * 30)).all()
    else:
        assert observed.flatten(2).sum(2).max() <= speed + 2
    assert observed.any(1).flatten(1).sum(1).min() >= (100 if speed is None else 3)


def test_a_straight_vehicle_covers_its_speed_in_each_frame() -> None:
    """Without turns a track is a line: frame t ends t + 1 speeds from where it began, whatever the frames."""
    track, domain = Track(speed=7.5, turn=0.0), torch.ones(400, 400, dtype=torch.bool)
    ends = []
    for frames in range(1, 7):
        cells = track.sequence(1, frames, domain, seeded(1))[0].any(0)[0].nonzero().double()
        ends.append((cells.max(0).values - cells.min(0).values).norm().item())
    # Whole steps of one cell, from and to the middles of cells.
    assert ends == pytest.approx([math.floor(7.5 * frames) for frames in range(1, 7)], abs=1.0)


def test_several_vehicles_go_each_its_way() -> None:
    observed = Track(0.1, legs=3, speed=3.0).sequence(8, 9, torch.ones(60, 60, dtype=torch.bool), seeded())[:, :, 0]
    paths = [label(frames.any(0).numpy(), structure=np.ones((3, 3)))[1] for frames in observed]
    assert max(paths) == 3 and observed[:, 0].flatten(1).sum(1).max() <= 3 * 5
    for frames in observed:
        assert label(frames[0].numpy(), structure=np.ones((3, 3)))[1] <= 3


def test_a_vehicle_crosses_land_without_measuring() -> None:
    domain = EVERYWHERE.clone()
    domain[:, 12:18] = False
    observed = Track(0.05).sequence(20, 8, domain, seeded())[:, :, 0]
    assert (observed[:, :, :, :12].flatten(1).any(1) & observed[:, :, :, 18:].flatten(1).any(1)).any()
    assert (observed.flatten(2).sum(2) == round(0.05 * 24 * 24)).all()


def test_swaths_are_shifted_by_the_same_step_and_come_in_again() -> None:
    """Upright bands over a domain of whole periods: each frame is the one before, rolled by the shift."""
    swath = Swath(width=4, count=2, slope=0, shift=3)
    observed = swath.sequence(9, 20, EVERYWHERE, seeded())[:, :, 0]
    for frame in range(1, 20):
        assert torch.equal(observed[:, frame], observed[:, 0].roll(3 * frame, dims=-1))
    beside = Swath(width=5, count=2, slope=0).sequence(9, 3, EVERYWHERE, seeded())[:, :, 0]
    assert beside.any(1).all() and (beside.double().sum(1) == 1).all()  # three swaths of a third, side by side
    level = Swath(width=4, count=2, slope=90, shift=-2).sequence(9, 5, EVERYWHERE, seeded())[:, :, 0]
    assert torch.equal(level[:, 4].any(-1), level[:, 0].any(-1).roll(8, dims=-1))
    assert not torch.equal(level[:, 4], level[:, 0])


def test_clouds_drift_and_do_nothing_else_where_they_do_not_change() -> None:
    """With whole cells a frame the field is rolled, so that what it hides is rolled."""
    clouds = Clouds(0.4, speed=3.0, change=0.0)
    clouds_there = clouds.sequence(6, 5, EVERYWHERE, Straight())[:, :, 0]
    for frame in range(5):
        assert torch.equal(clouds_there[:, frame], clouds_there[:, 0].roll(3 * frame, dims=-1))
    assert not torch.equal(clouds_there[:, 1], clouds_there[:, 0])


def test_clouds_change_by_the_share_that_is_asked() -> None:
    hidden = {}
    for change in (0.0, 0.1, 1.0):
        clouds = Clouds(0.4, speed=0.0, change=change)
        hidden[change] = (~clouds.sequence(40, 2, EVERYWHERE, seeded())[:, :, 0]).double()
        assert (hidden[change].flatten(2).sum(2) == round(0.4 * 24 * 30)).all()
    both = {change: (frames[:, 0] * frames[:, 1]).mean().item() for change, frames in hidden.items()}
    # Where all is new, the same is hidden twice with the square of the share; where little is, mostly the same.
    assert both[0.0] == 0.4 and both[1.0] == pytest.approx(0.16, abs=0.03) and 0.25 < both[0.1] < 0.38


def test_clouds_forget_as_a_process_of_first_order() -> None:
    """The correlation of fields a frame apart is the root of the share that stays: what both hide is of normal laws."""
    clouds, domain = Clouds(0.4, size=0.05, speed=0.0, change=0.5), torch.ones(120, 120, dtype=torch.bool)
    hidden = (~clouds.sequence(30, 3, domain, seeded())[:, :, 0]).double()
    for lag in (1, 2):
        law = multivariate_normal([0.0, 0.0], [[1.0, 0.5 ** (lag / 2)], [0.5 ** (lag / 2), 1.0]])
        both = (hidden[:, lag] * hidden[:, 0]).mean().item()
        assert both == pytest.approx(law.cdf([norm.ppf(0.4)] * 2), abs=0.006)


def test_frames_that_would_be_empty_have_a_cell_each_whatever_the_length() -> None:
    """The cell of a frame is drawn apart from what moves, so that a longer sequence begins alike."""
    under = Clouds(1.0)
    long = under.sequence(5, 8, coast(), seeded())
    assert (long.flatten(2).sum(2) == 1).all() and torch.equal(under.sequence(5, 3, coast(), seeded()), long[:, :3])


class Straight(torch.Generator):
    """A generator with which everything that moves heads along the columns."""


@pytest.fixture(autouse=True)
def straight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headings of 0 for `Straight`: drawn numbers are else as they are."""
    drawn = torch.rand

    def rand(*shape: int, generator: torch.Generator, **keys: object) -> Tensor:
        found = drawn(*shape, generator=generator, **keys)
        return torch.zeros_like(found) if isinstance(generator, Straight) and len(shape) == 1 else found

    monkeypatch.setattr(torch, "rand", rand)


def test_a_block_moves_in_a_line_and_turns_at_the_edges() -> None:
    block = Block(0.1, speed=2.0)
    hidden = ~block.sequence(10, 40, EVERYWHERE, Straight())[:, :, 0]
    for frames in hidden:
        rows = frames.any(2).long().argmax(1)
        assert (rows == rows[0]).all() and (frames.flatten(1).sum(1) == frames[0].sum()).all()
        columns = frames.any(1)
        first, width = columns.long().argmax(1), int(columns[0].sum())
        room = 30 - width
        way = (first[0] + 2 * torch.arange(40)) % (2 * room)
        assert torch.equal(first, torch.minimum(way, 2 * room - way))
    drifting = ~Block(0.1, speed=[0.5, 1.5]).sequence(50, 2, EVERYWHERE, seeded())[:, :, 0]
    corner = torch.stack([drifting.any(3).long().argmax(2), drifting.any(2).long().argmax(2)]).double()
    moved = (corner[:, :, 1] - corner[:, :, 0]).norm(dim=0)
    assert moved.max() <= 3 and 0.3 < moved.mean() < 2


def spells(missing: Tensor) -> list[int]:
    """The lengths of the spells within sequences `(n, T)` that neither begin nor end with them."""
    found = []
    for row in missing.tolist():
        text = "".join("x" if gone else "." for gone in row)
        found += [len(part) for part in text.split(".")[1:-1] if part]
    return found


def test_frames_are_missing_in_spells_of_their_length() -> None:
    observed = Missing(0.3, spell=5.0).sequence(40, 2000, EVERYWHERE[:2, :2], seeded())
    missing = ~observed.flatten(2).any(2)
    assert (observed.flatten(2).all(2) | missing).all()  # a frame is there or not
    assert missing.double().mean().item() == pytest.approx(0.3, abs=0.01)
    lengths = np.array(spells(missing))
    assert lengths.mean() == pytest.approx(5.0, rel=0.03)
    assert (lengths == 1).mean() == pytest.approx(0.2, abs=0.02)  # geometric: one in five ends at once
    alone = ~Missing(0.3, time="anew").sequence(40, 2000, EVERYWHERE[:2, :2], seeded()).flatten(2).any(2)
    assert np.mean(spells(alone)) == pytest.approx(1 / 0.7, rel=0.03)


@pytest.mark.parametrize(("fraction", "share"), [(0.0, 0.0), (1.0, 1.0), (0.9, 0.9)])
def test_as_many_frames_are_missing_as_are_asked(fraction: float, share: float) -> None:
    missing = ~Missing(fraction, spell=2.0).sequence(40, 1000, EVERYWHERE[:2, :2], seeded()).flatten(2).any(2)
    assert missing.double().mean().item() == pytest.approx(share, abs=0.01 if 0 < share < 1 else 0)
    one = ~Missing(fraction)(4000, EVERYWHERE[:2, :2], seeded()).flatten(1).any(1)
    assert one.double().mean().item() == pytest.approx(share, abs=0.02 if 0 < share < 1 else 0)


def test_frames_that_are_not_missing_have_a_mask_of_their_own() -> None:
    border = Border(2)
    observed = Missing(0.5, mask=border).sequence(20, 10, EVERYWHERE, seeded())
    there = observed.flatten(2).any(2)
    assert torch.equal(observed[there], border(1, EVERYWHERE, seeded()).expand_as(observed[there]))
    assert 0.3 < there.double().mean() < 0.7


def test_the_last_frames_are_unknown() -> None:
    observed = Ahead(horizon=3).sequence(4, 10, EVERYWHERE, seeded())
    assert observed[:, :7].all() and not observed[:, 7:].any()
    known = Ahead([1, 20]).sequence(400, 5, coast(), seeded()).flatten(2).any(2).sum(1)
    assert known.unique().tolist() == [1, 2, 3, 4]
    under = Ahead(2, mask=Border(2)).sequence(2, 5, EVERYWHERE, seeded())
    assert torch.equal(under[:, 2], Border(2)(2, EVERYWHERE, seeded())) and not under[:, 3:].any()
    with pytest.raises(UserError, match="mask.horizon=5 leaves nothing known of 5 frames"):
        Ahead(5).sequence(1, 5, EVERYWHERE, seeded())
    with pytest.raises(UserError, match="a snapshot by itself"):
        Ahead(1)(1, EVERYWHERE, seeded())


def test_a_mixture_goes_all_ways_and_lacks_frames() -> None:
    """Upright bands tell the way: the same in all frames, shifted by one column, or anything."""
    parts = {"swath": Swath(width=4, count=1, slope=0, shift=1)}
    ways = {"anew": 1.0, "fixed": 1.0, "moving": 2.0}
    lacking = {"missing": Missing(1.0)}
    mixture = Mixture(parts, {"swath": 1.0}, ways, lacking, {"missing": 0.5})
    observed = mixture.sequence(800, 4, EVERYWHERE, seeded())[:, :, 0]
    there = observed.flatten(1).any(1)
    assert there.double().mean().item() == pytest.approx(0.5, abs=0.05)
    kept = observed[there]
    fixed = (kept[:, 1:] == kept[:, :1]).flatten(1).all(1)
    moved = torch.stack([kept[:, t] == kept[:, 0].roll(t, dims=-1) for t in range(1, 4)]).flatten(2).all(2).all(0)
    assert fixed.double().mean().item() == pytest.approx(0.25, abs=0.06)
    assert moved.double().mean().item() == pytest.approx(0.5, abs=0.06) and not (fixed & moved).any()
    every = Mixture(parts, {"swath": 1.0}, ways, time="fixed").sequence(20, 4, EVERYWHERE, seeded())
    assert (every == every[:, :1]).all() and every.flatten(2).any(2).all()
    own = Mixture(parts, {"swath": 1.0}).sequence(20, 4, EVERYWHERE, seeded())[:, :, 0]
    assert torch.equal(own[:, 3], own[:, 0].roll(3, dims=-1))


def test_a_mixture_of_functions_and_of_masks_that_do_not_move() -> None:
    def corner(n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(n, 1, *valid.shape, generator=generator) < 0.5

    mixture = Mixture({"corner": corner, "pixels": Pixels(0.5)}, {"corner": 1, "pixels": 1}, {"moving": 1.0})
    observed = mixture.sequence(30, 3, EVERYWHERE, seeded())
    assert (observed[:, 0] == observed[:, 1]).double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(Drawn(corner)(3, EVERYWHERE, seeded()), corner(3, EVERYWHERE, seeded()))


def test_a_file_with_a_time_axis_has_a_mask_for_each_frame(tmp_path: Path) -> None:
    masks = torch.rand(6, 5, 8, generator=seeded()) < 0.5
    np.save(tmp_path / "series.npy", masks.numpy())
    np.savez(tmp_path / "both.npz", series=masks.numpy(), one=masks[4].numpy())
    domain = torch.ones(5, 8, dtype=torch.bool)
    series = MaskFile(str(tmp_path / "series.npy"))
    assert torch.equal(series.sequence(2, 4, domain, seeded())[:, :, 0], masks[:4].expand(2, 4, 5, 8))
    still = series.through("fixed").sequence(2, 9, domain, seeded())[:, :, 0]
    assert torch.equal(still, masks[:1].expand(2, 9, 5, 8))
    any_of = series.through("anew").sequence(4, 30, domain, seeded())[:, :, 0].flatten(0, 1)
    which = (any_of[:, None] == masks).flatten(2).all(2)
    assert (which.sum(1) == 1).all() and (which.sum(0) > 5).all()
    one = MaskFile(str(tmp_path / "both.npz"))
    assert torch.equal(one.sequence(2, 9, domain, seeded())[:, :, 0], masks[4].expand(2, 9, 5, 8))
    chosen = MaskFile(str(tmp_path / "both.npz"), "series").sequence(1, 6, domain, seeded())[0, :, 0]
    assert torch.equal(chosen, masks)
    with pytest.raises(UserError, match="has 6 times, fewer than the 7 frames"):
        series.sequence(1, 7, domain, seeded())
    with pytest.raises(UserError, match=r"has 6 times, and a snapshot.*mask\.time=fixed"):
        series(1, domain, seeded())


def test_gaps_of_other_times_follow_each_other_and_are_never_the_own() -> None:
    patterns = torch.rand(20, 5, 8, generator=seeded()) < 0.7
    mask = OtherTimes(patterns)
    own = patterns[7:12]
    observed = mask.sequence(300, 5, own, seeded())[:, :, 0]
    starts = set()
    for frames in observed:
        found = [s for s in range(20) if torch.equal(frames, patterns[(s + torch.arange(5)) % 20] & own)]
        assert len(found) == 1
        starts |= set(found)
    assert starts == set(range(20)) - {7}
    late = own.clone()
    late[0] = False  # the first frame measured nothing: the second decides
    assert not (mask.sequence(300, 5, late, seeded())[:, 1, 0] == own[1]).flatten(1).all(1).any()
    whole = OtherTimes(torch.ones(3, 5, 8, dtype=torch.bool)).sequence(2, 5, own, seeded())[:, :, 0]
    assert torch.equal(whole, own.expand(2, 5, 5, 8))  # nothing hides anything


class Series:
    """A series of 1000 snapshots, the k-th of which lacks the cell k of 40."""

    shape = (5, 8)

    def read(self, indices: list[int]) -> Tensor:
        fields = torch.zeros(1, 2, 40)
        fields[0, :, indices[0] % 40] = torch.nan
        return fields.view(1, 2, 5, 8)


@pytest.mark.parametrize(("count", "frames", "kept"), [(1000, 1, 250), (88, 1, 88), (88, 9, 88), (1000, 8, 256)])
def test_patterns_are_kept_in_stretches_of_consecutive_times(count: int, frames: int, kept: int) -> None:
    patterns = OtherTimes.of(Series(), range(count), frames=frames).patterns
    lacks = (~patterns).flatten(1).long().argmax(1)
    assert len(patterns) == pytest.approx(kept, abs=frames)
    inside = torch.arange(len(patterns) - 1) % frames != frames - 1
    assert ((lacks[1:] - lacks[:-1]) % 40 == 1)[inside].all()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Pixels(time="moving"), "^time must be one of auto, anew, fixed, got moving"),
        (lambda: Border(time="sideways"), "^time must be"),
        (lambda: Missing(time="fixed"), "^time must be one of auto, anew, moving"),
        (lambda: Pixels().through("moving"), "^time must be one of anew, fixed"),
        (lambda: Missing(1.5), "^fraction must"),
        (lambda: Missing(spell=0.5), "^spell must"),
        (lambda: Ahead(0), "^horizon must"),
        (lambda: Block(speed=-1.0), "^speed must"),
        (lambda: Track(speed=[2, 1]), "^speed must"),
        (lambda: Clouds(change=2.0), "^change must"),
        (lambda: Swath(shift=math.inf), "^shift must"),
        (lambda: Mixture({"a": Full()}, {"a": 1.0}, {"never": 1.0}), "^ways: 'never' is not among anew, fixed"),
        (lambda: Mixture({"a": Full()}, {"a": 1.0}, {"anew": 0.0}), "^ways must be at least 0"),
        (lambda: Mixture({"a": Full()}, {"a": 1.0}, None, {"b": Missing()}, {}), "^shares: 'b'|^frames: 'b'"),
        (lambda: Mixture({"a": Full()}, {"a": 1.0}, None, {"b": Missing()}, {"b": 1.5}), "^shares.b must"),
    ],
)
def test_ways_and_numbers_out_of_range(build: type[Mask], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()


def test_emptiness_stays_empty_through_time() -> None:
    assert not Empty().sequence(3, 4, EVERYWHERE, seeded()).any()
    assert Full().sequence(3, 4, coast(), seeded()).sum() == 12 * coast().sum()


def test_a_factor_from_before_masks_had_a_time_is_found() -> None:
    config, how = {"sigma_obs": 0.0}, {"_target_": "Conditional"}
    now = describe_process(config, option("mask", "track"), how)
    before = {key: value for key, value in option("mask", "track").items() if key not in ("speed", "time")}
    known = [{"process": describe_process(config, before, how), "factor": 1.25}]
    assert find_factor(known, now, Path("best.pt")) == 1.25
    fixed = [{"process": describe_process(config, option("mask", "track") | {"time": "fixed"}, how), "factor": 1.5}]
    with pytest.raises(UserError, match="was calibrated for mask="):
        find_factor(fixed, now, Path("best.pt"))
