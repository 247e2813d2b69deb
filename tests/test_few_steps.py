"""Networks of few steps on Gaussian laws: what their losses are least at, what their sampler makes, what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import xarray as xr
from programs import TINY, Call, is_message
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import Moments
from vecfield_diffusion.diffusion.few_steps import CRPS, Consistency, fair_crps
from vecfield_diffusion.diffusion.formulations import DDPM, EDM
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.evaluation.metrics import crps
from vecfield_diffusion.samplers.few_steps import Consistency as Jumps
from vecfield_diffusion.training.batches import Batch

ONE = torch.ones(1, 1, dtype=torch.bool)


class Linear(torch.nn.Module):
    """f(z, s) = a(s) z in one cell, as a denoiser gives it."""

    def __init__(self, factor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        return self.factor(s).view(-1, 1, 1, 1) * z

    def estimate(self, z: Tensor, s: Tensor, observation: Observation) -> Moments:
        return Moments(self(z, s, observation), None, torch.ones_like(s), z)


def flow(v: float):
    """The factor of the flow map of N(0, v)."""
    return lambda s: (v / (v + s**2)).sqrt()


def corners(v: float) -> tuple[Tensor, Tensor]:
    """Four samples of x0 and eps with the second moments of N(0, v) and N(0, 1), exactly."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    field = torch.ones(4, 2, 1, 1, dtype=torch.float64)
    return math.sqrt(v) * signs[:, 0].view(-1, 1, 1, 1) * field, signs[:, 1].view(-1, 1, 1, 1) * field


@pytest.mark.parametrize("v", [0.04, 9.0])
@pytest.mark.parametrize("level", [0.3, 5.0])
def test_the_loss_is_least_where_the_closed_form_says(v: float, level: float) -> None:
    """Against the flow map at the lower level; with so large a huber that the loss is a square."""
    diffusion = Consistency(EDM(sigma_max=80.0), huber=1e4)
    x0, noise = corners(v)
    s = torch.full((4,), level, dtype=torch.float64)
    (r,) = diffusion.lower(s[:1], 0.9).tolist()
    assert r == pytest.approx(level * (1 - 2.0**-6))
    best = float(flow(v)(torch.tensor(r, dtype=torch.float64))) * (v + level * r) / (v + level**2)

    def slope(a: float) -> float:
        here = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        network = Linear(lambda at: torch.where(at == level, here, flow(v)(at)))
        known = (x0, torch.ones(4, 1, 1, 1, dtype=torch.bool), Observation.none(4, ONE, torch.float64), s, noise[None])
        return float(torch.autograd.grad(diffusion.loss(network, *known, progress=0.9)[0].mean(), here)[0])

    assert slope(best - 0.01) < 0 < slope(best + 0.01)
    assert abs(slope(best)) < 1e-6 * slope(best + 0.01)
    assert best == pytest.approx(float(flow(v)(torch.tensor(level))), rel=2.0**-12)


@pytest.mark.parametrize("halvings", [4, 6])
def test_down_all_levels_the_deviation_is_a_quarter_of_the_gap_too_small(halvings: int) -> None:
    diffusion, v, gap = Consistency(EDM(sigma_max=1e4), halvings=halvings, low=1e-4), 1.0, 0.5**halvings
    levels = [1e4]
    while levels[-1] > 0:
        levels.append(float(diffusion.lower(torch.tensor(levels[-1], dtype=torch.float64), 1.0)))
    factor = 1.0
    for r, s in zip(reversed(levels), list(reversed(levels))[1:], strict=False):
        factor *= (v + s * r) / (v + s**2)
    exact = math.sqrt(v / (v + 1e8))
    assert factor / exact == pytest.approx(1 - gap / 4, abs=gap**2 / 4)


def test_the_gap_halves_over_the_run_and_low_levels_are_none() -> None:
    diffusion = Consistency(EDM(), halvings=3, low=0.1)
    s = torch.tensor([8.0, 0.15])
    assert [diffusion.lower(s, p).tolist() for p in (0.0, 0.34, 0.67, 1.0)] == [
        [4.0, 0.0],
        [6.0, pytest.approx(0.1125)],
        [7.0, pytest.approx(0.13125)],
        [7.0, pytest.approx(0.13125)],
    ]
    times = diffusion.sample_times(2000, torch.Generator().manual_seed(0))
    assert times.min() >= 0.1 and times.log().mean() == pytest.approx(math.log(math.sqrt(0.1 * 80.0)), abs=0.01)


