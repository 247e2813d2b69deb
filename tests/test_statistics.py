"""Values that cannot belong to the data: undeclared fill values and damaged cells go, extremes of flows stay."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import SMALL

from vecfield_diffusion import commands
from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.data.statistics import Believed, believed, leading_eigenvalue, limit_of, measure
from vecfield_diffusion.diffusion.normalizer import Normalizer, Statistics
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.train import train
from vecfield_diffusion.programs.trained import held_out, load_trained

N, H, W = 20, 12, 16


def fields(velocity: np.ndarray) -> Fields:
    n, _, height, width = velocity.shape
    grid = Grid(torch.ones(height, width, dtype=torch.bool), 1e3, 1e3)
    place = {"x": np.arange(width), "y": np.arange(height), "source": "my.nc", "names": ("u", "v")}
    return Fields(MemoryReader(velocity.astype(np.float32)), n, grid, **place)


def noise(seed: int = 0) -> np.ndarray:
    return 0.3 * np.random.default_rng(seed).standard_normal((N, 2, H, W)).astype(np.float32)


@pytest.mark.parametrize("value", [-9999.0, -99.9, 1e20, 1e33, 9.96921e36])
def test_a_fill_value_that_nobody_declared_is_left_out(value: float) -> None:
    """As land at all times, and as gaps here and there: std and domain are those of the other cells."""
    plain = noise()
    spoilt = plain.copy()
    spoilt[:, :, :3] = value
    spoilt[4, :, 5, 5] = spoilt[7, 1, 6, 6] = value
    found, note = believed(fields(spoilt))
    assert f"{N * 3 * W + 2} values such as {np.float32(value):.6g}"[:-3] in note and "in 20 of 20 snapshots" in note
    assert f"{3 * W} cells that have nothing else are taken for land" in note
    assert not found.grid.valid[:3].any() and found.grid.valid[3:].all()
    velocity = found.read(range(N))
    left = np.ones((N, H, W), dtype=bool)
    left[:, :3] = left[4, 5, 5] = left[7, 6, 6] = False
    assert (velocity.isfinite().all(1).numpy() == left).all()
    kept = plain.transpose(0, 2, 3, 1)[left].astype(float)
    _, statistics = measure(found, range(N), mean_field=False)
    assert statistics.std == pytest.approx(math.sqrt((kept**2).mean()), rel=1e-6)
    assert statistics.largest == pytest.approx(np.abs(kept).max(), rel=1e-6)


def test_one_damaged_cell_is_left_out() -> None:
    spoilt = noise()
    spoilt[3, 0, 2, 2] = 1e33
    found, note = believed(fields(spoilt))
    assert note.startswith("1 values such as 1e+33 m s-1 in 1 of 20 snapshots are left out")
    assert found.grid.valid.all() and found.read([3])[0, :, 2, 2].isnan().all()


@pytest.mark.parametrize("seed", range(5))
def test_more_fill_than_data(seed: int) -> None:
    """Radar: nine cells in ten are empty."""
    spoilt = noise(seed)
    empty = np.random.default_rng(seed).random((N, H, W)) < 0.9
    spoilt.transpose(0, 2, 3, 1)[empty] = -9999.0
    found, _ = believed(fields(spoilt))
    assert (found.read(range(N)).isfinite()[:, 0].numpy() == ~empty).all()


def jet() -> np.ndarray:
    """A narrow jet in water that hardly moves: the magnitudes run over six decades, none of them empty."""
    y = np.linspace(-1, 1, 2000)[None, None, :, None]
    u = np.exp(-((y / 0.15) ** 2)) + 1e-6 * (1 + np.abs(y))
    return np.concatenate([u, 0 * u], axis=1) * np.ones((N, 1, 1, 4))


def spikes() -> np.ndarray:
    """Student's t with 3 degrees of freedom has tails of 20 standard deviations."""
    return np.random.default_rng(0).standard_t(3, (N, 2, 60, 60))


def front() -> np.ndarray:
    """A flow on one side, rounding errors on the other."""
    values = np.random.default_rng(0).standard_normal((N, 2, H, W))
    values[..., 8:] *= 1e-17
    return values


