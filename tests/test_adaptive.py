"""The adaptive sampler: order of the step, the error it promises, independence of the samples of a batch."""

import math

import pytest
import torch
from oracle import GaussianPrior

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.samplers.adaptive import Adaptive, Slope, bogacki_shampine
from vecfield_diffusion.samplers.base import silent

PRIOR = GaussianPrior(4, 4)
S_MAX = 10 * PRIOR.eigenvalues.max().sqrt().item()
LEVELS = torch.tensor([S_MAX, 0.01, 0.0], dtype=torch.float64)


def field(samples=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, *PRIOR.shape, dtype=torch.float64, generator=generator)


def flow(z, s, r):
    """The exact ODE on the Gaussian prior from levels `s` to `r`, `(B,)` each."""
    gain = ((PRIOR.eigenvalues + r[:, None] ** 2) / (PRIOR.eigenvalues + s[:, None] ** 2)).sqrt()
    return ((z.flatten(1) @ PRIOR.vectors * gain) @ PRIOR.vectors.T).view_as(z)


def exact(eps):
    """The samples of a perfect integration: D at the end of the exact ODE."""
    top, bottom = (level.expand(len(eps)) for level in LEVELS[:2])
    return PRIOR.denoise(flow(LEVELS[0] * eps, top, bottom), bottom)


def one_step(h):
    """The local error of a step down by h in ln s and the error it reports, each sample from a level of its own."""
    z, s = field(4), torch.tensor([0.5, 1.0, 2.0, 5.0], dtype=torch.float64)
    slope = Slope(PRIOR.denoise, silent, 100)
    target = s.log() - h
    new, k4, error = bogacki_shampine(slope, z, slope(z, s.log()), s.log(), target)
    torch.testing.assert_close(k4, new - PRIOR.denoise(new, target.exp()))
    return (new - flow(z, s, target.exp())).norm().item(), error.norm().item()


def test_a_step_is_of_third_order_and_its_error_estimate_of_second():
    (error, estimate), (error_half, estimate_half) = one_step(0.1), one_step(0.05)
    assert math.log2(error / error_half) == pytest.approx(4, abs=0.15)
    assert math.log2(estimate / estimate_half) == pytest.approx(3, abs=0.15)


def test_a_step_by_hand():
    """dz/dl = z over h: the third-order series, and the embedded solution 1 + h + h^2/2 + 3 h^3/16 + h^4/48."""
    z, h = torch.ones(1, 1, 1, 1, dtype=torch.float64), -0.3
    slope = Slope(lambda z, s: torch.zeros_like(z), silent, 100)
    start = torch.zeros(1, dtype=torch.float64)
    new, _, error = bogacki_shampine(slope, z, z, start, start + h)
    assert new.item() == pytest.approx(1 + h + h**2 / 2 + h**3 / 6, rel=1e-12)
    embedded = 1 + h + h**2 / 2 + 3 * h**3 / 16 + h**4 / 48
    assert error.item() == pytest.approx(new.item() - embedded, rel=1e-9)


def run_by_hand(eps, rtol, atol):
    """One sample, with plain numbers: the samples, the number of evaluations and of steps that were not kept."""
    log_s, end = LEVELS[0].log().item(), LEVELS[1].log().item()
    z, length, calls, refused = LEVELS[0] * eps, 0.1, 1, 0

    def f(z, log_s):
        return z - PRIOR.denoise(z, torch.tensor([log_s], dtype=torch.float64).exp())

    k1 = f(z, log_s)
    while log_s > end:
        h = -min(length, log_s - end) if log_s - 1.01 * length > end else end - log_s
        k2 = f(z + h * k1 / 2, log_s + h / 2)
        k3 = f(z + h * 3 * k2 / 4, log_s + 3 * h / 4)
        new = z + h * (2 * k1 + 3 * k2 + 4 * k3) / 9
        k4 = f(new, log_s + h)
        calls += 3
        error = h * (-5 * k1 + 6 * k2 + 8 * k3 - 9 * k4) / 72
        scale = atol + rtol * torch.maximum(z.abs(), new.abs())
        norm = (error / scale).square().mean().sqrt().item()
        if norm <= 1:
            z, k1, log_s = new, k4, end if h == end - log_s else log_s + h
        else:
            refused += 1
        length = -h * min(max(0.9 * norm ** (-1 / 3), 0.2), 5.0)
    return z - k1, calls, refused