def test_below_the_lowest_level_the_target_is_the_clean_field() -> None:
    diffusion = Consistency(EDM(), low=0.5, huber=1e-9)
    x0, noise = corners(1.0)
    known = (x0, torch.ones(4, 1, 1, 1, dtype=torch.bool), Observation.none(4, ONE, torch.float64))
    s = torch.full((4,), 0.5, dtype=torch.float64)
    loss, field = diffusion.loss(Linear(torch.zeros_like), *known, s, noise[None], progress=0.5)
    torch.testing.assert_close(loss, torch.ones(4, dtype=torch.float64), atol=1e-8, rtol=0)
    assert not field.any()


def test_a_path_keeps_its_levels_and_its_network() -> None:
    path = DDPM(schedule="cosine")
    tuned = Consistency(path)
    t = torch.tensor([3.0, 500.0], dtype=torch.float64)
    for mine, own in zip(tuned.preconditioning(t), path.preconditioning(t), strict=True):
        assert mine.equal(own)
    assert tuned.level(t).equal(path.level(t)) and tuned.levels(5).equal(path.levels(5))
    assert tuned.sigma_max == path.sigma_max and tuned.time(path.level(t)).equal(path.time(path.level(t)))
    with pytest.raises(ValueError, match="formulation"):
        Consistency(tuned)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_sampler_makes_the_law_of_the_flow_map(steps: int) -> None:
    """Of three variances, from one run on the basis of all noise."""
    v = torch.tensor([4.0, 0.25, 0.01], dtype=torch.float64)
    sampler, draws = Jumps(steps, last=0.5), torch.eye(3 * steps, dtype=torch.float64).view(3 * steps, steps, 3)
    blocks = iter(draws.unbind(1))

    def flow_map(z: Tensor, s: Tensor) -> Tensor:
        return (v / (v + s[:, None] ** 2)).sqrt() * z

    levels = EDM(sigma_max=20.0).levels(steps)
    ladder = sampler.ladder(levels)
    assert ladder[0] == pytest.approx(20.0) and ladder[-1] == 0 and len(ladder) == steps + 1
    assert steps == 1 or ladder[-2] == pytest.approx(0.5)
    out = sampler.sample(flow_map, levels, lambda: next(blocks))
    expected = v * 400 / (v + 400)
    for r in ladder[1:-1]:
        expected = v / (v + r**2) * (expected + r**2)
    torch.testing.assert_close(out.T @ out, torch.diag(expected))
    assert sampler.evaluations == steps


def test_the_fair_score_is_that_of_the_evaluation() -> None:
    generator = torch.Generator().manual_seed(0)
    members = torch.randn(5, 3, 2, 4, 4, dtype=torch.float64, generator=generator)
    truth = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(fair_crps(members, truth).mean(), torch.as_tensor(crps(members, truth).mean()))


def test_the_score_is_least_for_the_conditional_law() -> None:
    """Members and truth are the same 400 quantiles of a normal law, shifted by m and stretched by t."""
    quantiles = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)
    at = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)

    def score(m: Tensor, t: Tensor) -> Tensor:
        members = (m + t * quantiles)[:, None].expand(-1, 400)
        return fair_crps(members, quantiles).mean()

    assert score(*at).item() == pytest.approx(1 / math.sqrt(math.pi), rel=5e-3)
    slope = torch.autograd.grad(score(*at), at)[0]
    assert slope.abs().max() < 5e-3
    for other in ((0.1, 1.0), (0.0, 0.9), (0.0, 1.1)):
        assert score(*torch.tensor(other, dtype=torch.float64)) > score(*at) + 1e-3


class Given(torch.nn.Module):
    """Gives its input over the level: members are the noise itself."""

    def estimate(self, z: Tensor, s: Tensor, observation: Observation) -> Moments:
        return Moments(z / s.view(-1, 1, 1, 1), None, 2 * torch.ones_like(s), z)


