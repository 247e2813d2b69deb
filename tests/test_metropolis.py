"""Samplers that decide by densities: what they leave as it is, how often they accept, what they do not depend on.

Means over n independent draws are compared within four of their standard errors, which the law gives beforehand.
"""

import math

import pytest
import torch

from vecfield_diffusion.samplers.base import LevelDenoiser, line_integral
from vecfield_diffusion.samplers.exchange import ReplicaExchange
from vecfield_diffusion.samplers.metropolis import (
    MALA,
    CrankNicolson,
    CrankNicolsonMove,
    LangevinMove,
    Place,
    State,
    White,
    uniform,
)
from vecfield_diffusion.samplers.record import Record, autocorrelation_time
from vecfield_diffusion.samplers.stochastic import langevin
from vecfield_diffusion.samplers.tempered import FeynmanKac

MANY = 40_000


class Mixture:
    """w N(-a, v) + (1 - w) N(a, v) in every direction of fields `(B, *shape)`, with its energy or without."""

    def __init__(self, w=0.3, a=1.0, v=0.04, has_energy=False):
        self.logs = torch.tensor([w, 1 - w], dtype=torch.float64).log()
        self.a, self.v, self.has_energy = a, v, has_energy
        self.centres = torch.tensor([-a, a], dtype=torch.float64)

    def parts(self, z, s):
        variance = (self.v + s**2)[:, None]
        away = z.flatten(1)[:, None] - self.centres[:, None]
        size = away.shape[2]
        logs = self.logs - away.square().sum(2) / (2 * variance) - size / 2 * (2 * math.pi * variance).log()
        return away, variance, logs

    def __call__(self, z, s):
        away, variance, logs = self.parts(z, s)
        estimates = self.centres[:, None] + self.v / variance[..., None] * away
        return (torch.softmax(logs, 1)[..., None] * estimates).sum(1).view_as(z)

    def energy(self, z, s):
        return -torch.logsumexp(self.parts(z, s)[2], 1)

    def draw(self, n, s, generator):
        left = torch.rand(n, generator=generator, dtype=torch.float64) < self.logs[0].exp()
        centre = torch.where(left, -self.a, self.a).view(-1, 1, 1, 1)
        return centre + math.sqrt(self.v + s**2) * randn(n, generator)


def randn(n, generator, shape=(1, 1, 1)):
    return torch.randn(n, *shape, dtype=torch.float64, generator=generator)


def drawn(n, seed=0, shape=(1, 1, 1)):
    generator = torch.Generator().manual_seed(seed)
    return lambda: randn(n, generator, shape)


def gaussian(v):
    def denoise(z, s):
        return v / (v + s.view(-1, 1, 1, 1) ** 2) * z

    return denoise


def levels(n, top=10.0, low=0.02):
    return torch.cat([torch.logspace(math.log10(top), math.log10(low), n), torch.zeros(1)]).double()


# The ratio of densities.


@pytest.mark.parametrize("has_energy", [True, False])
def test_log_ratio_is_that_of_the_densities_without_their_constant(has_energy):
    mixture = Mixture(has_energy=has_energy)
    z, new = torch.tensor([0.1, -0.4, 1.2]).double(), torch.tensor([0.3, -0.3, 1.0]).double()
    z, new, s = z.view(-1, 1, 1, 1), new.view(-1, 1, 1, 1), torch.full((3,), 0.7, dtype=torch.float64)
    exact = mixture.energy(z, s) - mixture.energy(new, s)
    counts = []
    got = LevelDenoiser(mixture, counts.append).log_ratio(z, new, 0.7)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12 if has_energy else 1e-5)
    assert sum(counts) == 2


def test_the_line_integral_is_exact_for_gaussian_data_and_sums_in_float64():
    v = torch.logspace(1, -3, 6).view(1, 2, 1, 3)
    z, new = (drawn(5, seed, (2, 1, 3))() for seed in (0, 1))
    exact = ((z.square() - new.square()) / (v + 0.3**2)).sum((1, 2, 3)).double() / 2
    work = line_integral(lambda z, s: v / (v + s**2) * z, z, new, 0.3)
    torch.testing.assert_close(work, exact, rtol=1e-6, atol=0)
    assert line_integral(lambda z, s: z.float(), z.float(), new.float(), 0.3).dtype == torch.float64


