"""What every sampler shares, and the deterministic ones on the exact denoiser of a Gaussian field.

Orders of convergence, energy, published algorithms written out by hand, counts, independence of the batch.
"""

import math

import pytest
import torch
from oracle import GaussianPrior
from torch.utils._python_dispatch import TorchDispatchMode

from vecfield_diffusion.diffusion.base import karras
from vecfield_diffusion.diffusion.formulations import DDPM, EDM
from vecfield_diffusion.samplers.deterministic import DPMpp2M, Euler, Heun, Midpoint
from vecfield_diffusion.samplers.stochastic import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    HeunSDE,
    Langevin,
    PredictorCorrector,
)

PRIOR = GaussianPrior()
S_MAX = 10 * PRIOR.eigenvalues.max().sqrt().item()

#: Every sampler that walks given levels, as a function of the number of steps.
EVERY = {
    "euler": Euler,
    "heun": Heun,
    "churn": lambda steps: Heun(steps, S_churn=4.0, S_max=50.0, S_noise=1.01),
    "midpoint": Midpoint,
    "dpmpp_2m": DPMpp2M,
    "ddim": lambda steps: DDIM(steps, eta=0.5),
    "ddpm": Ancestral,
    "ddpm_large": lambda steps: Ancestral(steps, variance="large"),
    "ddpm_learned": lambda steps: Ancestral(steps, variance="learned"),
    "euler_maruyama": EulerMaruyama,
    "heun_sde": HeunSDE,
    "predictor_corrector": lambda steps: PredictorCorrector(steps, corrector_steps=2),
    "langevin": lambda steps: Langevin(steps, corrections=3),
}
EVALUATIONS = {
    "heun": lambda n: 2 * n - 1,
    "churn": lambda n: 2 * n - 1,
    "midpoint": lambda n: 2 * n,
    "heun_sde": lambda n: 2 * n - 1,
    "predictor_corrector": lambda n: n + 2 * (n - 1),
    "langevin": lambda n: 3 * n + 1,
}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


class Learned:
    """The exact denoiser with a fraction of the variance that differs from cell to cell."""

    def __call__(self, z, s):
        return PRIOR.denoise(z, s)

    def moments(self, z, s):
        return self(z, s), torch.sigmoid(z)


def unit_noise(samples=1, seed=0, dtype=torch.float64):
    """A noise function; sample k of any batch has a stream of its own."""
    generators = [torch.Generator().manual_seed(100 * seed + k) for k in range(samples)]
    return lambda: torch.stack([torch.randn(PRIOR.shape, dtype=dtype, generator=g) for g in generators])


def affine_map(sampler, levels, denoiser=PRIOR.denoise):
    """The matrix that takes unit noise to samples, `(d, d)`, from one run on all unit vectors."""
    basis = torch.eye(PRIOR.size, dtype=torch.float64).view(-1, *PRIOR.shape)
    return sampler.sample(lambda z, s: denoiser(z, s), levels, lambda: basis).flatten(1)


def exact_map(levels):
    """The matrix of the probability-flow ODE to 0: s_max sqrt(lambda / (lambda + s_max^2)) per eigenvector."""
    top = levels[0].item()
    gain = top * (PRIOR.eigenvalues / (PRIOR.eigenvalues + top**2)).sqrt()
    return PRIOR.vectors * gain @ PRIOR.vectors.T


def slope(sampler, steps=(64, 128, 256)):
    """The order of convergence towards the exact ODE, on a grid that is geometric down to a small level."""
    errors = []
    for n in steps:
        levels = torch.logspace(math.log10(S_MAX), -4, n + 1, dtype=torch.float64)
        levels[-1] = 0
        errors.append((affine_map(sampler(n), levels) - exact_map(levels)).norm().item())
    return math.log2(errors[-2] / errors[-1])


ORDERS = pytest.mark.parametrize(
    ("sampler", "low", "high"), [(Euler, 0.9, 1.05), (Heun, 1.9, 2.2), (Midpoint, 1.9, 2.2), (DPMpp2M, 1.9, 2.2)]
)


@ORDERS
def test_order_of_convergence(sampler, low, high):
    """The midpoint in s happens to gain an order where D is linear in z."""
    assert low < slope(sampler) < (3.2 if sampler is Midpoint else high)


