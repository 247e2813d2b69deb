"""What a network is told beside the observation, written out by hand; and windows of larger fields."""

import numpy as np
import pytest
import torch
import xarray as xr

from vecfield_diffusion.data.augment import Augmentation
from vecfield_diffusion.data.context import Context
from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.masks import Full, Pixels
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.data.sequences import lengthened
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.cases import make_cases, with_context
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.training.batches import Batches, windows

N, H, W = 9, 6, 8
LAND = torch.ones(H, W, dtype=torch.bool)
LAND[1:3, 2:4] = False
RNG = np.random.default_rng(0)
VELOCITY = RNG.normal(size=(N, 2, H, W)).astype(np.float32)
VELOCITY[4, :, 5, 5] = np.nan
DEPTH = RNG.normal(100.0, 20.0, size=(1, H, W)).astype(np.float32)
WIND = RNG.normal(5.0, 2.0, size=(N, 2, H, W)).astype(np.float32)
NORMALIZER = Normalizer(torch.full((2, H, W), 0.5), 2.0)


def fields(valid=LAND, **changes):
    given = dict(
        reader=MemoryReader(VELOCITY),
        length=N,
        grid=Grid(valid),
        x=np.linspace(10, 17, W),
        y=np.linspace(-35, -30, H),
        source="made.nc",
        names=("u", "v"),
        x_name="lon",
        y_name="lat",
        time=np.datetime64("2002-01-01T12", "h") + np.arange(N) * np.timedelta64(30, "D"),
        variables={"depth": lambda i: np.repeat(DEPTH[None], len(i), 0), "wind": lambda i: WIND[i]},
        context=["depth", "wind", "latitude", "season"],
        history=[1, 3],
    )
    return Fields(**{**given, **changes})


def test_the_channels_by_hand():
    data = fields()
    context = Context.measure(data, range(0, 6))
    assert len(context) == 3 + 3 + 2 + 3 + 3 + 3
    told = context.channels(context.parts(data, [5, 2]), NORMALIZER)
    assert told.shape == (2, len(context), H, W)
    wet = LAND.numpy()
    past = np.where(wet & np.isfinite(VELOCITY[4]).all(0), (VELOCITY[4] - 0.5) / 2, 0.0)
    np.testing.assert_allclose(told[0, :2], past, rtol=1e-6)
    assert torch.equal(told[0, 2].bool(), LAND & torch.from_numpy(np.isfinite(VELOCITY[4]).all(0)))
    np.testing.assert_allclose(told[0, 3:5], np.where(wet, (VELOCITY[2] - 0.5) / 2, 0.0), rtol=1e-6)
    assert not told[1, 3:6].any()  # snapshot 2 has no third before it
    scaled = (DEPTH - DEPTH[:, wet].mean()) / DEPTH[:, wet].std()
    np.testing.assert_allclose(told[0, 6:7], scaled, rtol=1e-4, atol=1e-5)
    mean = WIND[:6][..., wet].mean(axis=(0, 2))
    std = np.sqrt(((WIND[:6][..., wet] - mean[:, None]) ** 2).mean())
    np.testing.assert_allclose(told[1, 8:10], (WIND[2] - mean[:, None, None]) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(told[0, 11, :, 0], np.cos(np.deg2rad(data.y)), rtol=1e-6)
    np.testing.assert_allclose(told[0, 12, :, 3], np.sin(np.deg2rad(data.y)), rtol=1e-6)
    turn = 2 * np.pi * (2 * 30 + 0.5) / 365.25
    np.testing.assert_allclose(told[1, 14:16, 0, 0], [np.cos(turn), np.sin(turn)], rtol=1e-5)
    assert Context.from_state(context.state_dict()) == context


def test_the_past_ends_where_a_trajectory_begins():
    data = fields(runs=np.repeat([0, 1, 2], 3), context=(), history=[1])
    context = Context.measure(data, range(N))
    known = context.channels(context.parts(data, range(N)), NORMALIZER)[:, 2].flatten(1).any(dim=1)
    assert known.tolist() == [False, True, True] * 3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(context=["dept"]), "no variable 'dept'.*depth"),
        (dict(context=["longitude"], x_name="x"), "no longitude"),
        (dict(context=["season"], time=np.arange(N)), "season needs dates"),
        (
            dict(variables={"depth": lambda i: np.full((len(i), 1, H, W), np.nan, np.float32)}, context=["depth"]),
            "no value",
        ),
    ],
)
def test_a_context_that_is_not_there(changes, match):
    with pytest.raises(UserError, match=match):
        Context.measure(fields(**changes), range(N))


def batches(data, **changes):
    given = dict(
        fields=data, indices=range(3, N), normalizer=NORMALIZER, diffusion=EDM(sigma_max=10.0), mask=Pixels(0.5)
    )
    return Batches(**{**given, **dict(augmentation=None, size=64, seed=0, dropout=0.0), **changes})


def test_training_leaves_parts_out_and_masks_half_of_the_past():
    data = fields(context=["depth"], history=[1])
    context = Context.measure(data, range(N))
    seen = batches(data, context=context, size=400, dropout=0.25)(0).observation.context
    depth = seen[:, 4].flatten(1).any(dim=1).double().mean().item()
    assert abs(depth - 0.75) < 0.07
    share = seen[:, 2][:, LAND].double().mean(dim=1)  # of the cells of the past: nothing, half or all
    assert abs((share == 0).double().mean() - 0.25) < 0.07
    assert abs((share > 0.9).double().mean() - 0.375) < 0.08
    assert abs(share[(share > 0) & (share < 0.9)].mean() - 0.5) < 0.03