# Steps leave the tempered law of a level as it is, whatever their size.

MOVES = {
    "mala": lambda: LangevinMove(1.2),
    "pcn": lambda: CrankNicolsonMove(0.7, White()),
}


def moved(move, denoiser, z, s, T, steps, seed=9):
    noise = drawn(len(z), seed)
    place, record = Place(LevelDenoiser(denoiser), s, T, None), Record()
    state = move.begin(place, z)
    for _ in range(steps):
        state = move(place, state, lambda: math.sqrt(T) * noise(), record)
    return state, record


@pytest.mark.parametrize("has_energy", [True, False])
@pytest.mark.parametrize("name", MOVES)
def test_a_mixture_stays_as_it_is(name, has_energy):
    mixture, s = Mixture(v=0.3, has_energy=has_energy), 0.5
    z = mixture.draw(MANY, s, torch.Generator().manual_seed(3))
    state, record = moved(MOVES[name](), mixture, z, s, 1.0, 6)
    assert 0.3 < record.numbers()["acceptance"] < 0.97
    reference = mixture.draw(1_000_000, s, torch.Generator().manual_seed(4))
    for moment in (lambda x: x, lambda x: x**2, lambda x: x**4, lambda x: (x > 0).double()):
        expected, error = moment(reference).mean(), moment(reference).std() / math.sqrt(MANY)
        assert abs(moment(state.z).mean() - expected) < 4 * error
    plain = z
    noise = drawn(MANY, 9)
    for _ in range(6):
        plain = langevin(LevelDenoiser(mixture), plain, s, 1.2, noise)
    expected, error = reference.square().mean(), reference.square().std() / math.sqrt(MANY)
    assert abs(plain.square().mean() - expected) > 10 * error  # what Langevin without a decision makes of it


@pytest.mark.parametrize("T", [0.5, 2.0])
@pytest.mark.parametrize("name", MOVES)
def test_a_tempered_gaussian_stays_as_it_is(name, T):
    v, s = 0.4, 0.6
    variance = T * (v + s**2)
    z = math.sqrt(variance) * drawn(MANY, 1)()
    state, record = moved(MOVES[name](), gaussian(v), z, s, T, 6)
    assert record.numbers()["acceptance"] < 0.99
    assert abs(state.z.square().mean() / variance - 1) < 4 * math.sqrt(2 / MANY)


def quadrature(variance, scale, noise, kappa):
    """E min(1, exp(kappa (z'^2 - z^2))) for z ~ N(0, variance), z' = scale z + noise eps."""
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    weight = torch.exp(-(x**2) / 2)
    weight = weight / weight.sum()
    z = math.sqrt(variance) * x[:, None]
    new = scale * z + noise * x[None]
    return (torch.exp((kappa * (new**2 - z**2)).clamp(max=0)) * weight[:, None] * weight).sum().item()


@pytest.mark.parametrize("T", [1.0, 0.5])
def test_the_acceptance_of_one_gaussian_value_is_the_known_one(T):
    """The ratio of a Gaussian law and a linear proposal is the exponential of kappa (z'^2 - z^2)."""
    v, s, share, b = 0.4, 0.6, 0.7, 0.8
    variance = v + s**2
    scale, noise = 1 - share * s**2 / variance, s * math.sqrt(2 * share)
    kappa = (1 - scale**2) / (2 * noise**2) - 1 / (2 * variance)
    mala = quadrature(T * variance, scale, math.sqrt(T) * noise, kappa / T)
    white = 1 + s**2
    kappa = 1 / (2 * white) - 1 / (2 * variance)
    pcn = quadrature(T * variance, math.sqrt(1 - b**2), b * math.sqrt(T * white), kappa / T)
    z = math.sqrt(T * variance) * drawn(MANY, 1)()
    for move, exact in ((LangevinMove(share), mala), (CrankNicolsonMove(b, White()), pcn)):
        got = moved(move, gaussian(v), z, s, T, 1)[1].numbers()["acceptance"]
        assert 0.3 < exact < 0.97 and abs(got - exact) < 4 * math.sqrt(exact * (1 - exact) / MANY)