@ORDERS
def test_order_of_convergence_where_the_denoiser_is_not_linear(sampler, low, high):
    """Data of two clusters, N(-1, v) and N(1, v), against 16 times as many steps of Heun."""
    v = 0.1

    def denoise(z, s):
        level = s.view(-1, 1, 1, 1) ** 2
        centre = torch.tanh(z / (v + level))
        return centre + v / (v + level) * (z - centre)

    z = torch.linspace(-2, 2, 33, dtype=torch.float64).view(-1, 1, 1, 1)

    def run(sampler, n):
        return sampler(n).sample(denoise, torch.logspace(1, -2, n + 1, dtype=torch.float64), lambda: z)

    exact = run(Heun, 4096)
    errors = [(run(sampler, n) - exact).norm().item() for n in (128, 256)]
    assert low < math.log2(errors[0] / errors[1]) < high


@pytest.mark.parametrize("diffusion", [EDM(sigma_max=S_MAX), DDPM()])
@pytest.mark.parametrize("sampler", [Euler(256), Heun(64), Midpoint(64), DPMpp2M(64)])
def test_covariance_of_samples_is_that_of_the_prior(diffusion, sampler):
    levels = karras(diffusion.sigma_min, diffusion.sigma_max, sampler.steps)
    a = affine_map(sampler, levels)
    error = (a.T @ a - PRIOR.covariance).norm() / PRIOR.covariance.norm()
    assert error < 0.03


def test_energy_is_kept_with_the_noise_that_the_data_ask_for_and_lost_with_less():
    """On a 64x64 field with E ~ k^-3, per eigenvalue: the exact ODE keeps s^2 / (lambda + s^2) of each."""
    ky = torch.fft.fftfreq(64, 1 / 64, dtype=torch.float64)[:, None]
    k = (ky**2 + torch.fft.fftfreq(64, 1 / 64, dtype=torch.float64)[None, :] ** 2).sqrt()
    energy = torch.where(k > 0, k.clamp(min=1) ** -4, 0.0).flatten()
    eigenvalues = energy / energy.sum() * 2 * 64**2

    def kept(s_max, steps=128):
        z = torch.full_like(eigenvalues, s_max)
        levels = karras(0.002, s_max, steps)
        x = DPMpp2M(steps).sample(
            lambda z, s: z * eigenvalues.view(1, 1, 64, 64) / (eigenvalues.view(1, 1, 64, 64) + s[0] ** 2),
            levels,
            lambda: (z / s_max).view(1, 1, 64, 64),
        )
        return (x.square().sum() / eigenvalues.sum()).item()

    assert kept(10 * eigenvalues.max().sqrt().item()) >= 0.98
    assert kept(80.0) <= 0.90


def test_second_order_steps_by_hand():
    """One step of Heun and two of 2M against the formulas, on a denoiser that is D = z / (1 + s^2)."""
    z0 = torch.tensor([[1.5]], dtype=torch.float64).view(1, 1, 1, 1)
    levels = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)

    def d(z, s):
        return z / (1 + s**2)

    z = 4 * 1.5
    slope_s = (z - d(z, 4)) / 4
    euler = z - 2 * slope_s
    heun = z - 2 * (slope_s + (euler - d(euler, 2)) / 2) / 2
    got = Heun(3).step(lambda z, s: d(z, s), 4 * z0, 4.0, 2.0, lambda: z0, {})
    assert got.item() == pytest.approx(heun)

    first = 0.5 * z + 0.5 * d(z, 4)
    estimate = 1.5 * d(first, 2) - 0.5 * d(z, 4)
    second = 0.5 * first + 0.5 * estimate
    got = DPMpp2M(3).sample(lambda z, s: z / (1 + s**2).view(-1, 1, 1, 1), levels, lambda: z0)
    assert got.item() == pytest.approx(d(second, 1))


def heun_by_hand(denoise, z, levels, noise, S_churn, S_min, S_max, S_noise):
    """Algorithm 2 of Karras et al. (NeurIPS 2022), line by line."""
    n = len(levels) - 1
    for i in range(n):
        t, t_next = levels[i].item(), levels[i + 1].item()
        gamma = min(S_churn / n, math.sqrt(2) - 1) if S_min <= t <= S_max else 0.0
        t_hat = t + gamma * t
        if gamma > 0:
            z = z + math.sqrt(t_hat**2 - t**2) * S_noise * noise()
        d = (z - denoise(z, t_hat)) / t_hat
        z_next = z + (t_next - t_hat) * d
        if t_next != 0:
            d_next = (z_next - denoise(z_next, t_next)) / t_next
            z_next = z + (t_next - t_hat) * (d / 2 + d_next / 2)
        z = z_next
    return z


def at_level(z, s):
    return PRIOR.denoise(z, torch.full((len(z),), s, dtype=z.dtype))


