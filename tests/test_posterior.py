"""MMPS, PiGDM and DPS on Gaussian fields, whose posteriors have closed forms.

A method that is an affine map of its noise gives its mean and covariance in one run. Where the solver stops by itself
it is not; then it runs beside the exact conditional denoiser from the same noise and its mirror image, and what is
compared are the differences, in which the scatter of the sample cancels.
"""

from dataclasses import replace

import pytest
import torch
from oracle import GaussianConditional, GaussianPrior, gaussian_law, physics_rows

from vecfield_diffusion.diffusion.base import karras
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance import posterior
from vecfield_diffusion.guidance.linear import LinearObservation, cells, footprint, radial, stack
from vecfield_diffusion.guidance.posterior import DPS, MMPS, PiGDM
from vecfield_diffusion.guidance.solver import Solver, Tangent
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.samplers.deterministic import DPMpp2M, Euler, Heun

N = 12
PRIOR = GaussianPrior(N, N)
LEVELS = karras(0.002, 80.0, 32)
WET = torch.ones(N, N, dtype=torch.bool)


class Counted:
    """The denoiser of a prior, which counts its evaluations and the derivatives that are taken of it."""

    def __init__(self, prior=PRIOR):
        self.prior, self.evaluations, self.derivatives = prior, 0, 0

    def __call__(self, z, s, observation):
        assert not observation.observed.any()
        x_hat = self.prior.denoise(z, s)
        self.evaluations += 1
        if x_hat.requires_grad:
            x_hat.register_hook(self.count)
        return x_hat

    def count(self, gradient):
        self.derivatives += 1