def test_langevins_bias_halves_with_its_step_and_that_of_mala_is_none():
    """The variance of Langevin is v / (1 - delta / (2 v)); MALA's chain begins at that and loses the excess."""
    v, s = 0.4, 0.6
    variance = v + s**2
    excess = [1 / (1 - share * s**2 / (2 * variance)) - 1 for share in (0.4, 0.2, 0.1)]
    noise = drawn(MANY, 2)
    for share, more in zip((0.4, 0.2, 0.1), excess, strict=True):
        plain = math.sqrt(variance * (1 + more)) * noise()
        kept = langevin(LevelDenoiser(gaussian(v)), plain, s, share, noise)
        assert abs(kept.square().mean() / (variance * (1 + more)) - 1) < 4 * math.sqrt(2 / MANY)
    assert excess[0] / excess[1] == pytest.approx(2, rel=0.15) and excess[1] / excess[2] == pytest.approx(2, rel=0.07)
    start = math.sqrt(variance * (1 + excess[0])) * noise()
    state, _ = moved(LangevinMove(0.4), gaussian(v), start, s, 1.0, 25)
    assert abs(state.z.square().mean() / variance - 1) < 4 * math.sqrt(2 / MANY) < excess[0] / 3


@pytest.mark.parametrize("T", [1.0, 0.5])
@pytest.mark.parametrize("name", ["pcn", "mala"])
def test_noise_of_higher_levels_that_is_left_is_measured_and_said(name, T):
    """Exact where all is accepted: of pcn with white data, and nearly so of short steps of mala without data.

    The chain begins without the variance v of the data, of which the same share is lacking at the end.
    """
    v, sampler, keeps = {
        "pcn": (1.0, CrankNicolson(3, corrections=2, step_size=0.5, temperature=T), 0.75),
        "mala": (0.0, MALA(3, corrections=2, step_size=0.04, temperature=T), 0.96**2),
    }[name]
    ladder, noise, left = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64), drawn(MANY, 4), 0.0
    _, states = sampler.sample(gaussian(v), ladder, noise, return_trajectory=True)
    for s, r in ((4.0, 2.0), (2.0, 1.0)):
        left = (left + s**2 - r**2) * keeps**2
    numbers = sampler.record.numbers()
    assert numbers["acceptance"] > 0.98
    assert numbers["noise_left"] == pytest.approx(math.sqrt(T * left), rel=0.01) and left > 2
    expected = T * (v + 1 + left - v * keeps**6)
    assert abs(states[-2].square().mean() / expected - 1) < 4 * math.sqrt(2 / MANY)
    assert "sampler.corrections" in sampler.record.summary()


def test_levels_that_are_forgotten_leave_no_noise():
    sampler = CrankNicolson(12, corrections=6, step_size=0.8)
    sampler.sample(gaussian(1.0), levels(12), drawn(50))
    assert sampler.record.numbers()["noise_left"] < 0.03
    assert "not to be trusted" not in sampler.record.summary()


def test_a_uniform_number_of_each_sample_is_uniform_at_any_temperature():
    noise = drawn(MANY, 5)
    u = uniform(lambda: math.sqrt(0.5) * noise(), 0.5)
    assert u.shape == (MANY,) and abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / MANY)
    assert abs(u.square().mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / MANY)


# Resolution.


class Spectrum:
    """A field on n x n cells with the spectrum k^-3, as a law and a `Reference`; the 12 strongest waves times a factor.

    Waves are real: the Hartley transform, which is its own inverse, has the same eigenvalues.
    """

    def __init__(self, n, factor=1.0):
        k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
        k = (k[:, None] ** 2 + k[None] ** 2).sqrt()
        power = torch.where(k > 0, k.clamp(min=1) ** -4, 0.0) * n**2
        self.v = power / 8
        strong = power >= power.flatten().sort().values[-12]
        self.v = torch.where(strong, factor * self.v, self.v)

    def hartley(self, field):
        waves = torch.fft.fft2(field, norm="ortho")
        return waves.real - waves.imag

    def centre(self, z):
        return torch.zeros_like(z)

    def draw(self, noise):
        return self.hartley(self.v.sqrt() * noise())

    def denoise(self, z, s):
        return self.hartley(self.v / (self.v + s**2) * self.hartley(z))


