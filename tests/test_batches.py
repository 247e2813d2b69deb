"""Batches of snapshots as they always were, to the bit, and batches of sequences, frame by frame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from vecfield_diffusion.data.augment import Augmentation, apply
from vecfield_diffusion.data.context import Context
from vecfield_diffusion.data.draws import draw, draw_sequence, seeded, windows
from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.masks import Full, Pixels
from vecfield_diffusion.data.stored import Snapshots
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.training.batches import Batch, Batches

H, W, STD = 6, 8, 2.0
#: Snapshot i is i everywhere plus a wave of its place, so that a value says where and when it comes from.
TIME = np.array([0, 1, 2, 3, 5, 6, 7, 8, 9, 10], dtype=float)
N = len(TIME)


def fields(land: bool = True, periodic: bool = False, **changes: object) -> Fields:
    place = np.arange(H * W).reshape(H, W) / 1000
    values = np.stack([np.stack([time + place, -time - place]) for time in TIME]).astype(np.float32)
    values[7, :, 4, 4] = np.nan
    valid = torch.ones(H, W, dtype=torch.bool)
    valid[0, :2] = not land
    side = "periodic" if periodic else "open"
    grid = Grid(valid, boundary_x=side, boundary_y=side)
    variables = {"depth": lambda i: np.broadcast_to(place, (len(i), 1, H, W)).astype(np.float32)}
    variables["wind"] = lambda i: 3 * values[i]
    given = {"time": TIME, "variables": variables} | changes
    return Fields(MemoryReader(values), N, grid, np.arange(W), np.arange(H), "here", ("u", "v"), **given)


def batches(data: Fields, **changes: object) -> Batches:
    given = dict(indices=range(N), diffusion=EDM(sigma_max=20.0), mask=Pixels([0.2, 0.6]), augmentation=None, size=12)
    given |= dict(normalizer=Normalizer(torch.zeros(2, H, W), STD), seed=0)
    return Batches(fields=data, **(given | changes))


def before(given: Batches, k: int) -> Batch:
    """Batch k of single snapshots, as it was made before there were sequences."""
    n, chosen, generator = given.size, given.chosen(k), seeded(given.seed, 0, k)
    x0, valid = given.normalizer.normalize(given.fields.read(chosen)), given.fields.grid.valid
    context = None if given.context is None else given.context_channels(chosen, generator)
    if given.window is not None:
        cut = windows(given.fields.grid, given.window, n, generator)
        x0, valid = cut(x0), cut(valid.expand(n, 1, -1, -1))
        context = None if context is None else cut(context)
    if given.augmentation is not None:
        parameters = given.augmentation.draw(n, generator)
        x0, valid = apply(x0, parameters), valid if valid.ndim == 2 else apply(valid, parameters)
    valid = valid if valid.ndim == 2 else valid[:, 0]
    measured = x0[:, :1].isfinite()
    x0 = torch.where(measured, x0, 0.0)
    observed = draw(given.mask, n, valid, generator) & measured
    sigma_y = given.sigma_obs * torch.rand(n, 1, 1, 1, generator=generator)
    y = x0 + sigma_y * torch.randn(x0.shape, generator=generator)
    silent = torch.rand(n, generator=generator) < given.dropout
    t = given.diffusion.sample_times(n, generator)
    observed = observed & ~silent[:, None, None, None]
    observation = Observation(y, observed, sigma_y, measured, context=context)
    return Batch(x0, measured, observation, t, torch.randn(x0.shape, generator=generator))


def parts(batch: Batch) -> dict[str, Tensor]:
    observation = {name: value for name, value in vars(batch.observation).items() if value is not None}
    return observation | {name: getattr(batch, name) for name in ("x0", "measured", "t", "noise")}


@pytest.mark.parametrize("window", [None, (3, 4)])
@pytest.mark.parametrize("plane", [False, True])
def test_snapshots_are_what_they_were_to_the_bit(window: tuple[int, int] | None, plane: bool) -> None:
    data = fields(land=not plane, periodic=plane, context=["depth", "wind"])
    changes = dict(window=window, context=Context.measure(data, range(N)))
    if plane:
        changes = dict(window=window, augmentation=Augmentation(["flip_x", "flip_y"]).resolve(data.grid, True))
    for k in (0, 3):
        made, expected = (parts(way) for way in (batches(data, **changes)(k), before(batches(data, **changes), k)))
        assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)


def test_what_a_source_gives_is_the_same_for_other_snapshots_and_noise() -> None:
    data = fields(land=False)
    given = batches(data, window=(3, 4), augmentation=Augmentation(["flip_x"]).resolve(data.grid, True))
    first, second, again = given(3, 1), given(7, 1), given(3, 1)
    both = first.measured & second.measured  # a cell of one snapshot is missing
    assert torch.equal(first.observation.observed & both, second.observation.observed & both)
    assert torch.equal(first.observation.error, second.observation.error)
    assert torch.equal(first.t, second.t)
    assert not torch.equal(first.t, given(3).t)
    for one, other, same in zip(
        *((b.x0, b.noise, b.observation.y - b.x0) for b in (first, second, again)), strict=True
    ):
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_a_batch_of_sequences_holds_frames_of_one_run_at_equal_steps() -> None:
    data = fields(frames=3, stride=2)
    given = batches(data, sigma_obs=0.3, dropout=0.3, size=40)
    batch, chosen = given(2), given.chosen(2)
    observation = batch.observation
    assert chosen.shape == (40, 3) and batch.x0.shape == batch.noise.shape == observation.y.shape == (40, 3, 2, H, W)
    assert observation.observed.shape == observation.valid.shape == batch.measured.shape == (40, 3, 1, H, W)
    assert observation.sigma_y.shape == (40, 1, 1, 1, 1) and batch.t.shape == (40,)
    # [2, -1, 5] and others: the frame at time 4 is missing
    assert set(map(tuple, chosen.tolist())) == set(map(tuple, given.samples.tolist())) and (chosen == -1).any()
    for row, numbers in enumerate(chosen.tolist()):
        for frame, number in enumerate(numbers):
            known = torch.zeros(H, W, dtype=torch.bool) if number < 0 else data.read([number])[0, 0].isfinite()
            assert torch.equal(batch.measured[row, frame, 0], known)
            expected = torch.where(known, data.read([max(number, 0)])[0].nan_to_num() / STD, 0.0)
            torch.testing.assert_close(batch.x0[row, frame], expected)
    assert (observation.observed <= batch.measured).all()
    assert torch.equal(observation.valid, batch.measured)
    silent = ~observation.observed.flatten(1).any(dim=1)
    assert 4 < silent.sum() < 24  # whole sequences, of 40
    error = (observation.y - batch.x0) / observation.sigma_y
    assert error.std(dim=(1, 2, 3, 4)).sub(1).abs().max() < 0.2
    again = parts(given(2))
    assert all(torch.equal(value, again[name]) for name, value in parts(batch).items())


def test_each_sequence_is_seen_once_a_pass_and_none_leaves_the_block() -> None:
    given = batches(fields(frames=2), indices=range(2, 9), size=5)
    order = torch.cat([given.chosen(k) for k in range(6)]).tolist()
    listed = [[2, 3], [4, 5], [5, 6], [6, 7], [7, 8]]
    assert given.samples.tolist() == [*listed[:1], [3, -1], *listed[1:]]
    for first in (0, 6, 12):
        assert sorted(order[first : first + 6]) == sorted(given.samples.tolist())
    assert order[:6] != order[6:12]


def test_masks_are_drawn_anew_for_every_frame() -> None:
    batch = batches(fields(land=False, frames=4), mask=Pixels(0.5), dropout=0.0)(0)
    both = batch.measured[:, 0] & batch.measured[:, 1]
    first, second = (batch.observation.observed[:, frame][both] for frame in (0, 1))
    assert abs((first == second).double().mean() - 0.5) < 0.05


def test_a_function_stands_for_a_mask_of_sequences() -> None:
    def half(n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        return (torch.rand(n, 1, *valid.shape, generator=generator) < 0.5) & valid

    valid = torch.ones(H, W, dtype=torch.bool)
    made = draw_sequence(half, 2, 3, valid=valid, generator=seeded(0))
    assert torch.equal(made, half(6, valid, seeded(0)).view(2, 3, 1, H, W))
    domains = torch.stack([valid, torch.zeros_like(valid)])
    some = draw_sequence(Full(), 2, 3, valid=domains, generator=seeded(0))
    assert torch.equal(some, domains[:, None, None].expand(2, 3, 1, H, W))


def test_windows_and_symmetries_are_the_same_in_all_frames() -> None:
    """Frames differ by their times alone where they see the same cells in the same places."""
    data = fields(land=False, periodic=True, frames=3, context=["wind"])
    augmentation = Augmentation(["flip_x", "flip_y", "transpose"]).resolve(Grid(torch.ones(5, 5).bool()), True)
    context = Context.measure(data, range(N))
    given = batches(data, window=(5, 5), augmentation=augmentation, context=context, dropout=0.0, size=30)
    batch, chosen = given(1), given.chosen(1)
    assert batch.x0.shape == (30, 3, 2, 5, 5) and batch.observation.context.shape == (30, 3, 3, 5, 5)
    time = torch.from_numpy(TIME).float()
    signs = set()
    for x0, told, measured, numbers in zip(batch.x0, batch.observation.context, batch.measured, chosen, strict=True):
        there = (numbers >= 0).nonzero().squeeze(1)
        sign = x0[there[0]].mean(dim=(1, 2)).sign()
        places = x0[there] * sign[:, None, None] * STD - time[numbers[there]].view(-1, 1, 1, 1)
        known = measured[there].expand(-1, 2, -1, -1)
        same = known[0] & known[-1]
        torch.testing.assert_close(places[0][same], places[-1][same], atol=1e-5, rtol=0)
        centred = 3 * x0[there] * STD - told[there, :2] * context.std["wind"]  # the mean of the wind, turned
        assert centred[0][:, same[0]].std(dim=1).max() < 1e-4
        signs.add(tuple(sign.tolist()))
    assert len(signs) == 4


def test_symmetries_of_sequences_are_those_of_their_frames() -> None:
    x = torch.randn(7, 3, 2, H, H, generator=seeded(0))
    chosen = Augmentation(["flip_x", "flip_y", "transpose", "roll"])
    parameters = chosen.resolve(Grid(torch.ones(H, H).bool(), boundary_x="periodic", boundary_y="periodic"), True).draw(
        7, seeded(1)
    )
    for part in (x, x[:, :, :1] > 0):
        frames = torch.stack([apply(part[:, frame], parameters) for frame in range(3)], dim=1)
        assert torch.equal(apply(part, parameters), frames)


def test_context_of_sequences_is_that_of_their_frames() -> None:
    data = fields(context=["depth", "wind"])
    context = Context.measure(data, range(N))
    normalizer = Normalizer(torch.zeros(2, H, W), STD)
    sequences = torch.tensor([[2, 3, -1], [4, 5, 6]])
    told = context.channels(context.parts(data, sequences), normalizer)
    assert told.shape == (2, 3, len(context), H, W) and not told[0, 2].any()
    single = context.channels(context.parts(data, [2, 3, 4, 5, 6]), normalizer)
    assert torch.equal(torch.cat([told[0, :2], told[1]]), single)


def test_what_does_not_change_in_time_is_known_of_missing_frames() -> None:
    data = fields(x_name="lon", y_name="lat", context=["depth", "still", "latitude", "season"])
    moving = xr.Variable(("time", "y", "x"), np.ones((N, H, W), np.float32))
    still = xr.Variable(("y", "x"), np.arange(H * W, dtype=np.float32).reshape(H, W))
    data = replace(
        data,
        time=np.datetime64("2020-01-01") + TIME.astype(int) * np.timedelta64(1, "D"),
        variables={"depth": Snapshots(moving, (H, W)), "still": Snapshots(still, (H, W))},
    )
    parts = Context.measure(data, range(N)).parts(data, np.array([[3, -1], [-1, -1]]))
    depth, constant, latitude, season = (part.isfinite().flatten(2).all(dim=2) for part in parts)
    assert depth.tolist() == season.tolist() == [[True, False], [False, False]]
    assert constant.all() and latitude.all() and parts[1].shape == (2, 2, 1, H, W)
    assert torch.equal(parts[1][1, 1, 0], torch.arange(H * W).view(H, W).float())


def test_parts_of_a_context_are_left_out_in_all_frames_of_a_sample() -> None:
    data = fields(frames=3, context=["depth", "wind"])
    given = batches(data, context=Context.measure(data, range(N)), dropout=0.5, size=60)
    shown = given(0).observation.context[:, :, [1, 4]].flatten(3).any(dim=3)  # (60, 3, 2)
    whole = shown.any(dim=1)
    there = given.chosen(0) >= 0
    assert torch.equal(shown, whole[:, None] & there[:, :, None])
    assert (whole.double().mean(dim=0) - 0.5).abs().max() < 0.2 and (whole[:, 0] != whole[:, 1]).any()


def test_no_sequence_is_found_out_before_the_first_batch() -> None:
    with pytest.raises(UserError, match="no sequence of 8 frames"):
        batches(fields(frames=8), indices=range(5))