def masks():
    generator, out = torch.Generator().manual_seed(0), {}
    for share in (11, 33, 50, 75):
        mask = torch.zeros(N * N, dtype=torch.bool)
        mask[torch.randperm(N * N, generator=generator)[: round(share / 100 * N * N)]] = True
        out[f"pixels {share} %"] = mask.view(N, N)
    swaths = torch.zeros(N, N, dtype=torch.bool)
    swaths[:, N // 8 : N // 4] = swaths[:, 5 * N // 8 : 6 * N // 8] = True
    block = torch.ones(N, N, dtype=torch.bool)
    block[N // 4 : 5 * N // 8, N // 4 : 5 * N // 8] = False
    return out | {"two swaths": swaths, "all but a block": block}


MASKS = masks()


def nothing(n, prior=PRIOR):
    return Observation.none(n, torch.ones(prior.shape[1:], dtype=torch.bool), torch.float64)


def on_cells(mask, sigma):
    """Rows of a mask, without values."""
    return LinearObservation(
        lambda x: x, torch.zeros(1, *PRIOR.shape).double(), torch.full((1, 1, 1, 1), sigma).double(), mask
    )


def matrix(rows, prior=PRIOR):
    """A of flat rows, `(K, d)`."""
    basis = torch.eye(prior.size, dtype=torch.float64).view(-1, *prior.shape)
    return rows.forward(basis).T


def exact(rows, y, prior=PRIOR):
    """Means `(B, d)` and covariance of x0 given `y` `(B, K)`."""
    a, noise = matrix(rows, prior), torch.diag(rows.sigma[0] ** 2)
    cross = prior.covariance @ a.T
    gain = torch.linalg.solve(a @ cross + noise, cross.T).T
    return y @ gain.T, prior.covariance - gain @ cross.T


def drawn(rows, cases, prior=PRIOR, seed=1):
    """Values `(cases, K)` of rows: those of fields of the prior, with errors."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(cases, prior.size, dtype=torch.float64, generator=generator)
    x = x * prior.eigenvalues.sqrt() @ prior.vectors.T
    noise = torch.randn(cases, rows.y.shape[1], dtype=torch.float64, generator=generator)
    return torch.where(rows.present, x @ matrix(rows, prior).T + rows.sigma * noise, 0.0)


class Conditional:
    """The exact denoiser of several posteriors of one covariance: means `(B, d)`."""

    def __init__(self, mean, covariance):
        self.one, self.mean = GaussianConditional(mean[0] * 0, covariance), mean
        self.one.eigenvalues = self.one.eigenvalues.clamp(min=0)

    def __call__(self, z, s):
        mean = self.mean.view(-1, *z.shape[1:])
        return mean + self.one(z - mean, s)


def compare(method, rows, sampler=None, levels=LEVELS, cases=3, members=8, prior=PRIOR):
    """How far samples of `method` are from the posterior of flat rows, and what they cost.

    Returns:
        Error of the mean in field stds, spread over the exact one, an upper bound of the 2-Wasserstein distance in
        field stds (by the triangle: to the samples of the exact denoiser from the same noise, and theirs to the
        posterior), and the denoiser.
    """
    sampler = DPMpp2M(32) if sampler is None else sampler
    y = drawn(rows, cases, prior)
    mean, covariance = exact(rows, y, prior)
    generator = torch.Generator().manual_seed(2)
    half = torch.randn(members // 2, *prior.shape, dtype=torch.float64, generator=generator)
    noise = torch.cat([half, -half]).repeat(cases, 1, 1, 1)
    given = LinearObservation(rows.forward, y.repeat_interleave(members, dim=0), rows.sigma, rows.present)
    counted, observation = Counted(prior), nothing(cases * members, prior)
    bound = method.bind(counted, observation, [given])
    got = sampler.sample(bound, levels, lambda: noise, method.hook(observation, None, bound, sampler.steps))
    got = got.view(cases, members, -1)
    told = Conditional(mean.repeat_interleave(members, dim=0), covariance)
    beside = DPMpp2M(32).sample(told, LEVELS, lambda: noise).view(cases, members, -1)
    centre, law = gaussian_law(DPMpp2M(32), Conditional(mean[:1], covariance), LEVELS, prior.shape)
    error = (got.mean(dim=1) - mean).square().mean().sqrt()
    widths = [(x - x.mean(dim=1, keepdim=True)).square().sum() for x in (got, beside)]
    spread = (widths[0] / widths[1] * law.trace() / covariance.trace()).sqrt()
    distance = (got - beside).square().mean().sqrt() + wasserstein(centre - mean[0], law, covariance)
    return error.item(), spread.item(), distance.item(), counted


def wasserstein(shift, one, other):
    """The 2-Wasserstein distance of two Gaussian laws, by dimension."""
    root = square_root(other)
    square = shift.square().sum() + (one + other - 2 * square_root(root @ one @ root)).trace()
    return (square.clamp(min=0) / len(shift)).sqrt()


def square_root(matrix):
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("name", MASKS)
def test_mmps_with_its_default_rule_samples_the_posterior(name, sigma):
    method = MMPS()
    error, spread, _, cost = compare(method, stack([on_cells(MASKS[name], sigma)]))
    assert error < 0.02 and 0.98 < spread < 1.03
    assert cost.evaluations == 32 and cost.derivatives < 32 * 22
    assert (method.guard, method.solves) == (0, 32 * 24)


@pytest.mark.parametrize("name", ["pixels 33 %", "pixels 50 %", "pixels 75 %", "two swaths", "all but a block"])
def test_warm_start_is_at_least_twice_as_good_as_cold(name):
    rows = stack([on_cells(MASKS[name], 0.05)])
    warm, cold = (compare(MMPS(k_max=3, warm_start=start), rows)[0] for start in (True, False))
    assert warm < 0.5 * cold


class DivergentPrior(GaussianPrior):
    """With a share of its energy in gradients, which are rotated curls."""

    def __init__(self, share=0.1):
        super().__init__(N, N)
        half = self.size // 2
        rotated = torch.roll(torch.roll(self.covariance, half, 0), half, 1)
        rotated[:half, half:] *= -1
        rotated[half:, :half] *= -1
        self.covariance = (1 - share) * self.covariance + share * rotated
        self.eigenvalues, self.vectors = torch.linalg.eigh(self.covariance)
        self.eigenvalues = self.eigenvalues.clamp(min=0)


DIVERGENT = DivergentPrior()
GRID = Grid(WET, 1000.0, 1000.0, "periodic", "periodic")
NORMALIZER = Normalizer(torch.ones(2, N, N), 0.4).double()
TAU = 2e-5


def asked(mask, curl=None):
    """Cells and physics, without values: the divergence is asked to be 0 within a tenth of what it is."""
    return stack([on_cells(mask, 0.05), physics_rows(GRID, NORMALIZER, TAU, curl)])


def test_tolerance_of_the_physics_is_a_small_part_of_the_divergence():
    rows = physics_rows(GRID, NORMALIZER, 1.0).flat()
    rms = (matrix(rows) @ DIVERGENT.covariance @ matrix(rows).T).diagonal().mean().sqrt().item()
    assert 5 < rms / TAU < 20


@pytest.mark.parametrize("name", MASKS)
def test_joint_physics_samples_the_constrained_posterior(name):
    error, spread, distance, _ = compare(MMPS(), asked(MASKS[name]), prior=DIVERGENT)
    assert distance < 0.03 and error < 0.02 and 0.98 < spread < 1.03


SMALL = GaussianPrior()
HEIGHT, WIDTH = SMALL.shape[1:]


def kinds():
    """Rows of each kind on the small prior, with values."""
    generator = torch.Generator().manual_seed(4)

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    wet = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    domain = Grid(wet, 1000.0, 1000.0, "periodic", "periodic")
    seen = noise(1, 1, HEIGHT, WIDTH) > 0
    y, sigma = noise(1, *SMALL.shape), torch.tensor(0.1, dtype=torch.float64)
    both = LinearObservation(lambda x: x, y, sigma, seen)
    component = torch.tensor([True, False]).view(1, 2, 1, 1)
    scale = Normalizer(torch.zeros(SMALL.shape), 0.4).double()
    physics = physics_rows(domain, scale, 1e-4, 2e-4, 1e-4, -1e-4)
    made = {
        "u": LinearObservation(lambda x: x, y, sigma, seen & component),
        "v": LinearObservation(lambda x: x, y, sigma, seen & ~component),
        "radial": radial(180 * noise(HEIGHT, WIDTH), y[:, :1], sigma, seen),
        "footprint": footprint(3, domain, y, sigma, seen),
        "errors": LinearObservation(lambda x: x, y, 0.05 + noise(1, 1, HEIGHT, WIDTH).abs(), seen),
        "physics": stack([both, physics]),
    }
    return {name: stack([each]) for name, each in made.items()}


@pytest.mark.parametrize("s", [0.02, 0.5, 5.0, 60.0])
@pytest.mark.parametrize("kind", kinds())
def test_mmps_solved_to_the_end_is_the_exact_conditional_denoiser(kind, s):
    rows = kinds()[kind]
    mean, covariance = exact(rows, rows.y, SMALL)
    z = 3 * torch.randn(2, *SMALL.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    level = torch.tensor([s, 0.7 * s], dtype=torch.float64)
    bound = MMPS(k_max=300, tolerance=1e-10).bind(Counted(SMALL), nothing(2, SMALL), [rows])
    for _ in range(2):  # cold, then warm
        torch.testing.assert_close(bound(z, level), Conditional(mean, covariance)(z, level), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", kinds())
def test_mean_and_covariance_of_mmps_solved_to_the_end(kind):
    """One run on all unit vectors: 64 steps, so that what is left of the error is that of the solver."""
    rows, levels = kinds()[kind], karras(0.002, 300.0, 64)
    mean, covariance = exact(rows, rows.y, SMALL)
    bound = MMPS(k_max=300, tolerance=1e-6).bind(Counted(SMALL), nothing(SMALL.size + 1, SMALL), [rows])
    noise = torch.cat([torch.eye(SMALL.size), torch.zeros(1, SMALL.size)]).double().view(-1, *SMALL.shape)
    x = DPMpp2M(64).sample(bound, levels, lambda: noise).flatten(1)
    maps = x[:-1] - x[-1]
    found = x[-1], maps.T @ maps
    assert wasserstein(found[0] - mean[0], found[1], covariance) < 0.02
    assert (found[1].trace() / covariance.trace()).sqrt().item() == pytest.approx(1, abs=0.02)


def tangent(s=0.5, n=2, kind="radial"):
    rows = kinds()[kind].whitened()
    z = torch.randn(n, *SMALL.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    levels = torch.linspace(s, 2 * s, n, dtype=torch.float64)
    return Tangent(lambda z, s: SMALL.denoise(z, s), z, levels, rows), levels, matrix(rows, SMALL)


def system(a, s):
    """M by its definition, with V = s^2 S (S + s^2)^-1."""
    eye = torch.eye(SMALL.size, dtype=torch.float64)
    v = s**2 * torch.linalg.solve(SMALL.covariance + s**2 * eye, SMALL.covariance)
    return torch.eye(len(a), dtype=torch.float64) + a @ v @ a.T, v


@pytest.mark.parametrize("k", [1, 2, 5])
def test_k_iterations_are_the_best_of_the_krylov_space(k):
    """The w of the span of b, M b, ... M^(k-1) b that is nearest to the solution in the norm of M."""
    made, levels, a = tangent()
    solver = Solver(made, 1e-12)
    solver.solve(torch.full((2,), k), [])
    for i in range(2):
        m, v = system(a, levels[i])
        b = made.missing[i]
        span = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(m, j) @ b for j in range(k)], dim=1))[0]
        best = span @ torch.linalg.solve(span.T @ m @ span, span.T @ b)
        torch.testing.assert_close(solver.w[i], best, rtol=0, atol=1e-9)
        torch.testing.assert_close(solver.correction[i].flatten(), v @ a.T @ best, rtol=0, atol=1e-9)
        torch.testing.assert_close(solver.residual[i], b - m @ best, rtol=0, atol=1e-9)


def test_a_warm_start_takes_the_best_of_its_directions_and_stays_conjugate():
    """The residual is orthogonal to all that the start spans, before and after the iterations."""
    made, levels, a = tangent()
    start = [torch.randn(made.missing.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
             for i in range(2)]  # fmt: skip
    for k in (0, 4):
        solver = Solver(made, 1e-12)
        solver.solve(torch.full((2,), k), start)
        for direction in start:
            assert (solver.residual * direction).sum(dim=1).abs().max() < 1e-9
    only = Solver(made, 1e-12)
    only.solve(torch.zeros(2), start[:1])
    w, b = start[0][0], made.missing[0]
    torch.testing.assert_close(only.w[0], (w @ b) / (w @ system(a, levels[0])[0] @ w) * w)


def test_what_a_solve_costs():
    """k products cold; one more for each vector of the start, of which there are two at most."""
    rows = stack([on_cells(MASKS["pixels 50 %"], 0.01)])
    counted = Counted()
    bound = MMPS(k_max=4, tolerance=1e-9).bind(counted, nothing(1), [replaced(rows, drawn(rows, 1))])
    z = torch.randn(1, *PRIOR.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    costs = []
    for s in (3.0, 2.0, 1.5, 1.0):
        before = counted.derivatives
        with torch.no_grad():
            out = bound(z, torch.tensor([s], dtype=torch.float64))
        costs.append(counted.derivatives - before)
        assert not out.requires_grad and len(bound.memory) <= 2
        assert all(each.grad_fn is None and not each.requires_grad for each in bound.memory)
    assert costs == [4, 5, 6, 6] and counted.evaluations == 4


def replaced(rows, y):
    return LinearObservation(rows.forward, y, rows.sigma, rows.present)


def test_auto_looks_at_what_each_sample_has_and_at_its_level():
    share, s = torch.tensor([0.14, 0.14, 0.15, 0.15]), torch.tensor([5.0, 1.0, 5.0, 1.0])
    few, some, many = posterior.FEW, posterior.SOME, posterior.MANY
    assert MMPS().limit(share, s).tolist() == [few, few, some, many]
    assert MMPS(k_max=5).limit(share, s).tolist() == [5] * 4
    observed = torch.zeros(2, 1, N, N, dtype=torch.bool)
    observed[0, 0, 0, :3] = observed[1, 0, :6] = True
    valid = torch.ones_like(observed)
    valid[:, :, 6:] = False
    given = Observation(torch.zeros(2, 2, N, N), observed, torch.full((2, 1, 1, 1), 0.1), valid)
    assert MMPS().bind(Counted(), given).share.tolist() == pytest.approx([3 / 72, 1.0])


class Twisted:
    """A linear denoiser whose Jacobian is no covariance in the second sample."""

    def __init__(self):
        generator = torch.Generator().manual_seed(8)
        good = torch.randn(SMALL.size, SMALL.size, dtype=torch.float64, generator=generator) / 10
        bad = torch.randn(SMALL.size, SMALL.size, dtype=torch.float64, generator=generator) / 5
        self.matrices = torch.stack([good @ good.T, bad - torch.eye(SMALL.size).double()])
        self.derivatives = 0

    def __call__(self, z, s, observation):
        return torch.einsum("bij,bj->bi", self.matrices, z.flatten(1)).view_as(z)


def few_cells():
    """3 cells, 6 rows: fewer than the basis of GMRES."""
    observed = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.bool)
    observed[:, 0, 1:4, 2] = True
    y = torch.randn(2, *SMALL.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    sigma = torch.full((2, 1, 1, 1), 0.3, dtype=torch.float64)
    return Observation(torch.where(observed, y, torch.nan), observed, sigma, torch.ones_like(observed))


@pytest.mark.parametrize("solver", ["cg", "gmres"])
def test_a_jacobian_that_is_no_covariance_is_met_and_solved_by_gmres(solver):
    """D + V A^T w with the dense solution of (R + A V A^T) w = y - A D, V = s^2 J^T, for both samples."""
    denoiser, given = Twisted(), few_cells()
    method = MMPS(k_max=20, tolerance=1e-12, solver=solver)
    z = torch.randn(2, *SMALL.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    s = torch.tensor([0.8, 1.5], dtype=torch.float64)
    out = method.bind(denoiser, given)(z, s)
    assert (method.guard, method.solves) == ((1, 2) if solver == "cg" else (0, 2))
    chosen = given.observed[0].expand(SMALL.shape).flatten()
    for i in range(2):
        x_hat = denoiser.matrices[i] @ z[i].flatten()
        v = s[i] ** 2 * denoiser.matrices[i].T
        m = 0.09 * torch.eye(6, dtype=torch.float64) + v[chosen][:, chosen]
        w = torch.linalg.solve(m, given.y[i].flatten()[chosen] - x_hat[chosen])
        torch.testing.assert_close(out[i].flatten(), x_hat + v[:, chosen] @ w, rtol=0, atol=1e-8)


def test_a_jacobian_that_is_positive_but_not_symmetric_is_met_as_well():
    """p^T M p > 0 in all directions, and yet conjugate gradients would go astray: the skew part is found by itself."""
    denoiser, given = Twisted(), few_cells()
    skew = torch.randn(SMALL.size, SMALL.size, dtype=torch.float64, generator=torch.Generator().manual_seed(12))
    denoiser.matrices[1] = denoiser.matrices[0] + (skew - skew.T)
    method, s = MMPS(k_max=20, tolerance=1e-12), torch.tensor([0.8, 1.5], dtype=torch.float64)
    z = torch.randn(2, *SMALL.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    out = method.bind(denoiser, given)(z, s)
    assert method.guard == 1
    chosen = given.observed[0].expand(SMALL.shape).flatten()
    x_hat, v = denoiser.matrices[1] @ z[1].flatten(), s[1] ** 2 * denoiser.matrices[1].T
    m = 0.09 * torch.eye(6, dtype=torch.float64) + v[chosen][:, chosen]
    assert torch.linalg.eigvalsh(m + m.T).min() > 0
    w = torch.linalg.solve(m, given.y[1].flatten()[chosen] - x_hat[chosen])
    torch.testing.assert_close(out[1].flatten(), x_hat + v[:, chosen] @ w, rtol=0, atol=1e-8)


def test_where_conjugate_gradients_give_way_the_system_is_solved_anew():
    """Of a Jacobian that is symmetric and not positive, after some sound directions: the least residual from w = 0."""
    denoiser, given = Twisted(), few_cells()
    given.observed[1] = True  # more rows than GMRES has vectors
    ends = torch.linspace(-3.0, 6.0, SMALL.size, dtype=torch.float64)
    turn = torch.linalg.qr(denoiser.matrices[1])[0]
    denoiser.matrices[1] = turn @ torch.diag(ends) @ turn.T
    given = replace(given, y=torch.where(given.observed, given.y.nan_to_num(0.5), torch.nan))
    z = torch.randn(2, *SMALL.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    methods = [MMPS(k_max=20, solver=solver) for solver in ("cg", "gmres")]
    ours, anew = (method.bind(denoiser, given)(z, torch.ones(2, dtype=torch.float64)) for method in methods)
    assert methods[0].guard == 1
    torch.testing.assert_close(ours[1], anew[1], rtol=0, atol=1e-12)


def test_conjugate_gradients_stay_where_a_direction_has_no_curvature():
    denoiser, rows = Twisted(), stack([cells(few_cells())]).whitened()
    z = torch.ones(2, *SMALL.shape, dtype=torch.float64)
    made = Tangent(lambda z, s: denoiser(z, s, None), z, torch.full((2,), 1.5, dtype=torch.float64), rows)
    solver = Solver(made, 1e-12)
    solver.advance(solver.residual)
    assert solver.stuck.tolist() == [False, True] and solver.active.tolist() == [True, False]
    assert solver.w[0].abs().max() > 0 and solver.w[1].abs().max() == 0
    assert torch.equal(solver.residual[1], made.missing[1]) and solver.correction[1].abs().max() == 0


def test_gmres_never_raises_the_residual():
    made, _, _ = tangent(kind="physics", s=5.0)
    solver = Solver(made, 1e-12)
    before = solver.residual.square().sum(dim=1)
    solver.minimise_residual(torch.tensor([True, False]))
    after = solver.residual.square().sum(dim=1)
    assert after[0] < before[0] and after[1] == before[1]
    assert solver.correction[1].abs().max() == 0


def test_pigdm_is_its_formula_with_an_error_for_each_cell():
    rows, s = kinds()["errors"], torch.tensor([0.7, 3.0], dtype=torch.float64)
    z = torch.randn(2, *SMALL.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    out = PiGDM().bind(Counted(SMALL), nothing(2, SMALL), [rows])(z, s)
    for i in range(2):
        x_hat, (_, v) = SMALL.denoise(z, s)[i].flatten(), system(matrix(rows, SMALL), s[i])
        r2 = s[i] ** 2 / (1 + s[i] ** 2)
        w = torch.where(rows.present[0], (rows.y[0] - x_hat) / (rows.sigma[0] ** 2 + r2), 0.0)
        torch.testing.assert_close(out[i].flatten(), x_hat + v @ w, rtol=0, atol=1e-4)


class White(GaussianPrior):
    """S = I."""

    def __init__(self):
        super().__init__()
        self.covariance = self.vectors = torch.eye(self.size, dtype=torch.float64)
        self.eigenvalues = torch.ones(self.size, dtype=torch.float64)


@pytest.mark.parametrize("kind", kinds())
def test_pigdm_is_exact_on_white_fields(kind):
    """There V is r^2 I, also where rows overlap."""
    rows, white = kinds()[kind], White()
    mean, covariance = exact(rows, rows.y, white)
    z = 3 * torch.randn(2, *SMALL.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(12))
    s = torch.tensor([0.3, 4.0], dtype=torch.float64)
    out = PiGDM().bind(Counted(white), nothing(2, white), [rows])(z, s)
    torch.testing.assert_close(out, Conditional(mean, covariance)(z, s), rtol=0, atol=1e-3)


def test_the_bias_of_pigdm():
    """Of smooth fields it is a part of what the observations say; the number is that of this field."""
    rows = stack([on_cells(MASKS["pixels 11 %"], 0.05)])
    ignored = exact(rows, drawn(rows, 3))[0].square().mean().sqrt()
    error, spread, _, cost = compare(PiGDM(), rows)
    assert 0.2 < error / ignored < 0.45 and 0.95 < spread < 1.35
    assert cost.derivatives == cost.evaluations == 32


def misfit(rows, z, s):
    x_hat = SMALL.denoise(z, s)
    return torch.where(rows.present, rows.y - rows.forward(x_hat), 0.0).square().sum(dim=1).sqrt()


def test_dps_steps_along_the_gradient_of_each_misfit():
    """Against central differences of the norm; the first evaluation since the last step counts."""
    rows, s = kinds()["radial"], torch.tensor([0.7, 3.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(13)
    z, along, other = (torch.randn(2, *SMALL.shape, dtype=torch.float64, generator=generator) for _ in range(3))
    method, counted = DPS(zeta=20.0), Counted(SMALL)
    bound = method.bind(counted, nothing(2, SMALL), [rows])
    hook = method.hook(nothing(2, SMALL), None, bound, 50)
    torch.testing.assert_close(bound(z, s), SMALL.denoise(z, s))
    bound(other, s)
    assert (counted.evaluations, counted.derivatives) == (2, 1)
    step = -hook(torch.zeros_like(z), 0.1)
    slope = (misfit(rows, z + 1e-5 * along, s) - misfit(rows, z - 1e-5 * along, s)) / 2e-5
    torch.testing.assert_close((step * along).sum(dim=(1, 2, 3)), 20 / 50 * slope, rtol=1e-6, atol=0)
    bound(other, s)
    assert counted.derivatives == 2 and (hook(z, 0.1) + step - z).abs().max() > 1e-3


def test_dps_moves_towards_the_observations_whatever_the_number_of_steps():
    rows = stack([on_cells(MASKS["pixels 50 %"], 0.05)])
    errors = [compare(DPS(100.0), rows, Euler(n), karras(0.002, 80.0, n))[0] for n in (100, 200)]
    ignored = exact(rows, drawn(rows, 3))[0].square().mean().sqrt()
    assert errors[0] == pytest.approx(errors[1], rel=0.1) and 0.03 < errors[0] < 0.15 * ignored


def test_dps_without_observations_leaves_the_state_alone():
    bound = DPS().bind(Counted(SMALL), nothing(1, SMALL))
    z = torch.ones(1, *SMALL.shape, dtype=torch.float64)
    bound(z, torch.ones(1, dtype=torch.float64))
    assert torch.equal(DPS().hook(nothing(1, SMALL), None, bound, 10)(z, 0.5), z)


@pytest.mark.parametrize("method", [MMPS(), PiGDM()])
def test_without_observations_the_denoiser_is_the_prior(method):
    z = torch.ones(1, *SMALL.shape, dtype=torch.float64)
    s = torch.ones(1, dtype=torch.float64)
    counted = Counted(SMALL)
    assert torch.equal(method.bind(counted, nothing(1, SMALL))(z, s), SMALL.denoise(z, s))
    assert method.hook(nothing(1, SMALL), None) is None


METHODS = {
    "mmps": MMPS,
    "mmps gmres": lambda: MMPS(solver="gmres"),
    "pigdm": PiGDM,
    "dps": lambda: DPS(30.0),
}


def observed_cells(n=8, share=None):
    """Every sample has a mask, values and an error of its own: from 2 cells to nearly all."""
    generator = torch.Generator().manual_seed(14)
    share = torch.linspace(0.05, 0.9, n).view(n, 1, 1, 1)
    observed = torch.rand(n, 1, HEIGHT, WIDTH, generator=generator) < share
    y = torch.randn(n, *SMALL.shape, dtype=torch.float64, generator=generator)
    sigma = torch.linspace(0.02, 0.3, n, dtype=torch.float64).view(n, 1, 1, 1)
    return Observation(torch.where(observed, y, torch.nan), observed, sigma, torch.ones_like(observed))


def run(method, sampler, given, noise, denoiser=None):
    bound = method.bind(Counted(SMALL) if denoiser is None else denoiser, given)
    hook = method.hook(given, None, bound, sampler.steps)
    with torch.no_grad():
        return sampler.sample(bound, karras(0.01, 50.0, sampler.steps), lambda: noise, hook)


@pytest.mark.parametrize("sampler", [DPMpp2M(12), Heun(6)])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_eight_is_eight_batches_of_one(name, sampler):
    given = observed_cells()
    noise = torch.randn(8, *SMALL.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(15))
    together = run(METHODS[name](), sampler, given, noise)
    apart = [run(METHODS[name](), sampler, given[i : i + 1], noise[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-7)
    assert together.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_observed_changes_nothing(name):
    given = observed_cells()
    other = Observation(given.y.nan_to_num(1e6), given.observed, given.sigma_y, given.valid)
    noise = torch.randn(8, *SMALL.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(16))
    assert torch.equal(*(run(METHODS[name](), DPMpp2M(6), each, noise) for each in (given, other)))


@pytest.mark.parametrize("name", METHODS)
def test_single_precision_agrees_with_double(name):
    given = observed_cells()
    noise = torch.randn(8, *SMALL.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(17))
    single = Observation(given.y.float(), given.observed, given.sigma_y.float(), given.valid)
    prior = GaussianPrior()
    prior.eigenvalues, prior.vectors = prior.eigenvalues.float(), prior.vectors.float()
    low = run(METHODS[name](), DPMpp2M(12), single, noise.float(), Counted(prior))
    assert low.dtype == torch.float32
    assert (low - run(METHODS[name](), DPMpp2M(12), given, noise)).abs().max() < 0.02


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_needs(name):
    """All differentiate and take rows; DPS alone changes the state between steps."""
    method = METHODS[name]()
    assert method.differentiates and method.takes_rows and method.changes_state == (name == "dps")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MMPS(k_max=0), "k_max must be >= 1 or auto, got 0"),
        (lambda: MMPS(tolerance=1.0), r"tolerance must be in \(0, 1\), got 1.0"),
        (lambda: MMPS(solver="lu"), "solver must be cg or gmres, got lu"),
        (lambda: DPS(-1.0), "zeta must be >= 0, got -1.0"),
        (lambda: DPS().hook(nothing(1), None), "bound must be the denoiser that DPS.bind gave, got None"),
    ],
)
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def joint_case():
    """Some cells with both components, others with one, with errors of their own: observation and exact joint law."""
    generator = torch.Generator().manual_seed(11)
    kind = torch.randint(6, (N, N), generator=generator)
    observed, single = kind == 0, torch.stack([kind == 1, kind == 2])
    sigma = 0.05 + 0.2 * torch.rand(1, 2, N, N, dtype=torch.float64, generator=generator)
    truth = (
        torch.randn(PRIOR.size, dtype=torch.float64, generator=generator) * PRIOR.eigenvalues.sqrt() @ PRIOR.vectors.T
    )
    y = truth.view(1, 2, N, N) + sigma * torch.randn(1, 2, N, N, dtype=torch.float64, generator=generator)
    y = torch.where(observed | single, y, torch.nan)
    given = Observation(y, observed[None, None], sigma, WET[None, None], single=single[None])
    return given, observed.expand(2, N, N), single


def law_given(cells_of, given):
    """The exact law given the values of the cells, each with its own error."""
    at = cells_of.flatten()
    cross = PRIOR.covariance[:, at]
    gain = torch.linalg.solve(cross[at] + torch.diag(given.sigma_y.flatten()[at] ** 2), cross.T).T
    return GaussianConditional(gain @ given.y.flatten()[at], PRIOR.covariance - gain @ cross.T)


@pytest.mark.parametrize("conditioned", [False, True])
def test_single_components_and_errors_of_every_value(conditioned):
    """D_y is that of the joint posterior: from the prior by all rows, or from the conditional model by the others."""
    given, both, single = joint_case()
    exact_law, cells_law = law_given(both | single, given), law_given(both, given)

    def denoiser(z, s, observation):
        assert observation.observed.any() == conditioned
        return cells_law(z, s) if conditioned else PRIOR.denoise(z, s)

    bound = MMPS(k_max=400, tolerance=1e-10, conditioned=conditioned).bind(denoiser, given)
    z = torch.randn(1, 2, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for s in (0.1, 1.0, 10.0):
        level = torch.tensor([s], dtype=torch.float64)
        torch.testing.assert_close(bound(s * z, level), exact_law(s * z, level), rtol=0.0, atol=1e-7)