def test_acceptance_of_pcn_does_not_fall_with_the_resolution_and_that_of_mala_does():
    """Proposals of the prior, the law that of a posterior, which knows more of the strongest waves."""
    found = {}
    for n in (16, 32, 64):
        prior, law, s = Spectrum(n), Spectrum(n, 0.5), 0.05
        noise = drawn(192, n, (1, n, n))
        z = torch.add(law.draw(noise), noise(), alpha=s)
        place = Place(LevelDenoiser(lambda z, s, law=law: law.denoise(z, s[0].item())), s, 1.0, None)
        for name, move in (("pcn", CrankNicolsonMove(0.4, prior)), ("mala", LangevinMove(0.05))):
            record, state = Record(), move.begin(place, z)
            for _ in range(8):
                state = move(place, state, noise, record)
            found.setdefault(name, []).append(record.numbers()["acceptance"])
    pcn, mala = found["pcn"], found["mala"]
    assert min(pcn) > 0.4 and max(pcn) - min(pcn) < 0.05, found
    assert mala[0] - mala[-1] > 0.1, found


def test_white_proposals_of_a_field_fall_with_the_resolution_and_gaussian_ones_of_its_own_are_all_accepted():
    law, s = Spectrum(16), 0.05
    noise = drawn(32, 0, (1, 16, 16))
    z = torch.add(law.draw(noise), noise(), alpha=s)
    place = Place(LevelDenoiser(lambda z, s: law.denoise(z, s[0].item())), s, 1.0, None)
    shares = []
    for reference in (law, White()):
        record, move = Record(), CrankNicolsonMove(0.4, reference)
        move(place, move.begin(place, z), noise, record)
        shares.append(record.numbers()["acceptance"])
    assert shares == [1.0, 0.0]


# Exchange.


def test_exchange_is_decided_by_the_densities_of_both_chains():
    mixture, T = Mixture(has_energy=True), (1.0, 0.5)
    places = [Place(LevelDenoiser(mixture), s, t, None) for s, t in zip((0.9, 0.3), T, strict=True)]
    z, other = 2 * drawn(MANY, 1)(), 2 * drawn(MANY, 2)()
    states = [State(x, None, torch.zeros(MANY, dtype=torch.float64)) for x in (z, other)]
    sampler = ReplicaExchange()
    u = torch.special.ndtr(drawn(MANY, 3)().flatten())
    after, _ = sampler.exchange(*places, *states, drawn(MANY, 3))

    def log_p(x, s):
        return -mixture.energy(x, torch.full((MANY,), s, dtype=torch.float64))

    ratio = (log_p(other, 0.9) - log_p(z, 0.9)) / T[0] + (log_p(z, 0.3) - log_p(other, 0.3)) / T[1]
    expected = torch.where((u.log() < ratio).view(-1, 1, 1, 1), other, z)
    assert (after.z == expected).double().mean() > 0.999 and 0.1 < (after.z == other).double().mean() < 0.9
    assert sampler.record.numbers()["exchanges"] == pytest.approx((u.log() < ratio).double().mean().item(), abs=1e-3)


@pytest.mark.parametrize("over", ["levels", "temperatures"])
def test_exchange_finds_both_modes_in_their_proportion_where_a_chain_alone_stays(over):
    """All chains begin in one of two modes, ten standard deviations from the barrier at the lowest level."""
    mixture, n = Mixture(w=0.3, v=0.01, has_energy=True), 1500
    s = 0.05
    where = [(r, 1.0) for r in (2.0, 1.2, 0.8, 0.5, 0.3, 0.15, s)]
    if over == "temperatures":
        where = [(0.25, T) for T in (12.0, 6.0, 3.0, 1.7, 1.0)]
    zs = [torch.ones(n, 1, 1, 1, dtype=torch.float64) for _ in where]
    sampler = ReplicaExchange(rounds=150, step_size=0.7)
    found = sampler.run(LevelDenoiser(mixture), zs, where, drawn(n, 6))[-1]
    left = (found < 0).double().mean().item()
    assert abs(left - 0.3) < 3 * math.sqrt(0.21 / n)
    alone = ReplicaExchange(rounds=150, step_size=0.7).run(LevelDenoiser(mixture), zs[:1], where[-1:], drawn(n, 6))
    assert (alone[0] < 0).double().mean() < 0.02


# The samplers.