def test_steps_are_controlled_as_described():
    refusals = 0
    for seed, tolerance in enumerate([(1e-2, 1e-2), (1e-3, 1e-4), (1e-6, 1e-5), (1e-7, 1e-7)]):
        eps, told = field(1, seed), []
        want, calls, refused = run_by_hand(eps, *tolerance)
        sampler = Adaptive(*tolerance, max_evaluations=3000)
        got = sampler.sample(PRIOR.denoise, LEVELS, lambda eps=eps: eps, progress=told.append)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
        assert len(told) == calls
        refusals += refused
    assert refusals > 0


def test_error_follows_the_tolerance():
    """Third order in the mean: a hundredth of the tolerance costs about 100^(1/3) times the evaluations."""
    eps, errors, counts = field(), [], []
    for tolerance in (1e-3, 1e-5):
        told = []
        x = Adaptive(tolerance, tolerance).sample(PRIOR.denoise, LEVELS, lambda: eps, progress=told.append)
        errors.append((x - exact(eps)).abs().max().item())
        assert set(told) == {1} and len(told) % 3 == 1  # three a step and the first: the last slope is used again
        counts.append(len(told))
    assert errors[0] < 0.05 and errors[1] < 5e-4
    assert 2 < counts[1] / counts[0] < 6


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_both_tolerances_count(name):
    """Where the other one is nothing to speak of."""
    eps, errors = field(), []
    for value in (1e-2, 1e-4):
        loose = {"rtol": 1e-9, "atol": 1e-9, name: value}
        x = Adaptive(**loose, max_evaluations=3000).sample(PRIOR.denoise, LEVELS, lambda: eps)
        errors.append((x - exact(eps)).abs().max().item())
    assert 1e-9 < errors[1] < errors[0] / 10


def test_samples_do_not_depend_on_their_batch():
    """Samples of sizes that differ a thousandfold, which need steps that differ."""
    eps = field() * torch.logspace(-2, 1, 8, dtype=torch.float64).view(-1, 1, 1, 1)
    seen = []

    def denoiser(z, s):
        seen.append(s.clone())
        return PRIOR.denoise(z, s)

    together = Adaptive().sample(denoiser, LEVELS, lambda: eps)
    apart = any(s.max() > 1.01 * s.min() for s in seen)
    alone = torch.cat([Adaptive().sample(PRIOR.denoise, LEVELS, lambda k=k: eps[k : k + 1]) for k in range(8)])
    assert apart
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("land", [1e6, math.nan])
def test_land_is_not_in_the_error(land):
    """Whatever the denoiser says there, and however much of it there is, the levels visited are the same."""
    valid = torch.ones(1, 1, 4, 4, dtype=torch.bool)

    def levels(eps, valid, wild):
        visited, width = [], eps.shape[-1]

        def denoiser(z, s):
            visited.append(s.clone())
            inside = PRIOR.denoise(z[..., :4].contiguous(), s)
            return torch.cat([inside, wild * torch.sin(3 * z[..., 4:])], dim=-1) if width > 4 else inside

        x = Adaptive(1e-4, 1e-4).sample(denoiser, LEVELS, lambda: eps, valid=valid)
        return torch.stack(visited), x[..., :4]

    eps = field(2)
    alone, x = levels(eps, None, 0.0)
    for columns in (1, 12):
        wide = torch.cat([eps, torch.ones(2, 2, 4, columns, dtype=torch.float64)], dim=-1)
        mask = torch.cat([valid, torch.zeros(1, 1, 4, columns, dtype=torch.bool)], dim=-1)
        visited, found = levels(wide, mask, land)
        torch.testing.assert_close(visited, alone, rtol=1e-12, atol=0)
        torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)
    assert len(levels(wide, None, 1.0)[0]) > len(alone)