def test_members_are_made_of_different_noise_and_scored_where_the_truth_is_known() -> None:
    diffusion = CRPS(members=3)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 2, 4, 4, dtype=torch.float64, generator=generator)
    measured = torch.ones(4, 1, 4, 4, dtype=torch.bool)
    measured[:, :, 0, 0] = False
    x0[:, :, 0, 0] = torch.nan
    observation = Observation.none(4, torch.ones(4, 4, dtype=torch.bool), torch.float64)
    t = diffusion.sample_times(4, generator)
    members = Batch(x0, measured, observation, t, noise).lent(3)
    assert members.equal(torch.stack([noise, noise.roll(1, 0), noise.roll(2, 0)]))
    loss, field = diffusion.loss(Given(), x0, measured, observation, t, members, progress=0.0)
    cells = fair_crps(members, x0)[..., measured[0, 0]].mean((1, 2))
    torch.testing.assert_close(loss, cells / 2)
    torch.testing.assert_close(field, noise)


def test_numbers_out_of_range_are_named() -> None:
    for make, name in (
        (lambda: Consistency(halvings=0), "halvings"),
        (lambda: Consistency(low=0.0), "low"),
        (lambda: Consistency(huber=-1.0), "huber"),
        (lambda: CRPS(members=1), "members"),
        (lambda: CRPS(level=1.0), "level"),
        (lambda: Jumps(last=0.0), "last"),
    ):
        with pytest.raises(ValueError, match=name):
            make()


TUNED = ["debug=fast", "trainer.score_cases=2", "trainer.score_members=2"]


def test_a_network_is_tuned_sampled_and_refused_what_it_cannot(run: Call, place: Path) -> None:
    given = ["experiment=consistency", "ckpt=outputs/train/run", *TUNED]
    code, out, err = run("train", *given, "name=tuned")
    assert code == 0 and "begins with the weights of outputs/train/run/checkpoints/" in out, err
    assert "mask=block sampler=consistency sampler.steps=2" in out
    code, out, err = run("train", *given, "name=tuned", "trainer.max_steps=12")
    assert code == 0 and "going on from step 10" in out and "begins" not in out, err
    how = ["ckpt=outputs/train/tuned", "members=2", "name=filled"]
    code, out, err = run("infer", *how, "sampler=consistency", "mask=block")
    assert code == 0, err
    with xr.open_dataset(place / "outputs/infer/filled/fields.nc") as data:
        assert data.sizes["x"] == 16
    for refused in ("", "sampler=consistency inpainting=mmps", "sampler=consistency physics=divergence"):
        is_message(run("infer", *how, *refused.split()), "few steps", "E[x0 | x_t]")
    is_message(run("infer", *how, "sampler=consistency", "likelihood=exact", "mask=none"), "few steps")
    is_message(run("infer", "ckpt=outputs/train/run", "sampler=consistency"), "experiment=consistency")
    is_message(run("train", *given[:1], *TUNED, "name=a"), "diffusion=consistency", "ckpt=outputs/train/RUN")
    is_message(run("train", *TINY, "ckpt=outputs/train/run", "name=a"), "experiment=consistency", "start=")
    is_message(run("train", given[0], "ckpt=outputs/train/tuned", *TUNED, "name=a"), "expected a diffusion model")


def test_the_benchmark_judges_it_beside_its_teacher(
    run: Call, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "experiment=consistency", "ckpt=outputs/train/run", *TUNED, "name=tuned")[0] == 0
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import few_steps

    given = ["ckpt=outputs/train/run", "sampler.steps=3", "cases=2", "members=2", "masks=[block]"]
    rows = list(few_steps.compare(given, ["outputs/train/tuned"], ["1"]))
    assert [(row["network"], row["evaluations"]) for row in rows] == [
        ("teacher", "own"),
        ("teacher", "1"),
        ("tuned", "1"),
    ]
    assert rows[0]["crps / teacher"] == 1 and rows[0]["spectrum / teacher"] == 0
    assert rows[2]["crps / teacher"] == pytest.approx(rows[2]["crps"] / rows[0]["crps"])


def test_an_ensemble_is_trained_on_its_score(run: Call, place: Path) -> None:
    given = [*TINY, "experiment=crps", "debug=fast", "model.channels=[8,8]", "model.embedding=16"]
    code, out, err = run("train", *given, "name=scored", "trainer.score_cases=2")
    assert code == 0, err
    how = ["ckpt=outputs/train/scored", "members=2", "mask=block", "name=one"]
    assert run("infer", *how, "sampler.steps=1")[0] == 0
    is_message(run("infer", *how, "sampler=consistency"), "sampler.steps=1")
    is_message(run("train", *given, "name=a", "trainer.batch_size=1"), "trainer.batch_size=1")