SAMPLERS = {
    "mala": lambda n, T=1.0: MALA(n, corrections=4, temperature=T),
    "pcn": lambda n, T=1.0: CrankNicolson(n, corrections=4, step_size=0.6, temperature=T),
    "levels": lambda n, T=1.0: ReplicaExchange(n, rounds=5, temperature=T),
    "temperatures": lambda n, T=1.0: ReplicaExchange(n, over="temperatures", rounds=4, moves="pcn", temperature=T),
    "feynman_kac": lambda n, T=0.5: FeynmanKac(n, particles=4, temperature=T),
}
every = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)


@every
@pytest.mark.parametrize("has_energy", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_evaluations_are_counted_exactly(make, n, has_energy):
    counts = []
    sampler = make(n)
    sampler.sample(Mixture(has_energy=has_energy), levels(n), drawn(3), progress=counts.append)
    assert sum(counts) == sampler.evaluations


@every
def test_a_sample_depends_neither_on_its_batch_nor_on_the_decisions_about_others(make):
    def noise(samples):
        generators = [torch.Generator().manual_seed(k) for k in samples]
        return lambda: torch.cat([randn(1, g, (2, 1, 2)) for g in generators])

    together = make(5).sample(Mixture(), levels(5), noise(range(6)))
    for k in range(6):
        alone = make(5).sample(Mixture(), levels(5), noise([k]))
        torch.testing.assert_close(alone[0], together[k], rtol=1e-9, atol=1e-9)


@every
def test_cells_outside_the_domain_change_nothing_within(make):
    valid = torch.tensor([True, False]).view(1, 1, 1, 2)

    def run(land):
        def denoise(z, s):
            return torch.where(valid, Mixture()(torch.where(valid, z, 0.0), s), 0.0)

        draw = drawn(4, 7, (2, 1, 2))
        return make(4).sample(denoise, levels(4), lambda: torch.where(valid, draw(), land), valid=valid)

    torch.testing.assert_close(run(0.0)[..., 0], run(3.0)[..., 0], rtol=1e-9, atol=1e-9)


@every
def test_hooks_and_repeats_are_refused(make):
    if isinstance(make(3), ReplicaExchange | FeynmanKac):
        with pytest.raises(ValueError, match="hook must be None"):
            make(3).sample(Mixture(), levels(3), drawn(2), hook=lambda z, r: z)
    assert make(3).own_walk.startswith("sampler=")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MALA(corrections=0), "^corrections must be >= 1, got 0"),
        (lambda: MALA(step_size=2.0), r"^step_size must be auto or in \(0, 2\), got 2"),
        (lambda: CrankNicolson(step_size=0.0), r"^step_size must be in \(0, 1\], got 0"),
        (lambda: ReplicaExchange(over="time"), "^over must be one of levels, temperatures, got time"),
        (lambda: ReplicaExchange(rounds=0), "^rounds must be >= 1, got 0"),
        (lambda: ReplicaExchange(chains=1), "^chains must be >= 2, got 1"),
        (lambda: ReplicaExchange(nodes=0), "^nodes must be >= 1, got 0"),
        (lambda: ReplicaExchange(hottest=1.0), "^hottest must be > 1, got 1"),
        (lambda: ReplicaExchange(step_size=1.5), r"^step_size must be auto or in \(0, 1\], got 1.5"),
        (lambda: FeynmanKac(particles=1), "^particles must be >= 2, got 1"),
        (lambda: MALA(temperature=0.0), r"^temperature must be > 0, got 0\.0"),
    ],
)
def test_what_a_sampler_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Records.


def test_the_autocorrelation_time_of_an_autoregression_is_the_known_one():
    """(1 + a) / (1 - a) for x <- a x + eps."""
    a, noise = 0.8, drawn(100, 8)
    x, chain = noise().flatten() / math.sqrt(1 - a**2), []
    for _ in range(3000):
        x = a * x + noise().flatten()
        chain.append(x)
    assert autocorrelation_time([torch.stack(chain, 1)]) == pytest.approx((1 + a) / (1 - a), rel=0.05)


def test_a_record_says_its_numbers_in_one_line():
    record = Record()
    assert record.summary() is None
    record.add("acceptance", torch.tensor([1.0, 0.0]))
    record.add("acceptance", torch.tensor([1.0]))
    record.note("white")
    record.note("white")
    assert record.summary() == "sampler: acceptance 0.667\nnote: white"
    record.clear()
    assert record.summary() is None