def test_symmetries_turn_the_past_and_vectors_but_no_scalars():
    data = fields(torch.ones(H, W, dtype=torch.bool), context=["depth", "wind", "latitude"], history=[1])
    context = Context.measure(data, range(N))
    augmentation = Augmentation(["flip_x"]).resolve(data.grid, True)
    parameters = augmentation.draw(40, torch.Generator().manual_seed(1))
    flipped = int(parameters.flip_x.nonzero()[0])
    told = context.channels(context.parts(data, [5] * 40), NORMALIZER)
    moved = context.moved(told, lambda part: augmentation.apply(part, parameters))[flipped]
    sign = torch.ones(len(context))
    sign[[0, 5]] = -1.0  # u of the past and of the wind
    torch.testing.assert_close(moved, told[flipped].flip(-1) * sign[:, None, None])


@pytest.mark.parametrize("boundary", ["open", "periodic"])
def test_windows_are_cut_out_whole_and_hold_a_valid_cell(boundary):
    valid = torch.zeros(H, W, dtype=torch.bool)
    valid[0, 0] = valid[4, 6] = True
    grid = Grid(valid, boundary_x=boundary)
    place = torch.arange(H * W).view(1, 1, H, W).expand(200, 1, H, W)
    cut = windows(grid, (3, 4), 200, torch.Generator().manual_seed(0))
    rows, columns = cut(place)[:, 0] // W, cut(place)[:, 0] % W
    assert (rows.diff(dim=1) == 1).all()
    assert (columns.diff(dim=2) % W == 1).all()
    assert (columns.diff(dim=2) < 0).any() == (boundary == "periodic")
    assert cut(valid.expand(200, 1, H, W)).flatten(1).any(dim=1).all()


def test_windows_of_batches_hold_what_the_fields_hold_there():
    """Velocity, context and domain of one window come from the same cells."""
    data = fields(context=["depth"], history=[])
    context = Context.measure(data, range(N))
    batch = batches(data, window=(4, 4), context=context, mask=Full(), sigma_obs=0.0)(0)
    assert batch.x0.shape == (64, 2, 4, 4) and batch.observation.context.shape == (64, 2, 4, 4)
    scaled = torch.from_numpy((DEPTH[0] - DEPTH[:, LAND.numpy()].mean()) / DEPTH[:, LAND.numpy()].std())
    order = batches(data).chosen(0)
    for x0, measured, told, index in zip(batch.x0, batch.measured, batch.observation.context, order, strict=True):
        inside = told[1].nonzero()[0]
        place = ((scaled - told[0, *inside]).abs() < 1e-3).nonzero()[0]
        i, j = (place - inside).tolist()
        expected = (torch.from_numpy(VELOCITY[index]) - 0.5)[:, i : i + 4, j : j + 4] / 2
        known = LAND[i : i + 4, j : j + 4] & expected.isfinite().all(dim=0)
        assert torch.equal(measured[0], known)
        torch.testing.assert_close(x0, torch.where(known, expected, 0.0))


def test_cases_are_told_the_past_as_it_is_or_through_masks():
    data = fields(context=(), history=[1])
    context = Context.measure(data, range(N))
    cases = make_cases(data, [3, 8], Pixels(0.25), seed=2)
    whole = with_context(cases, data, context, NORMALIZER, seed=2, twin=True).context
    masked = with_context(cases, data, context, NORMALIZER, seed=2, past=Pixels(0.25), twin=True).context
    assert torch.equal(whole[0, 2].bool(), LAND)
    assert 5 <= masked[0, 2].sum() <= 12
    shown = masked[:, 2:].bool().expand(-1, 2, -1, -1)
    assert torch.equal(masked[:, :2][shown], whole[:, :2][shown])
    # The mask of the past is that of the earlier snapshot as a case of its own.
    earlier = make_cases(data, [7], Pixels(0.25), seed=2)
    assert torch.equal(masked[1, 2].bool(), earlier.observed[0, 0])


def test_depth_of_a_file_is_known_of_missing_frames_and_of_a_horizon(tmp_path):
    """What changes in time is not: the second hour is missing, and nothing is known of the one after the last."""
    hours = np.datetime64("2024-01-01", "h") + np.array([0, 2, 3]) * np.timedelta64(1, "h")
    dims, size = ("time", "y", "x"), (3, 4, 5)
    data = xr.Dataset(
        {name: (dims, RNG.normal(size=size).astype(np.float32), {"units": "m s-1"}) for name in ("u", "v")}
        | {"depth": (dims[1:], np.full(size[1:], 9.0)), "heat": (dims, np.full(size, 3.0))},
        {"time": hours, "y": ("y", 1e3 * np.arange(4), {"units": "m"}), "x": ("x", 1e3 * np.arange(5), {"units": "m"})},
    )
    data.to_netcdf(tmp_path / "sea.nc")
    longer = lengthened(open_fields(tmp_path / "sea.nc", context=["depth", "heat"], frames=4), 1)
    depth, heat = Context.measure(longer, range(3)).parts(longer, np.array([[0, -1, 1, 3]]))
    assert (depth == 9.0).all() and depth.shape == heat.shape == (1, 4, 1, 4, 5)
    assert heat[0, :, 0, 0, 0].nan_to_num(-1.0).tolist() == [3.0, -1.0, 3.0, -1.0]