@pytest.mark.parametrize("velocity", [jet(), spikes(), front(), noise(), np.zeros((N, 2, H, W))])
def test_extremes_of_a_flow_stay(velocity: np.ndarray) -> None:
    found, note = believed(fields(velocity))
    assert note == ""
    torch.testing.assert_close(found.read(range(N)), torch.from_numpy(velocity.astype(np.float32)), rtol=0, atol=0)


def test_nothing_but_fill_values_is_refused() -> None:
    with pytest.raises(UserError, match=r"no value is below 1e\+09.*dataset.u="):
        believed(fields(np.full((N, 2, H, W), 1e20)))


def test_the_limit_of_what_is_believed() -> None:
    """20 std, which is further than twice the largest value unless tails are heavy; old checkpoints know no largest."""
    normalizer, statistics = measure(fields(noise()), range(N), mean_field=True)
    assert limit_of(statistics) == 20 * statistics.std > 2 * np.abs(noise()).max()
    assert limit_of(replace(statistics, largest=11 * statistics.std)) == pytest.approx(22 * statistics.std)
    held = Believed(fields(noise()).reader, 0.5, normalizer.mean.numpy())
    far = (np.abs(noise() - normalizer.mean.numpy()) > 0.5).any(axis=1)
    assert far.any() and np.array_equal(np.isnan(held(np.arange(N))).all(axis=1), far)
    state = statistics.state_dict()
    assert Statistics(**state) == statistics
    del state["largest"]
    assert limit_of(Statistics(**state)) == 20 * statistics.std


def test_divergence_over_vorticity() -> None:
    assert Statistics(1.0, 1.0, 1.0, 0.19, 1.0).solenoidal and not Statistics(1.0, 1.0, 1.0, 0.21, 1.0).solenoidal
    assert Statistics(1.0, 1.0, 1.0, 0.43, 0.5).divergent == pytest.approx(0.86)


def test_the_leading_eigenvalue_of_large_fields_is_that_of_all_their_cells() -> None:
    """A wave a of variance 1/2 and amplitude N(0, 1) has lambda = |wave|^2, however many cells stand for it."""
    y, x = np.mgrid[:300, :400] / 100.0
    wave = np.stack([np.sin(2 * math.pi * x), np.cos(2 * math.pi * y)])
    amplitudes = np.array([1.0, -1.0] * 5)
    velocity = fields(amplitudes[:, None, None, None] * wave)
    got = leading_eigenvalue(velocity, range(10), Normalizer(torch.zeros(2, 300, 400), 1.0))
    assert got == pytest.approx((wave**2).sum(), rel=1e-3)


def test_training_on_undeclared_fill_values_is_training_on_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are the same to the last bit, and so are the held-out fields; a line names what was left out."""
    monkeypatch.chdir(tmp_path)
    gaps, spoilt = (np.random.default_rng(0).standard_normal((40, 2, 16, 16), dtype=np.float32) for _ in range(2))
    for fill, values in ((np.nan, gaps), (-9999.0, spoilt)):
        values[:, :, :4] = fill
        values[::3, :, 8, 9] = fill
    states, held = [], []
    for name, values in (("gaps", gaps), ("spoilt", spoilt)):
        write_hdf5(tmp_path / f"{name}.h5", values, dx=1e3, dy=1e3)
        node = ["dataset=file", f"dataset.path={name}.h5", f"name={name}", "debug=fast", *SMALL, "trainer.max_steps=2"]
        config = commands.train.config(*node)
        train(config, Path("outputs/train") / name)
        trained = load_trained(f"outputs/train/{name}", torch.device("cpu"))
        states.append(trained.denoiser.state_dict() | trained.grid.state_dict())
        fields, test = held_out(trained, "test")
        held.append(fields.read(test))
    said = capsys.readouterr().out
    assert "note: spoilt.h5: 2574 values such as -9999 m s-1 in 40 of 40 snapshots are left out" in said
    assert "note: gaps.h5" not in said
    for key, value in states[0].items():
        assert value == states[1][key] if isinstance(value, str) else torch.equal(value, states[1][key]), key
    torch.testing.assert_close(*held, rtol=0, atol=0, equal_nan=True)
