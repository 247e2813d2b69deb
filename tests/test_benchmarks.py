"""The exact answers that `benchmarks/formulations.py` holds trained networks against."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from vecfield_diffusion.data.augment import Parameters, apply


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import formulations

    monkeypatch.setattr(formulations, "SIZE", 6)
    yield formulations
    del sys.modules["formulations"]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_exact_denoiser_is_the_linear_estimate_from_all_data_together(bench, share):
    law, std, s, generator = bench.Law(), 1.3, 0.7, torch.Generator().manual_seed(0)
    mask = torch.rand(6, 6, generator=generator) < share
    case = bench.make_case(law, std, mask, 3, generator)
    z = case.x0 + s * torch.randn(case.x0.shape, generator=generator, dtype=torch.float64)

    prior, unit, seen = law.covariance / std**2, torch.eye(72, dtype=torch.float64), mask.flatten().repeat(2)
    operator = torch.cat([unit[seen], unit])
    noise = torch.tensor([bench.SIGMA_Y**2] * int(seen.sum()) + [s**2] * 72, dtype=torch.float64).diag()
    gain = torch.linalg.solve(operator @ prior @ operator.T + noise, operator @ prior)
    data = torch.cat([case.observation.y.double().flatten(1)[:, seen], z.flatten(1)], dim=1)

    torch.testing.assert_close(case.exact(z, s).flatten(1), data @ gain, atol=1e-6, rtol=0)  # y is in float32
    left = (prior - gain.T @ operator @ prior).diagonal().mean().item()
    assert case.least(s) == pytest.approx(left, abs=1e-12)


@pytest.mark.parametrize("change", [{"flip_x": 1}, {"flip_y": 1}, {"transpose": 1}, {"roll_x": 2, "roll_y": 1}])
def test_augmentation_does_not_change_the_law(bench, change):
    coins = [torch.full((72,), bool(change.get(name, 0))) for name in ("transpose", "flip_x", "flip_y")]
    rolls = [torch.full((72,), change.get(name, 0)) for name in ("roll_x", "roll_y")]
    moved = apply(torch.eye(72, dtype=torch.float64).view(72, 2, 6, 6), Parameters(*coins, *rolls)).flatten(1)
    covariance = bench.Law().covariance
    assert covariance.diagonal().mean().item() == pytest.approx(1)
    torch.testing.assert_close(moved.T @ covariance @ moved, covariance, atol=1e-12, rtol=0)


def test_the_path_of_a_user_has_the_levels_that_it_was_given(bench):
    path = bench.Trigonometric(sigma_min=0.01, sigma_max=70.0)
    assert (path.sigma_min, path.sigma_max) == pytest.approx((0.01, 70.0))
    s = torch.logspace(-2, 1.8, 9, dtype=torch.float64)
    torch.testing.assert_close(path.level(path.time(s)), s)


def test_networks_that_are_timed_have_one_size_and_operations_are_counted_forward_and_backward(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import training

    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in training.networks(9).items()}
    assert max(sizes.values()) < 1.06 * min(sizes.values()), sizes
    layer = training.convolution(8, 6, 2, None)
    # 9 x 8 products a value of the output, forward, by the input and by the weights, each with an addition
    assert training.operations(layer.work) == layer.operations == 3 * 2 * 9 * 8 * (2 * 8 * 6 * 6)