@pytest.mark.parametrize(
    "churn",
    [
        {"S_churn": 0.0, "S_min": 0.0, "S_max": math.inf, "S_noise": 1.0},
        {"S_churn": 3.0, "S_min": 0.05, "S_max": 20.0, "S_noise": 1.1},
        {"S_churn": 40.0, "S_min": 0.0, "S_max": math.inf, "S_noise": 1.003},
    ],
)
def test_heun_is_algorithm_2_over_a_whole_run(churn):
    """With the same noise: no churn, some of it between two levels, as much as sqrt(2) - 1 allows."""
    levels, noise = karras(0.002, 80.0, 12), unit_noise(3)
    want = heun_by_hand(at_level, 80 * noise(), levels, noise, **churn)
    got = Heun(12, **churn).sample(PRIOR.denoise, levels, unit_noise(3))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_midpoint_is_algorithm_3_over_a_whole_run():
    """Of Karras et al. (NeurIPS 2022), appendix, with alpha = 1 / 2."""
    levels, alpha = karras(0.002, 80.0, 12), 0.5
    z = 80 * unit_noise(3)()
    for t, t_next in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        h = t_next - t
        d = (z - at_level(z, t)) / t
        between, t_between = z + alpha * h * d, t + alpha * h
        d_between = (between - at_level(between, t_between)) / t_between
        z = z + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_between)
    got = Midpoint(12).sample(PRIOR.denoise, levels, unit_noise(3))
    torch.testing.assert_close(got, z, rtol=1e-9, atol=1e-9)


def test_dpmpp_2m_is_algorithm_2_in_the_variables_of_a_variance_preserving_path():
    """Of Lu et al. (2022): x_t = alpha_t x0 + sigma_t eps, lambda = ln(alpha / sigma); the last step returns D."""
    levels = karras(0.002, 80.0, 12)
    alpha = (1 + levels**2).rsqrt()
    sigma, lam = alpha * levels, -levels.log()

    def data(x, i):
        return at_level(x / alpha[i], levels[i].item())

    x = sigma[0] * unit_noise(3)()
    estimate, h_before = data(x, 0), None
    before = estimate
    for i in range(1, 12):
        h = lam[i] - lam[i - 1]
        if h_before is not None:
            now = data(x, i - 1)
            r = h_before / h
            estimate, before = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before, now
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * ((-h).exp() - 1) * estimate
        h_before = h
    got = DPMpp2M(12).sample(PRIOR.denoise, levels, unit_noise(3))
    torch.testing.assert_close(got, data(x, 11), rtol=1e-9, atol=1e-9)


def test_euler_is_that_of_flow_matching():
    """x_t = (1 - t) x0 + t eps moves with the velocity eps - x0, estimated by (x_t - D) / t; s = t / (1 - t)."""
    t = torch.linspace(0.99, 0, 13, dtype=torch.float64)
    levels = t / (1 - t)
    x = t[0] * unit_noise(3)()
    for now, then in zip(t[:-1].tolist(), t[1:].tolist(), strict=True):
        x = x + (then - now) * (x - at_level(x / (1 - now), now / (1 - now))) / now
    got = Euler(12).sample(PRIOR.denoise, levels, unit_noise(3))
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


# What every sampler shares.


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", EVERY)
def test_evaluations_are_counted_exactly(name, steps):
    counts = []
    sampler = EVERY[name](steps)
    x = sampler.sample(Learned(), karras(0.01, 10.0, 5)[5 - steps :], unit_noise(2), progress=counts.append)
    assert counts == [1] * sampler.evaluations
    assert sampler.evaluations == EVALUATIONS.get(name, lambda n: n)(steps)
    assert x.isfinite().all()


@every
def test_samples_do_not_depend_on_their_batch(make):
    levels = karras(0.01, 30.0, 6)
    together = make(6).sample(Learned(), levels, unit_noise(8))
    for k in range(8):
        generator = torch.Generator().manual_seed(k)

        def noise(generator=generator):
            return torch.randn(1, *PRIOR.shape, dtype=torch.float64, generator=generator)

        torch.testing.assert_close(make(6).sample(Learned(), levels, noise)[0], together[k], rtol=1e-9, atol=1e-9)


@every
def test_trajectory_is_the_run_and_holds_a_state_a_level(make):
    levels = karras(0.01, 30.0, 6)
    x = make(6).sample(Learned(), levels, unit_noise(2))
    seen = []

    def hook(z, r):
        seen.append(z.clone())
        return z

    samples, states = make(6).sample(Learned(), levels, unit_noise(2), hook, return_trajectory=True)
    assert states.shape == (7, 2, *PRIOR.shape)
    assert torch.equal(states[0], levels[0] * unit_noise(2)()) and torch.equal(states[-1], samples)
    assert torch.equal(samples, x) and torch.equal(states[1:], torch.stack(seen))


