"""Distances between sets of fields, in cases where they are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vecfield_diffusion.evaluation.comparison import Score, distance
from vecfield_diffusion.evaluation.generation import (
    features,
    frechet,
    generation_scores,
    resampled,
    wasserstein,
)
from vecfield_diffusion.evaluation.physical import kinetic_energy
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import vorticity

H, W = 12, 16


def domain() -> Grid:
    return Grid(torch.ones(H, W, dtype=torch.bool), 2.0, 2.0, "periodic", "periodic")


def score_of(name: str, samples: Tensor, reference: Tensor, train: Tensor | None = None) -> float:
    """A score of all fields."""
    every = torch.arange(len(samples))[None], torch.arange(len(reference))[None]
    return float(resampled(samples, reference, reference if train is None else train, domain(), every)[name][0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fields(n: int, seed: int = 0) -> Tensor:
    wave = torch.hypot(torch.fft.fftfreq(W) * W, torch.fft.fftfreq(H)[:, None] * H)
    return torch.fft.ifft2(torch.fft.fft2(normal(n, 2, H, W, seed=seed)) / (1 + wave) ** 2).real


def exactly(n: int, mean: Tensor, covariance: Tensor) -> Tensor:
    """Samples `(n, F)` whose mean and covariance are the given ones to rounding."""
    x = normal(n, len(mean))
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.mT.cov()), x.mT, upper=False).mT
    return mean + white @ torch.linalg.cholesky(covariance).mT


def test_frechet_of_gaussians() -> None:
    """Covariances that commute: |m|^2 + sum (sqrt a - sqrt b)^2 over the common axes; else by the matrix root."""
    turn = torch.linalg.qr(normal(3, 3)).Q
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25]).double()
    first, second = turn @ a.diag() @ turn.mT, turn @ b.diag() @ turn.mT
    gap = torch.tensor([0.3, -1.0, 2.0]).double()
    expected = gap.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet(exactly(50, 0 * gap, first), exactly(70, gap, second)) == pytest.approx(expected.item())
    other = torch.tensor([[2.0, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 3]]).double()
    roots = torch.linalg.eigvals(first @ other).real.sqrt().sum()  # the same trace without a symmetric root
    expected = first.trace() + other.trace() - 2 * roots
    assert frechet(exactly(50, 0 * gap, first), exactly(60, 0 * gap, other)) == pytest.approx(expected.item())


def test_wasserstein_on_a_line() -> None:
    """Against the integral of |F^-1 - G^-1|^p on a fine scale; a shift by c costs c^p."""
    x = normal(5, 40)
    torch.testing.assert_close(wasserstein(x, x + 0.7), torch.full((5,), 0.7).double())
    torch.testing.assert_close(wasserstein(x, x.flip(-1) - 0.7, p=2), torch.full((5,), 0.49).double())
    y = normal(15, seed=1)
    levels = (torch.arange(120 * 15) + 0.5) / (120 * 15)
    quantiles = [t.sort().values[(levels * len(t)).long()] for t in (x[0], y)]
    for p in (1, 2):
        expected = (quantiles[0] - quantiles[1]).abs().pow(p).mean()
        torch.testing.assert_close(wasserstein(x[0], y, p), expected)


def test_sliced_distance_of_a_shift_is_its_length() -> None:
    """Along one component of the reference: the length over sqrt(values), within the chance of the directions."""
    basis = torch.linalg.qr(normal(2 * H * W, 3)).Q.mT
    reference = (normal(200, 3) * torch.tensor([3.0, 2.0, 1.0]) @ basis).view(200, 2, H, W)
    shifted = reference + 1.5 * basis[1].view(2, H, W)
    found = score_of("sliced_wasserstein", shifted, reference)
    assert found == pytest.approx(1.5 / math.sqrt(2 * H * W), rel=0.1)
    assert score_of("sliced_wasserstein", reference.flip(0), reference) == pytest.approx(0, abs=1e-7)


def test_features_of_waves() -> None:
    """v = A cos(k x), k of shell 1: energy A^2/4 there, enstrophy <(A k)^2 sin^2> (by differences), kurtosis 3/2."""
    grid = Grid(torch.ones(16, 16, dtype=torch.bool), 2.0, 2.0, "periodic", "periodic")
    x = (torch.arange(16) * 2.0).double().expand(16, 16)
    k, amplitude = 2 * math.pi / 32, 0.8
    field = torch.stack((0.1 + 0 * x, amplitude * torch.cos(k * x)))[None]
    found = features(field, grid)[0]
    curl = (amplitude * math.sin(2 * k) / 2) ** 2 / 2
    assert found[0].exp() == pytest.approx(amplitude**2 / 4, rel=1e-5)
    assert found[1:4].exp().tolist() == pytest.approx([1e-6 * amplitude**2 / 4] * 3, rel=1e-5)  # nothing: the floor
    assert found[4].exp() == pytest.approx(curl)
    assert found[5].exp() == pytest.approx(1e-4 * curl)
    assert found[6:8].tolist() == pytest.approx([0.1 / math.sqrt((0.1**2 + amplitude**2 / 2) / 2), 0.0])
    assert found[8:].tolist() == pytest.approx([0.0, math.log(1.5)])


def test_rounding_of_the_divergence_is_no_difference() -> None:
    """Flows without divergence to one rounding or another are as far apart as new draws."""
    reference, other = fields(150), fields(150, seed=1)
    noisy = other + 1e-7 * normal(150, 2, H, W)
    still = [each - each.mean(dim=(2, 3), keepdim=True) for each in (noisy, reference)]
    assert score_of("frechet_distance", *still) < 2  # means are rounding alone
    assert score_of("frechet_distance", noisy, reference) < 1.05 * score_of("frechet_distance", other, reference) + 0.01


def test_frechet_distance_tells_other_flows_from_new_draws() -> None:
    reference = fields(150)
    same = score_of("frechet_distance", fields(150, seed=1), reference)
    weaker = score_of("frechet_distance", 0.8 * fields(150, seed=1), reference)
    rough = score_of("frechet_distance", normal(150, 2, H, W) * 0.1, reference)
    assert same < 0.5 < 2 < weaker < rough


def test_copies_are_found() -> None:
    train, unseen = fields(60), fields(40, seed=1)
    assert score_of("memorisation", fields(40, seed=2), unseen, train) == pytest.approx(1, abs=0.1)
    assert score_of("memorisation", train[[3, 7]], unseen, train) == 0
    assert 0 < score_of("memorisation", train[[3, 7]] + 1e-9, unseen, train) < 1e-6
    one, distance = fields(1, seed=2), (unseen[:, None] - train).flatten(2).norm(dim=2).amin(1)
    expected = (one - train).flatten(1).norm(dim=1).min() / distance.median()
    assert score_of("memorisation", one.expand(2, -1, -1, -1), unseen, train) == pytest.approx(expected.item())


def values(found: dict[str, Score]) -> dict[str, float]:
    return {name: each.value for name, each in found.items()}


def test_all_scores_on_land() -> None:
    """The reference itself is perfect; twice as strong a field has 4 times the energy; land does not matter."""
    grid = Grid(torch.ones(H, W, dtype=torch.bool), 2.0, 2.0)
    grid.valid[:3, :4] = False
    reference, train = (torch.where(grid.valid, fields(40, seed=seed), math.nan) for seed in (0, 1))
    ideal = {"energy_ratio": 1, "enstrophy_ratio": 1, "memorisation": 1}
    found = values(generation_scores(reference, reference, train, grid))
    assert found == pytest.approx({name: ideal.get(name, 0) for name in found}, abs=1e-6)
    double = values(generation_scores(2 * reference, reference, train, grid))
    assert double["energy_ratio"] == pytest.approx(4) and double["enstrophy_ratio"] == pytest.approx(4)
    assert double["spectrum_distance"] == pytest.approx(math.log(4), rel=1e-4)
    assert double["vorticity_distance"] > 0.5 and double["frechet_distance"] > 1 and double["sliced_wasserstein"] > 0
    other = values(generation_scores((2 * reference).where(grid.valid, 9.0), reference, train, grid))
    assert other["sliced_wasserstein"] == double["sliced_wasserstein"]


def test_resamples_are_scored_as_if_their_fields_were_looked_at_again() -> None:
    """Those of the samples in all scores, those of the reference in all that do not take their unit from it."""
    samples, reference, train = fields(30), fields(25, seed=1), fields(20, seed=2)
    first, second = (torch.randint(n, (3, n), generator=torch.Generator().manual_seed(n)) for n in (30, 25))
    found = resampled(samples, reference, train, domain(), (first, torch.arange(25).expand(3, -1)))
    for k in (1, 2):
        want = values(generation_scores(samples[first[k]], reference, train, domain()))
        assert {name: float(each[k]) for name, each in found.items()} == pytest.approx(want, rel=2e-3)
    both = resampled(samples, reference, train, domain(), (first, second))
    for k in (1, 2):
        want = values(generation_scores(samples[first[k]], reference[second[k]], train, domain()))
        for name in ("energy_ratio", "enstrophy_ratio", "spectrum_distance", "memorisation"):
            assert float(both[name][k]) == pytest.approx(want[name])
        scale = [curl(each).std() for each in (reference[second[k]], reference)]
        expected = want["vorticity_distance"] * scale[0] / scale[1]
        assert float(both["vorticity_distance"][k]) == pytest.approx(expected.item(), rel=1e-2)
        parts = [
            each / features(reference, domain()).std(0)
            for each in (features(f, domain()) for f in (samples[first[k]], reference[second[k]]))
        ]
        assert float(both["frechet_distance"][k]) == pytest.approx(float(frechet(*parts)))


def curl(flow: Tensor) -> Tensor:
    return vorticity(flow, domain())


def test_the_interval_of_a_ratio_of_energies() -> None:
    """Of many fields whose energies are known: 1.96 times the error of the logarithm of a ratio of two means."""
    energies = [
        1 + 0.5 * torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (0, 1)
    ]
    pattern = fields(1) / kinetic_energy(fields(1), domain()).sqrt()
    samples, reference = (each.sqrt().view(-1, 1, 1, 1) * pattern for each in energies)
    value, low, high, count, _ = generation_scores(samples, reference, reference[:9], domain())["energy_ratio"]
    error = math.hypot(*(float(each.std() / each.mean()) / math.sqrt(200) for each in energies))
    assert count == 200 and value == pytest.approx(float(energies[0].mean() / energies[1].mean()))
    assert math.log(high / low) == pytest.approx(2 * 1.96 * error, rel=0.12)
    assert low < value < high


def test_fields_that_resemble_their_neighbours_widen_the_interval() -> None:
    """Four equal fields in a row tell less than four others; the samples as the reference, where they have an order."""
    calm = torch.arange(48) // 4 % 2 == 0
    ordered = torch.where(calm.view(-1, 1, 1, 1), 1.0, 2.0) * fields(1)
    mixed = ordered.view(4, 12, 2, H, W).transpose(0, 1).flatten(0, 1)[torch.arange(48) * 5 % 48]
    train = fields(9, seed=3)

    def width(samples: Tensor, reference: Tensor, block: int | None = 1) -> float:
        _, low, high, *_ = generation_scores(samples, reference, train, domain(), block=block)["energy_ratio"]
        return math.log(high / low)

    even = fields(1).expand(48, 2, H, W)
    assert width(even, ordered) > 1.2 * width(even, mixed)
    assert width(ordered, even, None) > 1.2 * width(ordered, even) > 0
    assert width(ordered, ordered, None) > 1.2 * width(even, ordered)  # both sets are drawn, each for itself


def test_a_distance_is_inside_its_interval() -> None:
    found = generation_scores(fields(40), fields(40, seed=1), fields(20, seed=2), domain())
    for score in found.values():
        assert 0 <= score.low < score.value < score.high
    assert distance(torch.tensor([0.1, 0.2, 0.4, 0.9])).low == 0
