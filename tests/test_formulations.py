"""Paths, weights and preconditioning against their published formulas."""

import math

import pytest
import torch
from ideal import FORMULATIONS, Trigonometric

from vecfield_diffusion.config.build import build
from vecfield_diffusion.config.program import option
from vecfield_diffusion.diffusion.base import HEADS, Diffusion, karras, reverse_variances, stratified
from vecfield_diffusion.diffusion.formulations import DDPM, EDM, IDDPM, OU, VE, VP, Flow, Interpolant


class Affine(Diffusion):
    """A preconditioner of a user's: one method, and a sigma that is not t."""

    def sigma(self, t):
        return t**2

    def preconditioning(self, t):
        return 1 / (1 + t), t, 2 * t, 0.5 * torch.ones_like(t)


def times(diffusion):
    """Times over the whole range."""
    s = torch.logspace(math.log10(diffusion.sigma_min), math.log10(diffusion.sigma_max), 200, dtype=torch.float64)
    return diffusion.time(s)


def draw(n=3):
    return torch.randn(n, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FORMULATIONS)
def test_time_inverts_level(name):
    diffusion = FORMULATIONS[name]()
    t = times(diffusion)
    assert (t.diff() > 0).all() and (diffusion.level(t).diff() > 0).all()
    s = torch.logspace(math.log10(diffusion.sigma_min), math.log10(diffusion.sigma_max), 200, dtype=torch.float64)
    torch.testing.assert_close(diffusion.level(t), s, rtol=1e-9, atol=0)
    torch.testing.assert_close(diffusion.sigma(t) / diffusion.alpha(t), diffusion.level(t), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_the_ends_of_the_range_are_the_levels_asked_for(name):
    diffusion = FORMULATIONS[name]()
    assert diffusion.level(torch.tensor(diffusion.t_min, dtype=torch.float64)).item() == diffusion.sigma_min
    expected = {
        "edm": (0.002, 200.0),
        "ve": (0.02, 100.0),
        "ou": (0.002, 80.0),
        "flow": (0.002, 200.0),
        "interpolant": (0.002, 80.0),
    }
    if name in expected:
        assert (diffusion.sigma_min, diffusion.sigma_max) == pytest.approx(expected[name], rel=1e-9)


@pytest.mark.parametrize("prediction", HEADS)
@pytest.mark.parametrize("sd", [1.0, 0.5])
@pytest.mark.parametrize("name", FORMULATIONS)
def test_network_input_and_effective_target_have_unit_variance(name, sd, prediction):
    """Var[c_in x_t] = 1, and Var[(x0 - c_skip x_t) / c_out] = 1, for data of standard deviation sd, at every level."""
    diffusion = FORMULATIONS[name](prediction=prediction, sigma_data=sd)
    t = times(diffusion)
    c_in, _, c_out, c_skip = diffusion.preconditioning(t)
    alpha, sigma = diffusion.alpha(t), diffusion.sigma(t)
    torch.testing.assert_close(c_in**2 * (alpha**2 * sd**2 + sigma**2), torch.ones_like(t))
    target = ((1 - c_skip * alpha) ** 2 * sd**2 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(target, torch.ones_like(t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["ddpm", "cosine", "vp", "ou", "iddpm"])
def test_published_inputs_have_unit_variance_for_data_of_unit_variance(name):
    make = {"ddpm": DDPM, "cosine": lambda: DDPM(schedule="cosine"), "vp": VP, "ou": OU, "iddpm": IDDPM}[name]
    diffusion = make()
    t = times(diffusion)
    variance = diffusion.inputs(t)[0] ** 2 * (diffusion.alpha(t) ** 2 + diffusion.sigma(t) ** 2)
    torch.testing.assert_close(variance, torch.ones_like(t))


@pytest.mark.parametrize("prediction", HEADS)
@pytest.mark.parametrize("name", FORMULATIONS)
def test_the_network_predicts_what_it_is_said_to(name, prediction):
    """D = x0 for F = eps, -eps, x0 / sd and the velocity, whose derivatives come from finite differences here."""
    sd = 0.7
    diffusion = FORMULATIONS[name](prediction=prediction, sigma_data=sd)
    # Levels in the middle, off the corners of the tables, where one difference quotient is a derivative.
    s = torch.logspace(-1, 1, 200, dtype=torch.float64)
    t = diffusion.time(s).floor() + 0.5 if isinstance(diffusion, DDPM) else diffusion.time(s)
    alpha, sigma = diffusion.alpha(t), diffusion.sigma(t)
    x0, eps, _ = draw()
    h = 1e-6 * t
    slopes = [(f(t + h) - f(t - h)) / (2 * h) for f in (diffusion.alpha, diffusion.sigma)]
    speed = (slopes[0] ** 2 * sd**2 + slopes[1] ** 2).sqrt()
    x_t = alpha * x0 + sigma * eps
    variance = alpha**2 * sd**2 + sigma**2
    target = {
        "noise": eps,
        "score": -eps,
        "sample": x0 / sd,
        "velocity": (slopes[0] * x0 + slopes[1] * eps) / speed,
        # The part of x0 that x_t does not tell, for white data: to unit variance.
        "edm": (x0 - alpha * sd**2 / variance * x_t) / (sigma * sd / variance.sqrt()),
    }[prediction]
    _, _, c_out, c_skip = diffusion.preconditioning(t)
    torch.testing.assert_close(c_skip * x_t + c_out * target, x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_velocities_written_out_are_those_of_the_path(name):
    diffusion = FORMULATIONS[name]()
    t = times(diffusion)[1:-1]
    if isinstance(diffusion, DDPM):
        t = t.floor() + 0.5
    by_hand, by_autograd = diffusion.velocity(t), Diffusion.velocity(diffusion, t)
    cross = by_hand[0] * by_autograd[1] - by_hand[1] * by_autograd[0]
    dot = by_hand[0] * by_autograd[0] + by_hand[1] * by_autograd[1]
    assert (cross.abs() < 1e-6 * dot).all()


@pytest.mark.parametrize("name", FORMULATIONS)
def test_loss_is_the_squared_error_of_the_network(name):
    diffusion = FORMULATIONS[name]()
    t = times(diffusion)
    _, target, guess = draw()
    _, _, c_out, c_skip = diffusion.preconditioning(t)
    error = (c_out * guess) - (c_out * target)
    torch.testing.assert_close(diffusion.weight(t) * error**2, (guess - target) ** 2)


def test_published_weights():
    """The x0-loss weights of the literature are the squared error of what the network predicts."""
    s = torch.logspace(-2, 1.5, 50, dtype=torch.float64)

    def weight(diffusion):
        return diffusion.weight(diffusion.time(s))

    for diffusion in (DDPM(), VP(), VE(), IDDPM(), OU()):
        torch.testing.assert_close(weight(diffusion), s**-2, rtol=1e-9, atol=0)
    sd = 0.5
    torch.testing.assert_close(weight(EDM(sigma_data=sd)), (s**2 + sd**2) / (s * sd) ** 2)
    # Velocity v = eps - x0 = (x_t - D) / t: its squared error is (D - x0)^2 / t^2, in units of Var[v] = 2.
    t = s / (1 + s)
    torch.testing.assert_close(weight(Flow()), 1 / t**2 / 2)


def test_published_coefficients():
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    c_in, c_noise, c_out, c_skip = EDM(sigma_data=0.5).preconditioning(sigma)
    torch.testing.assert_close(c_skip, 0.25 / (sigma**2 + 0.25))
    torch.testing.assert_close(c_out, sigma * 0.5 / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(c_in, 1 / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(c_noise, sigma.log() / 4)

    ve = VE()
    c_in, c_noise, c_out, c_skip = ve.preconditioning(ve.time(sigma))
    torch.testing.assert_close(c_noise, (sigma / 2).log())
    torch.testing.assert_close(c_out, sigma)
    assert (c_in == 1).all() and (c_skip == 1).all()

    t = torch.tensor([1e-5, 0.3, 1.0], dtype=torch.float64)
    for diffusion in (VP(), OU()):
        c_in, c_noise, c_out, c_skip = diffusion.preconditioning(t.clamp(max=0.9))
        torch.testing.assert_close(c_noise, 999 * t.clamp(max=0.9))
        torch.testing.assert_close(c_skip, 1 / diffusion.alpha(t.clamp(max=0.9)))
        torch.testing.assert_close(c_out, -diffusion.level(t.clamp(max=0.9)))
        assert (c_in == 1).all()

    t = torch.tensor([0.0, 10.0, 999.0], dtype=torch.float64)
    c_in, c_noise, c_out, c_skip = DDPM().preconditioning(t)
    torch.testing.assert_close(c_skip * DDPM().alpha(t), torch.ones_like(t))
    assert (c_in == 1).all() and (c_noise == t).all()


def test_iddpm_is_that_of_its_table():
    """u_j by the recursion, and the label M - 1 - argmin_j |sigma - u_j| by looking at all of them."""
    u = [0.0]
    for j in range(1000, 0, -1):
        here, below = (math.sin(math.pi / 2 * i / (1000 * 1.008)) ** 2 for i in (j, j - 1))
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(below / here, 0.001) - 1))
    u = torch.tensor(u[::-1], dtype=torch.float64)
    iddpm = IDDPM(j_0=8)
    assert (iddpm.sigma_min, iddpm.sigma_max) == pytest.approx((u[999].item(), u[8].item()))
    assert iddpm.sigma_max == pytest.approx(80, rel=0.01)  # as published
    sigma = torch.logspace(-3, 3, 500, dtype=torch.float64)
    c_in, c_noise, c_out, c_skip = iddpm.preconditioning(sigma)
    expected = 999 - (sigma[:, None] - u[None, :1000]).abs().argmin(dim=1)
    assert (c_noise == expected).all()
    torch.testing.assert_close(c_in, (sigma**2 + 1).rsqrt())
    torch.testing.assert_close(c_out, -sigma)
    assert (c_skip == 1).all()
    used = u[8:1000]
    drawn = iddpm.sample_times(9920, torch.Generator().manual_seed(0))
    assert (drawn.sort(descending=True).values == used.repeat_interleave(10)).all()
    levels = iddpm.levels(5)
    places = [8 + math.floor((999 - 8) / 4 * i + 0.5) for i in range(5)]
    torch.testing.assert_close(levels[:-1], u[places], rtol=1e-12, atol=0)
    torch.testing.assert_close(iddpm.below(used[:-1]), used[1:], rtol=0, atol=0)
    assert iddpm.below(used[-1:]).item() == used[-1].item() / 2


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_schedule_is_the_running_product_of_one_minus_beta(schedule):
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    product, abar = 1.0, []
    for j in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * j / 999 if schedule == "linear" else min(1 - f(j + 1) / f(j), 0.999)
        product *= 1 - beta
        abar.append(product)
    abar, t = torch.tensor(abar, dtype=torch.float64), torch.arange(1000, dtype=torch.float64)
    ddpm = DDPM(schedule=schedule)
    torch.testing.assert_close(ddpm.alpha(t), abar.sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(ddpm.sigma(t), (1 - abar).sqrt(), rtol=1e-9, atol=0)
    assert ddpm.sigma_max == pytest.approx(((1 - abar[-1]) / abar[-1]).sqrt().item(), rel=1e-9)


def test_vp_is_the_integral_of_beta():
    """alpha = exp(-1/2 int_0^t beta), by the trapezoidal rule, which is exact for a straight line."""
    vp, t = VP(), torch.linspace(0, 1, 1001, dtype=torch.float64)
    beta = 0.1 + 19.9 * t
    area = torch.cat([torch.zeros(1), ((beta[1:] + beta[:-1]) / 2 * t.diff()).cumsum(0)])
    torch.testing.assert_close(vp.alpha(t), torch.exp(-area / 2), rtol=1e-9, atol=0)
    torch.testing.assert_close(vp.sigma(t) ** 2 + vp.alpha(t) ** 2, torch.ones_like(t))


def test_interpolant_passes_through_the_field_and_the_guess():
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    interpolant = Interpolant(gamma=1.5)
    torch.testing.assert_close(interpolant.alpha(t), 1 - t)
    torch.testing.assert_close(interpolant.sigma(t), 1.5 * (t * (1 - t)).sqrt())


@pytest.mark.parametrize("grid", ["native", "karras", "log_snr", "uniform_t"])
@pytest.mark.parametrize("name", FORMULATIONS)
@pytest.mark.parametrize("steps", [1, 2, 7, 32])
def test_levels_fall_from_the_top_to_zero(name, steps, grid):
    diffusion = FORMULATIONS[name]()
    levels = diffusion.levels(steps, grid)
    assert levels.shape == (steps + 1,) and levels.dtype == torch.float64
    assert levels[0].item() == pytest.approx(diffusion.sigma_max)
    assert levels[-1] == 0 and (levels.diff() < 0).all()
    lowest = diffusion.level(torch.tensor(1e-3, dtype=torch.float64)) if (name, grid) == ("vp", "native") else None
    if steps > 1:
        assert levels[-2].item() == pytest.approx(diffusion.sigma_min if lowest is None else lowest.item())


def test_grids_by_hand():
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    torch.testing.assert_close(karras(0.002, 80.0, 3, 7.0), torch.tensor([80.0, middle, 0.002, 0.0]).double())
    torch.testing.assert_close(EDM().levels(3), torch.tensor([80.0, middle, 0.002, 0.0]).double())
    geometric = torch.tensor([80.0, 0.4, 0.002, 0.0], dtype=torch.float64)
    torch.testing.assert_close(Flow().levels(3, "log_snr"), geometric)
    torch.testing.assert_close(OU().levels(3), geometric)
    torch.testing.assert_close(Interpolant().levels(3), geometric)
    flow = Flow()
    t = torch.linspace(80 / 81, 0.002 / 1.002, 9, dtype=torch.float64)
    for grid in ("native", "uniform_t"):
        torch.testing.assert_close(flow.levels(9, grid)[:-1], t / (1 - t))
    # VE's time is the logarithm of the level: its own grid is the geometric one.
    torch.testing.assert_close(VE().levels(9), VE().levels(9, "log_snr"))
    t = DDPM().time(DDPM().levels(10)[:-1])
    torch.testing.assert_close(t, t.round(), rtol=0, atol=1e-6)


def test_training_times_follow_their_law():
    generator = torch.Generator().manual_seed(0)
    log_s = EDM(sigma_min=0.01, sigma_max=100.0).sample_times(100_000, generator).log()
    low, high = math.log(0.01), math.log(100.0)
    assert low <= log_s.min() and log_s.max() <= high
    assert log_s.mean().item() == pytest.approx((low + high) / 2, abs=1e-3)
    assert log_s.var().item() == pytest.approx((high - low) ** 2 / 12, rel=1e-3)
    log_s = EDM(noise="log_normal", sigma_max=1e4).sample_times(100_000, generator).log()
    assert log_s.mean().item() == pytest.approx(-1.2, abs=2e-3) and log_s.std().item() == pytest.approx(1.2, rel=2e-3)
    assert torch.bincount(DDPM().sample_times(10_000, generator).long(), minlength=1000).eq(10).all()
    t = Flow(sigma_max=1e4, sigma_min=1e-4).sample_times(100_000, generator)
    assert (t.mean().item(), t.var().item()) == pytest.approx((0.5, 1 / 12), rel=1e-3)
    t = Flow(times="logit_normal", logit_mean=0.5, logit_std=0.8, sigma_max=1e4).sample_times(100_000, generator)
    logit = torch.logit(t)
    assert (logit.mean().item(), logit.std().item()) == pytest.approx((0.5, 0.8), abs=2e-3)
    for diffusion in (VP(), OU(), VE(), Interpolant()):
        t = diffusion.sample_times(100_000, generator)
        ends = diffusion.t_min, diffusion.t_max
        assert ends[0] <= t.min() and t.max() <= ends[1]
        assert t.mean().item() == pytest.approx(sum(ends) / 2, abs=1e-4)
        assert t.var().item() == pytest.approx((ends[1] - ends[0]) ** 2 / 12, rel=1e-3)


def cut(mean, std, low, high):
    """Mean and standard deviation of a normal law cut to [low, high]."""
    normal = torch.distributions.Normal(0.0, 1.0)
    a, b = (torch.tensor((end - mean) / std) for end in (low, high))
    mass = normal.cdf(b) - normal.cdf(a)
    first = (normal.log_prob(a).exp() - normal.log_prob(b).exp()) / mass
    second = (a * normal.log_prob(a).exp() - b * normal.log_prob(b).exp()) / mass
    return (mean + std * first).item(), (std * (1 + second - first**2).sqrt()).item()


def test_laws_are_cut_to_the_range_of_the_levels():
    generator = torch.Generator().manual_seed(0)
    ends = math.log(0.5), math.log(4.0)
    edm = EDM(sigma_min=0.5, sigma_max=4.0, noise="log_normal", P_mean=0.2, P_std=1.5)
    flow = Flow(sigma_min=0.5, sigma_max=4.0, times="logit_normal", logit_mean=0.2, logit_std=1.5)
    for diffusion in (edm, flow):
        log_s = diffusion.level(diffusion.sample_times(100_000, generator)).log()
        assert ends[0] - 1e-9 <= log_s.min() and log_s.max() <= ends[1] + 1e-9
        assert (log_s.mean().item(), log_s.std().item()) == pytest.approx(cut(0.2, 1.5, *ends), rel=1e-3)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_the_default_sampler_keeps_the_energy(name):
    """DPM-Solver++(2M) as it is shipped, per eigenvalue of a field whose noise range is that of the formulation."""
    diffusion = FORMULATIONS[name]()
    sampler = build(option("sampler", "dpmpp_2m"), "sampler", trusted=True)
    eigenvalues = torch.logspace(-4, 2, 40, dtype=torch.float64) * min(diffusion.sigma_max / 10, 5) ** 2 / 100
    field = eigenvalues.view(1, 1, 1, -1)
    x = sampler.sample(
        lambda z, s: z * field / (field + s[0] ** 2),
        diffusion.levels(sampler.steps, sampler.schedule),
        lambda: torch.ones_like(field),
    )
    kept = x.square().sum() / eigenvalues.sum()
    assert 0.98 <= kept <= 1.03


def test_stratified_has_one_number_in_each_part():
    u = stratified(50, torch.Generator().manual_seed(1))
    assert sorted((u * 50).long().tolist()) == list(range(50))
    assert u.tolist() != sorted(u.tolist())


def test_levels_beyond_the_range_stay_finite():
    """Churn looks above the top of the path."""
    for name, make in FORMULATIONS.items():
        diffusion = make()
        s = torch.tensor([0.1 * diffusion.sigma_min, 1.5 * diffusion.sigma_max], dtype=torch.float64)
        t = diffusion.time(s)
        values = torch.stack([diffusion.alpha(t), *diffusion.preconditioning(t)])
        assert values.isfinite().all(), name


def test_a_path_of_two_functions_is_complete():
    """Alpha = cos, sigma = sin: v prediction is that of Salimans & Ho, cos eps - sin x0."""
    path = Trigonometric(t_min=0.01, t_max=0.99, prediction="velocity")
    assert path.sigma_max == pytest.approx(math.tan(math.pi / 2 * 0.99))
    t = torch.linspace(0.01, 0.99, 200, dtype=torch.float64)
    x0, eps, _ = draw()
    angle = math.pi / 2 * t
    v = angle.cos() * eps - angle.sin() * x0
    _, _, c_out, c_skip = path.preconditioning(t)
    x_t = angle.cos() * x0 + angle.sin() * eps
    torch.testing.assert_close(c_skip * x_t + c_out * v, x0)


def test_a_preconditioner_of_a_users_own_is_used_as_it_is():
    affine = Affine(t_min=0.1, t_max=4.0)
    t = torch.tensor([0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(affine.time(t**2), t)
    torch.testing.assert_close(affine.weight(t), 1 / (2 * t) ** 2)
    assert affine.sigma_max == 16.0 and affine.levels(4)[0] == 16.0


def test_reverse_variances_are_those_of_gaussian_data():
    """Var[z_r | z_s] for data of variance c: z_r = x + r e, z_s = z_r + sqrt(s^2 - r^2) e'."""
    s, r = torch.tensor([3.0, 1.0, 0.1]).double(), torch.tensor([2.0, 0.1, 0.05]).double()
    for c, variance in zip((0.0, 1.0), reverse_variances(s, r), strict=True):
        torch.testing.assert_close(variance, (c + r**2) - (c + r**2) ** 2 / (c + s**2))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), "sigma_min must be above 0 and below sigma_max"),
        (lambda: EDM(sigma_max="auto"), "sigma_max must be a number"),
        (lambda: EDM(rho=0.0), "rho must be > 0"),
        (lambda: EDM(sigma_data=0.0), "sigma_data must be > 0"),
        (lambda: EDM(prediction="eps"), "prediction must be one of noise"),
        (lambda: DDPM(beta_max=2.0), "beta_max below 1"),
        (lambda: DDPM(T=1), "T must be >= 2"),
        (lambda: DDPM(T=10).levels(11), "steps must be <= T=10"),
        (lambda: IDDPM(M=10, j_0=2).levels(9), "steps must be <= 8"),
        (lambda: IDDPM(j_0=999), "j_0 must be in"),
        (lambda: IDDPM(C_1=0.0), "C_1 must be in"),
        (lambda: IDDPM(vlb_weight=-1.0), "vlb_weight must be >= 0"),
        (lambda: VP(eps_t=0.0), "eps_t must be in"),
        (lambda: VP(eps_s=2.0), "eps_s must be in"),
        (lambda: VP(beta_d=0.0), "beta_d must be > 0"),
        (lambda: Flow(logit_std=0.0), "logit_std must be > 0"),
        (lambda: Interpolant(gamma=0.0), "gamma must be > 0"),
        (lambda: EDM(noise="log_normal", P_mean=50.0), "P_mean must lie near the range"),
        (lambda: Flow(times="logit_normal", logit_mean=-60.0), "logit_mean must lie near the range"),
        (lambda: EDM().levels(4, "Karras"), "schedule must be one of"),
        (lambda: Trigonometric(t_min=0.5, t_max=0.1), "t_min must be below t_max"),
        (lambda: Trigonometric(t_max=1.5).time(torch.ones(1)), "rise with t"),
    ],
)
def test_what_makes_no_sense_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