def test_a_sample_that_has_arrived_stays():
    """Beside one that goes on for long, whatever the denoiser now says of it."""
    eps, last, again = field(2), [None], []

    def denoiser(z, s):
        wild = torch.sin(20 * z[1:])
        arrived = torch.equal(z[0], last[0]) if last[0] is not None else False
        last[0] = z[0].clone()
        again.extend([1] if arrived else [])
        return torch.cat([PRIOR.denoise(z[:1], s[:1]) + float(arrived), wild])

    together = Adaptive(max_evaluations=5000).sample(denoiser, LEVELS, lambda: eps)
    alone = Adaptive().sample(PRIOR.denoise, LEVELS, lambda: eps[:1])
    assert len(again) > 100
    torch.testing.assert_close(together[:1], alone, rtol=1e-10, atol=1e-12)


def test_trajectory_holds_the_states_at_the_three_levels():
    eps, start = field(3), torch.full((3, *PRIOR.shape), 2.0, dtype=torch.float64)

    def moved(z, s):
        return PRIOR.denoise(z - 2, s) + 2

    x, states = Adaptive(1e-6, 1e-6).sample(moved, LEVELS, lambda: eps, start=start, return_trajectory=True)
    assert states.shape == (3, 3, *PRIOR.shape) and torch.equal(states[2], x)
    torch.testing.assert_close(states[0], LEVELS[0] * eps + 2)
    bottom = LEVELS[1].expand(3)
    torch.testing.assert_close(states[1], flow(LEVELS[0] * eps, LEVELS[0].expand(3), bottom) + 2, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x, moved(states[1], bottom))


def test_it_gives_up_with_advice():
    told = []
    with pytest.raises(UserError, match=r"after 20 evaluations: loosen sampler\.rtol="):
        Adaptive(1e-9, 1e-9, max_evaluations=20).sample(PRIOR.denoise, LEVELS, field, progress=told.append)
    assert len(told) == 20
    with pytest.raises(UserError, match="after 50 evaluations"):
        Adaptive(max_evaluations=50).sample(lambda z, s: z * torch.nan, LEVELS, field)


def test_a_step_that_is_not_finite_is_tried_again_a_fifth_as_long():
    eps, log_s = field(1), []

    def denoiser(z, s):
        log_s.append(s.log().item())
        return PRIOR.denoise(z, s) * (math.nan if len(log_s) == 13 else 1.0)

    x = Adaptive(1e-5, 1e-5).sample(denoiser, LEVELS, lambda: eps)
    # Calls 11 to 13 are of one step, from `start` over h; call 14 is the first of the next, half way along it.
    h = 4 * (log_s[10] - log_s[11])
    start = log_s[10] + h / 2
    assert log_s[13] == pytest.approx(start - h / 10)
    assert (x - exact(eps)).abs().max() < 5e-4


def test_it_cannot_know_its_evaluations_and_refuses_a_hook():
    assert Adaptive().evaluations is None and Adaptive().steps == 2
    with pytest.raises(ValueError, match="^hook must be None"):
        Adaptive().sample(PRIOR.denoise, LEVELS, field, hook=lambda z, r: z)
    with pytest.raises(NotImplementedError, match="call sample"):
        Adaptive().step(PRIOR.denoise, field(), 1.0, 0.5, field, {})
    with pytest.raises(ValueError, match="^levels must be steps"):
        Adaptive().sample(PRIOR.denoise, torch.tensor([3.0, 2.0, 1.0, 0.0]), field)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rtol": 0.0}, r"^rtol must be > 0, got 0\.0"),
        ({"atol": -1.0}, r"^atol must be > 0, got -1\.0"),
        ({"rtol": math.nan}, "^rtol must be > 0, got nan"),
        ({"max_evaluations": 3}, "^max_evaluations must be >= 4, got 3"),
    ],
)
def test_what_it_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Adaptive(**arguments)
