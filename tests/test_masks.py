"""Masks: observed cells lie in the domain, the shares are as asked, a seed repeats them, files are read as written."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from torch import Tensor

from vecfield_diffusion.data.given_masks import load_mask, shares_of, unlike_training
from vecfield_diffusion.data.masks import (
    Block,
    Border,
    Clouds,
    Empty,
    Full,
    Mask,
    MaskFile,
    Mixture,
    Pixels,
    Swath,
    Track,
)
from vecfield_diffusion.errors import UserError

RANDOM = [
    Pixels(0.1),
    Block(0.25),
    Track(0.05),
    Track([0.01, 0.2], legs=[1, 4]),
    Swath(),
    Clouds(),
    Border(3),
    Full(),
    Mixture({"pixels": Pixels(), "block": Block(), "clouds": Clouds()}, {"pixels": 1, "block": 1, "clouds": 1}),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coast(height: int = 21, width: int = 34) -> Tensor:
    """A domain with land in one corner."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return x + y > 12


def everywhere(height: int = 64, width: int = 48) -> Tensor:
    return torch.ones(height, width, dtype=torch.bool)


@pytest.mark.parametrize("mask", RANDOM, ids=lambda mask: type(mask).__name__)
def test_observed_cells_are_valid_never_none_and_a_seed_repeats_them(mask: Mask) -> None:
    valid = coast()
    observed = mask(16, valid, seeded())
    assert observed.shape == (16, 1, 21, 34) and observed.dtype == torch.bool
    assert not (observed & ~valid).any() and observed.flatten(1).any(1).all()
    torch.manual_seed(5)
    assert torch.equal(observed, mask(16, valid, seeded()))
    if not isinstance(mask, Border | Full):
        assert not torch.equal(observed, mask(16, valid, seeded(1)))
        assert not torch.equal(observed[0], observed[1])


@pytest.mark.parametrize("mask", RANDOM, ids=lambda mask: type(mask).__name__)
def test_a_domain_of_one_cell_is_observed(mask: Mask) -> None:
    valid = torch.zeros(16, 16, dtype=torch.bool)
    valid[8, 9] = True
    assert torch.equal(mask(8, valid, seeded()), valid.expand(8, 1, 16, 16))
    with pytest.raises(UserError, match="no cell of the field is valid"):
        mask(2, torch.zeros(16, 16, dtype=torch.bool), seeded())


def test_nothing_drawn_becomes_one_random_valid_cell() -> None:
    valid = coast()
    observed = Pixels(0.0)(400, valid, seeded()).flatten(1)
    assert observed.sum(1).eq(1).all()
    assert observed.any(0).sum() > 0.4 * valid.sum()
    assert not Empty()(3, valid, seeded()).any()


def test_pixels_observe_their_share_and_a_range_is_even_in_its_logarithm() -> None:
    assert Pixels(0.1)(64, everywhere(), seeded()).double().mean().item() == pytest.approx(0.1, abs=0.003)
    shares = Pixels([0.01, 0.25])(400, everywhere(), seeded()).flatten(1).double().mean(1)
    assert shares.median().item() == pytest.approx(0.05, rel=0.2)
    assert shares.min() > 0.004 and shares.max() < 0.29


def test_the_block_is_a_rectangle_of_its_share() -> None:
    for fraction, valid in ((0.25, everywhere()), (0.9, everywhere(20, 90)), (0.02, everywhere())):
        hidden = ~Block(fraction, aspect=3.0)(50, valid, seeded())[:, 0]
        for one in hidden:
            rows, columns = one.any(1), one.any(0)
            assert torch.equal(one, rows[:, None] & columns)
            for side in (rows, columns):
                assert side.diff().ne(False).sum() <= 2
            assert one.double().mean().item() == pytest.approx(fraction, rel=0.15)
    assert len({tuple(one.nonzero()[0].tolist()) for one in hidden}) > 30