@every
def test_start_shifts_the_first_state(make):
    """A prior that is moved by m, with its first state moved by m, gives samples moved by m."""
    levels, m = karras(0.01, 30.0, 6), torch.linspace(-2, 3, PRIOR.size, dtype=torch.float64).view(1, *PRIOR.shape)

    class Moved(Learned):
        def __call__(self, z, s):
            return PRIOR.denoise(z - m, s) + m

        def moments(self, z, s):
            return self(z, s), torch.sigmoid(z - m)

    moved = make(6).sample(Moved(), levels, unit_noise(2), start=m.expand(2, -1, -1, -1))
    torch.testing.assert_close(moved, make(6).sample(Learned(), levels, unit_noise(2)) + m)


@every
def test_nothing_that_others_hold_is_changed(make):
    """Neither what the denoiser was given and returned, nor the noise, nor the start."""
    held = []

    def keep(*tensors):
        held.extend((tensor, tensor.clone()) for tensor in tensors)
        return tensors

    class Keeping(Learned):
        def __call__(self, z, s):
            return keep(z, PRIOR.denoise(z, s))[1]

        def moments(self, z, s):
            return keep(self(z, s), torch.sigmoid(z))

    draw = unit_noise(2)
    (start,) = keep(torch.ones(2, *PRIOR.shape, dtype=torch.float64))
    make(4).sample(Keeping(), karras(0.01, 30.0, 4), lambda: keep(draw())[0], start=start)
    assert len(held) > 8 and all(torch.equal(tensor, copy) for tensor, copy in held)


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **kwargs or {})


@every
def test_no_step_waits_for_the_device(make):
    levels, eps = karras(0.01, 30.0, 6), unit_noise(2)()
    with Waits() as waits:
        assert bool(eps.any()) and waits.count == 1  # the counter counts
        make(6).sample(Learned(), levels, lambda: eps)
    assert waits.count == 1


@every
def test_type_of_the_noise_is_kept(make):
    levels = karras(0.01, 30.0, 6)
    denoiser = Learned()
    exact = make(6).sample(denoiser, levels, lambda: unit_noise(2)().float().double())

    class Single(Learned):
        def __call__(self, z, s):
            assert z.dtype == s.dtype == torch.float32
            return PRIOR.denoise(z.double(), s.double()).float()

    single = make(6).sample(Single(), levels, lambda: unit_noise(2)().float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("diffusion", [EDM(), DDPM()])
@every
def test_samples_stay_finite_on_every_path(make, diffusion):
    """Above the top of the path, too, where the first step of a sampler with churn looks."""

    class ThroughTime(Learned):
        def __call__(self, z, s):
            t = diffusion.time(s)
            alpha, sigma = (f(t)[:, None, None, None] for f in (diffusion.alpha, diffusion.sigma))
            x_t = alpha * z
            return PRIOR.denoise(x_t / alpha, (sigma / alpha).flatten())

    levels = karras(diffusion.sigma_min, diffusion.sigma_max, 10)
    noise = torch.ones(1, *PRIOR.shape, dtype=torch.float64)
    out = make(10).sample(ThroughTime(), levels, lambda: noise)
    assert out.isfinite().all() and out.abs().max() < 100


def test_hook_sees_every_level_after_the_first_and_changes_the_state():
    seen = []
    levels = karras(0.01, 10.0, 4)

    def hook(z, r):
        seen.append(r)
        return torch.full_like(z, r)

    assert (Euler(4).sample(PRIOR.denoise, levels, unit_noise(), hook) == 0).all()
    assert seen == levels[1:].tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Euler(0), "^steps must be >= 1, got 0"),
        (lambda: Euler(4, "karas"), "^schedule must be one of native, karras, log_snr, uniform_t, got karas"),
        (lambda: Heun(S_churn=-1.0), r"^S_churn must be >= 0, got -1\.0"),
        (lambda: Heun(S_noise=-1.0), r"^S_noise must be >= 0, got -1\.0"),
    ],
)
def test_what_a_sampler_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "levels", [[3.0, 1.0, 0.0], [3.0, 1.0, 0.5, 0.1, 0.0], [1.0, 3.0, 2.0, 0.0], [3.0, 1.0, 0, -1]]
)
def test_levels_must_fit_the_steps_and_fall(levels):
    with pytest.raises(ValueError, match="^levels must"):
        Euler(3).sample(PRIOR.denoise, torch.tensor(levels), unit_noise())


@pytest.mark.parametrize("make", [Euler, Heun, Midpoint, DPMpp2M])
def test_schedule_is_remembered(make):
    by_default = "log_snr" if make is DPMpp2M else "native"
    assert (make(4, schedule="karras").schedule, make(4).schedule) == ("karras", by_default)
