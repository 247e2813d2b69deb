"""What can be true of the data: shares of masks, magnitudes, absurd values and results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from programs import FEW, SMALL, TINY, Call, is_message

from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.masks import Full
from vecfield_diffusion.data.statistics import LIMIT
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.cases import make_cases
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs import fill as filling
from vecfield_diffusion.programs.plausible import absurd, check_members, extreme

SHAPE = (4, 5)
GRID = Grid(torch.ones(SHAPE, dtype=torch.bool), 1e3, 1e3)
STD, MEAN = 0.5, 2.0
TRAINED = SimpleNamespace(
    grid=GRID,
    statistics=SimpleNamespace(std=STD, largest=2.0),
    denoiser=SimpleNamespace(normalizer=Normalizer(torch.full((2, *SHAPE), MEAN), STD)),
)


def cases(values: np.ndarray) -> object:
    fields = Fields(MemoryReader(values), len(values), GRID, np.arange(5), np.arange(4), "memory", ("u", "v"))
    return make_cases(fields, range(len(values)), Full(), seed=0)


def test_a_value_counts_up_to_the_limit_about_the_mean_field() -> None:
    values = np.full((3, 2, *SHAPE), MEAN, dtype=np.float32)
    values[1, 0, 2, 3] = MEAN + 1.01 * LIMIT * STD
    values[1, 1, 0, 0] = MEAN - 0.99 * LIMIT * STD
    values[2, 1, 1, 1] = -1e33
    found = cases(values)
    cells = absurd(found, TRAINED)
    assert cells.nonzero().tolist() == [[1, 0, 2, 3], [2, 0, 1, 1]]
    assert extreme(found, TRAINED) == pytest.approx(1e33)
    hidden = replace(found, y=torch.full_like(found.y, MEAN))  # known, though not observed
    assert extreme(hidden, TRAINED) == pytest.approx(1e33) and absurd(hidden, TRAINED).equal(cells)
    left = found.without(cells)
    assert not (left.observed & cells).any() and left.truth.isnan().all(dim=1, keepdim=True).equal(cells)
    assert torch.equal(left.observed, found.observed & ~cells)


def test_members_that_are_no_numbers_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    some = cases(np.full((2, 2, *SHAPE), MEAN, dtype=np.float32))
    members = torch.full((3, 2, 2, *SHAPE), MEAN)
    check_members(members, some, TRAINED)
    assert capsys.readouterr().out == ""
    members[1, 1, 0, 2, 2] = MEAN + 1.01 * LIMIT * STD
    check_members(members, some, TRAINED)
    assert "note: snapshot 1: in 1 cell a member is more than 20 standard deviations" in capsys.readouterr().out
    members[2, 1, 1, 0, 0] = torch.nan
    with pytest.raises(UserError, match="snapshot 1: the method gives values that are not finite"):
        check_members(members, some, TRAINED)


def test_a_mask_of_the_opposite_meaning_is_noted(place: Path, run: Call) -> None:
    """A network of tracks, which observe few cells, and a file that has 0 where a cell is observed."""
    options = ["name=tracks", "mask=track", "trainer.max_steps=2", "trainer.batch_size=2"]
    assert run("train", *TINY, *SMALL, *options)[0] == 0
    mask = np.ones((16, 16))
    mask[5] = 0
    for name, array in (("inverse", mask), ("meant", 1 - mask)):
        np.save(place / f"{name}.npy", array)
    code, out, err = run("infer", "ckpt=outputs/train/tracks", "name=share", *FEW, "mask=inverse.npy")
    assert (code, err) == (0, "")
    assert "observed: 93.8% of the cells" in out and "is the mask 1 where a cell is observed" in out
    code, out, err = run("infer", "ckpt=outputs/train/tracks", "name=share", *FEW, "mask=meant.npy")
    assert "observed: 6.2% of the cells" in out and "is the mask 1" not in out


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), MemoryError()])
def test_memory_that_is_full_is_a_message(run: Call, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """It names the largest of half the batch, a quarter and so on that a trial of one step finds memory for."""
    real, room = filling.sample_ensemble, 5

    def small(denoiser: object, method: object, *, batch: int, **options: object) -> object:
        if batch > room:
            raise error
        return real(denoiser, method, batch=batch, **options)

    monkeypatch.setattr(filling, "sample_ensemble", small)
    given = ["ckpt=outputs/train/run", "name=full", *FEW]
    is_message(run("infer", *given, "batch=64"), "memory is full at batch=64: give batch=4, which fits")
    assert run("infer", *given, "batch=4")[0] == 0
    room = 0
    is_message(run("infer", *given, "batch=64"), "memory is full at batch=64: train with window=")


def test_other_errors_of_the_network_keep_their_traceback(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("shapes")

    monkeypatch.setattr(filling, "sample_ensemble", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run("infer", "ckpt=outputs/train/run", "name=broken", *FEW)