def test_the_track_observes_its_share_on_connected_legs() -> None:
    for fraction in (0.02, 0.05, 0.3):
        shares = Track(fraction)(32, everywhere(), seeded()).flatten(1).double().mean(1)
        assert shares.tolist() == pytest.approx([fraction] * 32, abs=1.0 / everywhere().numel())
    valid = coast(41, 81)
    observed = Track(0.05, legs=3)(32, valid, seeded()).flatten(1).sum(1)
    assert observed.tolist() == pytest.approx([0.05 * valid.sum().item()] * 32, abs=1.0)


def test_the_track_goes_from_cell_to_neighbour_and_turns_slowly() -> None:
    valid = everywhere()
    path = Track(turn=0.1)._walk(valid, 200, torch.full((20,), 50), seeded())
    y, x = (path // 48).double(), path % 48
    within = torch.arange(1, 200) % 50 != 0
    steps = torch.maximum(y.diff().abs(), x.double().diff().abs())[:, within]
    assert steps.max() <= 1 and steps.mean() > 0.7
    # Over 10 steps of a heading with standard deviation 0.1 per step the path is nearly straight.
    straight = Track(turn=0.0)._walk(everywhere(500, 500), 40, torch.full((50,), 40), seeded())
    y, x = (straight // 500).double(), (straight % 500).double()
    length = torch.hypot(y[:, -1] - y[:, 0], x[:, -1] - x[:, 0])
    assert length.median().item() == pytest.approx(39.0, abs=1.5)


def test_swaths_are_parallel_bands_of_their_width_and_number() -> None:
    upright = Swath(width=6, count=2, slope=0)(40, everywhere(), seeded())[:, 0]
    assert torch.equal(upright, upright[:, :1].expand_as(upright))
    assert upright[:, 0].sum(1).eq(12).all()
    level = Swath(width=6, count=2, slope=90)(40, everywhere(), seeded())[:, 0]
    assert level[:, :, 0].sum(1).eq(12).all() and torch.equal(level, level[..., :1].expand_as(level))
    angle = math.radians(30)
    inclined = Swath(width=6, count=3, slope=30)(200, everywhere(), seeded())
    share = 6 * 3 / (48 * math.cos(angle) + 64 * math.sin(angle))
    assert inclined.double().mean().item() == pytest.approx(share, rel=0.03)
    # 20 rows up the band has gone 20 tan(30) = 11.5 columns to the right; the edges are rounded.
    right = inclined[:, 0, 20:, 12:] == inclined[:, 0, :-20, :-12]
    left = inclined[:, 0, 20:, :-12] == inclined[:, 0, :-20, 12:]
    assert right.double().mean().item() > 0.95 > 0.8 > left.double().mean().item()


def test_clouds_hide_their_share_in_few_large_pieces() -> None:
    valid = coast(41, 81)
    hidden = valid & ~Clouds(0.4)(32, valid, seeded())[:, 0]
    assert hidden.flatten(1).sum(1).tolist() == [round(0.4 * valid.sum().item())] * 32
    alike = (hidden[..., 1:] == hidden[..., :-1]).double().mean().item()
    # Neighbours of independent pixels would agree in 0.4^2 + 0.6^2 = 52 % of the cases.
    assert alike > 0.9
    for fraction in (0.0, 1.0):
        assert (
            Clouds(fraction)(4, valid, seeded()).flatten(1).sum(1).tolist()
            == [1 if fraction else valid.sum().item()] * 4
        )


def test_the_border_is_a_frame() -> None:
    observed = Border(3)(2, everywhere(20, 30), seeded())[0, 0]
    assert observed.sum() == 20 * 30 - 14 * 24 and not observed[3:-3, 3:-3].any()
    widths = Border([1, 4])(100, everywhere(20, 30), seeded())[:, 0, 10].sum(1)
    assert widths.unique().tolist() == [2, 4, 6, 8]
    with pytest.raises(UserError, match="leaves nothing to fill of 20 x 30.*mask.width="):
        Border(10)(1, everywhere(20, 30), seeded())
    narrow = Border([1, 6])(100, everywhere(7, 30), seeded())[:, 0, 3].sum(1)
    assert narrow.unique().tolist() == [2, 4, 6]  # wider ones leave nothing of seven rows


def test_a_mixture_draws_by_weight_and_may_hold_emptiness() -> None:
    masks = {"full": Full(), "empty": Empty(), "border": Border(1)}
    observed = Mixture(masks, {"full": 3, "empty": 1, "border": 0})(2000, everywhere(8, 8), seeded()).flatten(1)
    assert observed.all(1).double().mean().item() == pytest.approx(0.75, abs=0.03)
    assert ((~observed).all(1) | observed.all(1)).all()
    nested = Mixture({"inner": Mixture(masks, {"full": 0, "empty": 0, "border": 1})}, {"inner": 1.0})
    assert nested(3, everywhere(8, 8), seeded()).flatten(1).sum(1).tolist() == [28] * 3


@pytest.mark.parametrize("suffix", ["npy", "npz", "h5", "nc", "png"])
def test_a_file_gives_back_the_mask_that_was_written(tmp_path: Path, suffix: str) -> None:
    mask = coast(5, 8) ^ torch.eye(5, 8, dtype=torch.bool)
    path, array = tmp_path / f"mask.{suffix}", (coast(5, 8) ^ torch.eye(5, 8, dtype=torch.bool)).numpy()
    if suffix == "npy":
        np.save(path, array[None].astype(np.float32))
    elif suffix == "npz":
        np.savez(path, line=np.ones(3), observed=array, other=~array)
    elif suffix == "h5":
        with h5py.File(path, "w") as file:
            file["a"], file["b/observed"], file["z"] = np.ones(3), array.astype(np.uint8), ~array
    elif suffix == "nc":
        stored = np.where(array, 1.0, np.nan)
        encoding = {"m": {"dtype": "int8", "_FillValue": -1}}
        xr.Dataset({"m": (("y", "x"), stored)}).to_netcdf(path, engine="h5netcdf", encoding=encoding)
    else:
        Image.fromarray(array.astype(np.uint8) * 255).save(path)
    assert torch.equal(load_mask(str(path), (5, 8)), mask)
    observed = MaskFile(str(path))(3, everywhere(5, 8), seeded())
    assert torch.equal(observed, mask.expand(3, 1, 5, 8))
    if suffix in ("npz", "h5"):
        name = "other" if suffix == "npz" else "z"
        assert torch.equal(load_mask(str(path), (5, 8), name), ~mask)


def test_mask_files_that_do_not_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "small.npy", np.ones((4, 5)))
    np.savez(tmp_path / "lines.npz", line=np.ones(3))
    np.save(tmp_path / "zero.npy", np.zeros((6, 7)))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "broken.npy").write_bytes(b"")
    (tmp_path / "broken.h5").write_text("no file")
    cases = {
        "small.npy": r"has shape \(4, 5\), the field \(6, 7\)",
        "lines.npz": "no array of two or three dimensions.*line",
        "zero.npy": "observes no valid cell.*mask=none",
        "objects.npy": "cannot read the mask",
        "broken.png": "cannot read the mask",
        "broken.npy": "cannot read the mask",
        "broken.h5": "cannot read the mask.*no file that can be read here",
        "smal.npy": "no mask file.*Did you mean 'small.npy'",
        "mask.txt": "unknown kind.*npy",
    }
    for name, match in cases.items():
        with pytest.raises(UserError, match=match):
            MaskFile(str(tmp_path / name))(1, everywhere(6, 7), seeded())
    with pytest.raises(UserError, match="no two-dimensional array 'lin'.*It has"):
        load_mask(str(tmp_path / "lines.npz"), (6, 7), "lin")


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_mask_files_that_are_damaged_or_absurd(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((40, 50)) < 0.5
    np.savez(tmp_path / "cut.npz", array)
    np.savez(tmp_path / "sum.npz", array)
    np.savez_compressed(tmp_path / "flate.npz", array)
    np.save(tmp_path / "huge.npy", array)
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file["observed"] = array
    contents = {path.name: bytearray(path.read_bytes()) for path in tmp_path.iterdir()}
    contents["cut.npz"] = contents["cut.npz"][:500]
    contents["sum.npz"][1000] ^= 1
    contents["flate.npz"][60:200] = bytes(140)
    contents["huge.npy"] = contents["huge.npy"].replace(b"(40, 50)", b"(4, 5 ")
    contents["group.h5"] = contents["group.h5"].replace(b"TREE", b"BUSH")
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(10)))
    contents["bomb.png"] = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read the mask '{tmp_path / name}': "):
            load_mask(str(tmp_path / name), (40, 50))


def test_a_mask_file_is_read_once_for_each_shape(tmp_path: Path) -> None:
    path = tmp_path / "mask.npy"
    np.save(path, np.eye(5, 8))
    mask = MaskFile(str(path))
    first = mask(2, everywhere(5, 8), seeded())
    path.unlink()
    first.logical_not_()
    assert torch.equal(mask(3, everywhere(5, 8), seeded()), torch.eye(5, 8).bool().expand(3, 1, 5, 8))
    with pytest.raises(UserError, match="no mask file"):
        mask(1, everywhere(8, 5), seeded())


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Pixels(1.5), r"^fraction must be a number or \[low, high\] within \[0, 1\], got 1.5"),
        (lambda: Pixels([0.5, 0.1]), "^fraction must"),
        (lambda: Block([0.1]), "^fraction must"),
        (lambda: Block(aspect=0.5), "^aspect must be at least 1, got 0.5"),
        (lambda: Track(legs=0), "^legs must"),
        (lambda: Track(turn=-1.0), "^turn must be at least 0"),
        (lambda: Swath(width=0.5), "^width must"),
        (lambda: Swath(slope=[-100, 0]), "^slope must"),
        (lambda: Clouds(size=0.0), r"^size must be in \(0, 1\]"),
        (lambda: Border(0), "^width must"),
        (lambda: Mixture({"a": Full()}, {"b": 1.0}), "^weights: 'b' is not among a|^masks: 'a' is not among b"),
        (lambda: Mixture({"a": Full()}, {"a": 0.0}), "^weights must be at least 0, and one of them above 0"),
    ],
)
def test_numbers_out_of_range(build: type[Mask], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()


def test_the_shares_that_a_family_observes() -> None:
    """A block hides a share of the cells of its own choice; on a domain that is half land, shares are of the sea."""
    valid, generator = torch.ones(20, 20, dtype=torch.bool), torch.Generator().manual_seed(0)
    shares = shares_of(Block(fraction=[0.2, 0.5], aspect=1.0)(256, valid, generator), valid)
    assert shares.min() == pytest.approx(0.5, abs=0.03) and shares.max() == pytest.approx(0.8, abs=0.03)
    for family, share in ((Full(), 1.0), (Empty(), 0.0)):
        assert (shares_of(family(3, valid, generator), valid) == share).all()
    valid[:, 10:] = False
    expected = (20 * 10 - 16 * 8) / 200
    torch.testing.assert_close(shares_of(Border(width=2)(2, valid, generator), valid), torch.full((2,), expected))
    domains = torch.stack([valid, torch.zeros_like(valid)])
    assert shares_of(Full()(2, valid, generator), domains).tolist() == [1.0]


@pytest.mark.parametrize(
    ("share", "said"), [(0.015, True), (0.03, False), (0.1, False), (0.54, False), (0.93, True), (1.0, True)]
)
def test_a_mask_of_the_opposite_meaning_is_found_out(share: float, said: bool) -> None:
    """Training observed 5 to 10 %: less than half of 5 % is far less, and hiding less than half of 90 % is far more."""
    note = unlike_training(share, 0.05, 0.1)
    assert bool(note) == said
    if said:
        assert "the masks of training observe 5.0% to 10.0% of the cells: is the mask 1 where" in note


def test_training_without_observations_says_nothing_about_a_mask() -> None:
    """mask=none and inpainting=mmps go together: there is nothing that a mask could be unlike."""
    assert unlike_training(0.84, 0.0, 0.0) == ""
