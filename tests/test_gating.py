"""How far a network counts beside its Gaussian part: the factors that validation asks for, kept and used everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ideal import NORMALIZER
from programs import FEW, SMALL, TINY, Call
from test_gaussian import LAND, LEVELS, SIZES, data, eigenfields, network, observation
from test_training import in_memory, lines, make_batches, make_run, same
from torch import Tensor

from vecfield_diffusion.data.masks import Pixels
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import DDPM, EDM, Flow
from vecfield_diffusion.inference.export import load_weights, save_weights
from vecfield_diffusion.models.gate import Gate, hats, places
from vecfield_diffusion.models.gaussian import Eigenfields, GaussianResidual
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.small import Regularisation, mirrors, regularised
from vecfield_diffusion.programs.trained import load_trained, unfinished
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from vecfield_diffusion.training.counters import Counters
from vecfield_diffusion.training.ema import EMA
from vecfield_diffusion.training.gating import (
    KNOTS,
    Evidence,
    at_even_levels,
    cross_validated,
    evidence,
    fit,
    knots_of,
)
from vecfield_diffusion.training.settings import Trainer
from vecfield_diffusion.training.trainer import TrainingRun
from vecfield_diffusion.training.validation import GatedLoss

KNOT_LEVELS = torch.linspace(-3, 3, 7, dtype=torch.float64)


def gate_of(levels: list[float], factors: list[float]) -> Gate:
    gate = Gate().double()
    gate.set(*(torch.tensor(values, dtype=torch.float64) for values in (levels, factors)))
    return gate.eval()


# The factor by level.


def test_factors_are_linear_in_ln_s_and_constant_beyond_the_knots() -> None:
    gate = gate_of([-2.0, 0.0, 1.0], [0.2, 1.0, 0.0])
    s = torch.tensor([-9.0, -2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 7.0]).double().exp()
    expected = torch.tensor([0.2, 0.2, 0.6, 0.8, 1.0, 0.75, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(gate(s), expected, rtol=0, atol=1e-12)
    assert (gate.train()(s) == 1).all()
    with gate.eval().opened():
        assert (gate(s) == 1).all()
    torch.testing.assert_close(gate(s), expected, rtol=0, atol=1e-12)


def test_factors_between_two_knots_lie_between_those_of_the_knots() -> None:
    gate = gate_of([-1.0, 0.5, 2.0], [0.1, 0.7, 0.9])
    values = gate(torch.linspace(-3, 4, 200).double().exp())
    assert (values.diff() >= 0).all() and values[0] == 0.1 and values[-1] == 0.9
    assert values.diff().max() < 0.03  # no steps


def test_the_weights_of_knots_are_those_of_the_interpolation() -> None:
    x = torch.linspace(-4, 4, 33).double()
    weights, factors = hats(x, KNOT_LEVELS), torch.rand(7, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(weights.sum(1), torch.ones(33).double())
    gate = gate_of(KNOT_LEVELS.tolist(), factors.tolist())
    torch.testing.assert_close(weights @ factors, gate(x.exp()), rtol=1e-6, atol=1e-12)
    below, share = places(torch.tensor([-99.0, 3.0, 99.0]).double(), KNOT_LEVELS)
    assert below.tolist() == [0, 5, 5] and share.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("levels", "factors"), [([0, 1], [0, 1.1]), ([0, 1], [-0.1, 0]), ([1, 0], [0, 1]), ([0], [1])])
def test_factors_out_of_range_are_refused(levels: list[float], factors: list[float]) -> None:
    with pytest.raises(ValueError, match="factors must be in|levels must be two or more"):
        gate_of(levels, factors)
    with pytest.raises(ValueError, match="factors must be in"):
        gate_of([0.0, 1.0], [float("nan"), 0.0])


def test_where_it_helps_is_said_in_words() -> None:
    assert Gate().sentence() == ""
    assert "at no noise level" in gate_of([-1.0, 1.0], [0.0, 0.001]).sentence()
    said = gate_of(np.log([0.1, 1.0, 10.0]).tolist(), [0.0, 0.5, 0.25]).sentence()
    assert "noise levels 1 to 10 std" in said and said.endswith("0.00 at 0.1, 0.50 at 1, 0.25 at 10")


# The fit.


def samples(product: Callable[[Tensor], Tensor], n: int = 4000, power: float = 0.5, seed: int = 0) -> Evidence:
    """Samples of 50 snapshots whose products scatter about those of a given function of ln s."""
    generator = torch.Generator().manual_seed(seed)
    level = 6 * torch.rand(n, generator=generator).double() - 3
    scatter = 0.05 * torch.randn(n, generator=generator).double()
    powers = torch.full((n,), power).double()
    return Evidence(level, torch.arange(n) % 50, torch.ones(n).double(), product(level) * powers + scatter, powers)


@pytest.mark.parametrize(("k", "factor"), [(0.5, 1.0), (1.0, 1.0), (2.0, 0.5), (4.0, 0.25), (-1.0, 0.0)])
def test_an_output_k_times_the_truth_counts_one_kth(k: float, factor: float) -> None:
    """Without scatter the fit is exact: <F, t> = k <t, t> and <F, F> = k^2 <t, t>."""
    target = 0.5 + torch.rand(300, generator=torch.Generator().manual_seed(0)).double()
    level = torch.linspace(-3, 3, 300).double()
    found = Evidence(level, torch.arange(300) % 10, target, k * target, k**2 * target)
    torch.testing.assert_close(fit(found, KNOT_LEVELS), torch.full((7,), factor).double(), rtol=1e-9, atol=1e-12)
    ideal = (1 - factor * k) ** 2 * target
    torch.testing.assert_close(cross_validated(found, KNOT_LEVELS), ideal, rtol=1e-9, atol=1e-12)


def test_the_loss_is_that_of_the_output_times_the_factor() -> None:
    t, output = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0)).double()
    means = [x.mean(1) for x in (t * t, t * output, output * output)]
    found = Evidence(torch.zeros(5), torch.arange(5), *means)
    factor = torch.linspace(0, 1, 5).double()
    torch.testing.assert_close(found.loss(factor), (t - factor[:, None] * output).square().mean(1))
    assert found[torch.tensor([True, False, False, False, True])].snapshot.tolist() == [0, 4]


def test_a_factor_that_varies_with_the_level_is_found() -> None:
    wanted = gate_of([-3.0, 0.0, 3.0], [0.1, 0.9, 0.3])
    found = fit(samples(lambda level: wanted(level.exp())), KNOT_LEVELS)
    level = torch.linspace(-3, 3, 6001).double()
    weights = hats(level, KNOT_LEVELS)
    around = (weights * wanted(level.exp())[:, None]).sum(0) / weights.sum(0)  # the mean around a knot
    torch.testing.assert_close(found, around, rtol=0, atol=0.02)
    assert found.max() - found.min() > 0.5


def test_what_chance_may_have_done_does_not_count() -> None:
    """Nothing to be found: few factors are above zero, and the fewer, the fewer independent snapshots there are."""
    draws = [samples(torch.zeros_like, n=100, seed=seed) for seed in range(40)]
    counted = [sum((fit(draw, KNOT_LEVELS, share) > 0).sum().item() for draw in draws) for share in (1.0, 0.25)]
    assert counted[0] < 0.05 * 7 * 40 and counted[1] <= counted[0]
    true = [1 - 2 * 0 + (hats(d.level, KNOT_LEVELS) @ fit(d, KNOT_LEVELS)).square() * 0.5 for d in draws]
    assert torch.cat(true).mean() < 1.001
    sure = samples(lambda level: 0 * level + 0.8)
    torch.testing.assert_close(fit(sure, KNOT_LEVELS, 0.5), torch.full((7,), 0.8).double(), rtol=0.05, atol=0)


def test_a_factor_shrinks_by_as_many_times_as_snapshots_are_worth_less() -> None:
    found = samples(lambda level: 0 * level + 0.4)
    weights = hats(found.level, KNOT_LEVELS)
    plain = (weights * found.product[:, None]).sum(0) / (weights * found.power[:, None]).sum(0)
    lost = [1 - fit(found, KNOT_LEVELS, share) / plain for share in (1.0, 0.25)]
    assert (lost[0] > 0).all()
    torch.testing.assert_close(lost[1], 4 * lost[0], rtol=1e-6, atol=1e-9)


def test_few_snapshots_say_nothing_whatever_they_say() -> None:
    found = samples(lambda level: 0 * level + 1.0)
    for snapshots in (1, 2):
        few = replace(found, snapshot=found.snapshot % snapshots)
        assert (fit(few, KNOT_LEVELS) > 0).any() == (snapshots > 1)
    alone = replace(found, snapshot=0 * found.snapshot)
    assert torch.equal(cross_validated(alone, KNOT_LEVELS), found.target)


def test_cross_validation_sees_no_sample_of_its_own_block() -> None:
    """Outputs that are right in one block of time alone: fitted on all they help, on other blocks they do not."""
    found = samples(lambda level: 0 * level, n=2000)
    last = found.snapshot >= 40
    found = replace(found, product=torch.where(last, 0.5, -0.01).double())
    loss = cross_validated(found, KNOT_LEVELS)
    torch.testing.assert_close(loss[last], found.target[last], rtol=0, atol=1e-12)
    assert (fit(found, KNOT_LEVELS) > 0.05).any()


def test_the_levels_are_even_in_ln_s_and_the_rest_is_untouched() -> None:
    batches = make_batches(in_memory(np.random.default_rng(0).standard_normal((40, 2, 6, 8))), size=40)
    batch = batches(0)
    for diffusion in (EDM(sigma_max=20.0), Flow(), DDPM()):
        knots = knots_of(diffusion)
        assert len(knots) == KNOTS and knots[0].exp() == pytest.approx(diffusion.sigma_min)
        even = [at_even_levels(diffusion, batch, first) for first in (0, 40)]
        level = torch.cat([diffusion.level(part.t).log() for part in even])
        place = ((level - knots[0]) / (knots[-1] - knots[0])).sort().values
        assert (place - torch.linspace(0, 1, 80).double()).abs().max() < 0.05
        assert even[0].noise is batch.noise and even[0].observation is batch.observation


# The denoiser.


def gaussian_denoiser(head: float = 0.0, diffusion: EDM | None = None) -> Denoiser:
    field, _ = eigenfields()
    return Denoiser(network(field, head=head), diffusion or EDM(), NORMALIZER)


def test_a_gate_scales_the_output_alone() -> None:
    """1: the denoiser of before, to the bit; 0: the Gaussian part, to the bit; between: between."""
    denoiser = gaussian_denoiser(head=0.3).eval()
    z, *given = data(LAND)
    s = torch.tensor(LEVELS).double()
    known, gate = observation(*given), denoiser.parametrization.gate
    gate.double()
    before = denoiser(z, s, known)
    gate.set(torch.tensor([-5.0, 5.0]), torch.ones(2))
    assert torch.equal(denoiser(z, s, known), before)
    moments = denoiser.estimate(z, s, known)
    gate.set(torch.tensor([-5.0, 5.0]), torch.zeros(2))
    inside = given[3]
    none = denoiser(z, s, known)
    assert torch.equal(none, torch.where(inside, moments.skip, 0.0)) and not torch.equal(none, before)
    torch.testing.assert_close(denoiser.estimate(z, s, known).out, moments.out)
    gate.set(torch.tensor([-5.0, 5.0]), torch.full((2,), 0.25))
    torch.testing.assert_close(denoiser(z, s, known), 0.75 * none + 0.25 * before)
    assert torch.equal(denoiser.train()(z, s, known), before)
    assert torch.equal(denoiser.eval().in_float32()(z, s, known), denoiser(z, s, known))


def twin(n: int, seed: int = 0) -> Tensor:
    """Fields of exactly the law of `eigenfields`, normalised, `(n, 2, H, W)`; 0 over land."""
    _, covariance = eigenfields()
    values, vectors = torch.linalg.eigh(covariance)
    white = torch.randn(n, len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (white * values.clamp(min=0).sqrt() @ vectors.T).view(n, 2, *LAND.shape)


def gated_run(folder: Path, output: Callable[[GaussianResidual], None] | None = None, **changes: object) -> TrainingRun:
    """A run on a Gaussian twin, with a network that knows its covariance."""
    velocity = twin(60).numpy()
    velocity[..., ~LAND.numpy()] = np.nan
    fields = in_memory(velocity, LAND)
    batches = make_batches(fields, indices=range(40), size=8, mask=Pixels([0.1, 0.5]))
    run = make_run(folder, batches, **({"batch_size": 8, "validation_batches": 3} | changes))
    torch.manual_seed(0)
    model = GaussianResidual(7, 2, (False, False), **SIZES)
    field, _ = eigenfields()
    state = {name: value.float() for name, value in field.state_dict().items()}
    single = Eigenfields()
    single.load_state_dict(state)
    model.learn(lambda: single)
    if output is not None:
        output(model)
    run.denoiser = Denoiser(model, EDM(sigma_max=20.0), batches.normalizer)
    run.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run.validation = replace(batches, indices=range(40, 60))
    run.__post_init__()
    return run


def noisy(model: GaussianResidual) -> None:
    torch.nn.init.normal_(model.network.head[-1].weight, std=0.3)


def test_on_a_gaussian_twin_the_denoiser_is_the_gaussian_posterior(tmp_path: Path) -> None:
    """Whatever the network says there is nothing to be found, and the validation loss is that of the Gaussian part."""
    run = gated_run(tmp_path, noisy)
    model = run.denoiser.eval()
    assert run.gated is not None and run.gated.independence > 0.7
    ungated = torch.cat([run.loss(run.validation(k)) for k in range(3)]).mean().item()
    values = run.validation_loss()
    gate = model.parametrization.gate
    assert gate.fitted and (gate.factors < 0.05).all()
    assert values["val/loss"] == values["val/loss_gaussian"] < ungated - 0.02
    batch = run.validation(0)
    s = torch.full((8,), 0.7)
    z = batch.x0 + 0.7 * batch.noise
    moments = model.estimate(z, s, batch.observation)
    torch.testing.assert_close(moments.mean, torch.where(batch.observation.valid, moments.skip, 0.0), rtol=0, atol=0.05)


class Oracle(GaussianResidual):
    """Gives k times what it should, (x0 - g) / c; `truth` is set before each evaluation."""

    k, truth = 1.0, torch.zeros(1)

    def precondition(self, z: Tensor, s: Tensor, *rest: object) -> object:
        done = super().precondition(z, s, *rest)
        self.said = self.k * (self.truth - done.skip) / done.out[:, None, None, None]
        return done

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.said


@pytest.mark.parametrize(("k", "factor"), [(0.5, 1.0), (1.0, 1.0), (2.0, 0.5), (-1.0, 0.0)])
def test_evidence_is_that_of_the_network_in_its_denoiser(tmp_path: Path, k: float, factor: float) -> None:
    run = gated_run(tmp_path)
    model = Oracle(7, 2, (False, False), **SIZES)
    model.learn(lambda: run.denoiser.network.field)
    model.k, denoiser = k, Denoiser(model, EDM(sigma_max=20.0), NORMALIZER)
    parts, plain = [], []
    for number in range(3):
        batch = run.validation(number)
        model.truth = batch.x0
        parts.append(evidence(denoiser, batch, run.gated.snapshots(number)))
        denoiser.eval()
        plain.append(run.loss(batch))
    found = Evidence.joined(parts)
    torch.testing.assert_close(found.loss(torch.zeros(24).double()).float(), torch.cat(plain))  # head of zeros: g
    torch.testing.assert_close(found.product, k * found.target, rtol=1e-5, atol=1e-7)
    knots = knots_of(denoiser.diffusion)[[0, 4, 8]]
    assert hats(found.level, knots).sum(0).min() > 3
    torch.testing.assert_close(fit(found, knots), torch.full((3,), factor).double(), rtol=1e-4, atol=1e-6)


def test_snapshots_that_resemble_each_other_count_as_fewer() -> None:
    slow = np.repeat(np.random.default_rng(0).standard_normal((10, 2, 6, 8)), 6, axis=0)
    fast = np.random.default_rng(0).standard_normal((60, 2, 6, 8))
    shares = [
        GatedLoss(make_batches(in_memory(values), indices=range(60), size=20), 3).independence
        for values in (slow, fast)
    ]
    assert shares[0] < 0.4 and 0.7 < shares[1] <= 1.0


# What is kept.


def test_the_gate_is_kept_with_the_weights_and_shipped(tmp_path: Path) -> None:
    model = gaussian_denoiser(head=0.1).network.float()
    levels, factors = torch.linspace(-6, 4, KNOTS), torch.linspace(0, 1, KNOTS)
    model.gate.set(levels, factors)
    save_weights(tmp_path / "half.safetensors", {"ema": model.state_dict()}, "float16")
    for state, tolerance in ((model.state_dict(), 0.0), (load_weights(tmp_path / "half.safetensors")["ema"], 1e-3)):
        fresh = GaussianResidual(7, 2, (True, True), **SIZES)
        fresh.load_state_dict(state)
        s = torch.tensor([0.001, 0.3, 1.0, 50.0])
        torch.testing.assert_close(fresh.eval().gate(s), model.eval().gate(s), rtol=tolerance, atol=tolerance)
        assert fresh.gate.fitted


def test_a_checkpoint_of_before_has_the_factor_one() -> None:
    model = gaussian_denoiser(head=0.1).network.float()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("gating.")}
    assert len(state) == len(model.state_dict()) - 2
    fresh = GaussianResidual(7, 2, (True, True), **SIZES)
    fresh.gate.set(torch.tensor([0.0, 1.0]), torch.zeros(2))
    fresh.load_state_dict(state)
    assert (fresh.eval().gate(torch.tensor([0.01, 1.0, 50.0])) == 1).all() and fresh.gate.sentence() == ""


def test_the_gate_has_no_average() -> None:
    model = GaussianResidual(7, 2, (True, True), **SIZES)
    ema = EMA(model, 1000.0)
    model.gate.set(torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.5]))
    ema.adopt(model, model.gate)
    ema.update(model, 4, 4)
    with ema.applied(model):
        assert model.gate.factors.tolist() == [0.25, 0.5]
    assert model.gate.factors.tolist() == [0.25, 0.5]


# Runs.


def test_a_run_that_never_helps_ends_with_its_gaussian_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a Gaussian twin the best checkpoint is that of step 0, and says so."""
    run = gated_run(tmp_path, noisy, max_steps=6)
    run.train()
    best, last = (load_checkpoint(tmp_path / "checkpoints" / name) for name in ("best.pt", "last.pt"))
    assert best["counters"]["step"] == 0 and last["counters"]["step"] == 6
    assert (best["ema"]["gating.factors"] == 0).all()
    record = lines(tmp_path)
    assert record[0]["step"] == 0 and record[0]["val/loss"] == record[0]["val/loss_gaussian"]
    assert all(line["val/loss"] <= line["val/loss_gaussian"] for line in record if "val/loss" in line)
    assert "the best step is 0: the network helps at no noise level" in capsys.readouterr().out


def test_a_network_that_helps_is_kept_with_its_factors(tmp_path: Path) -> None:
    """The field is told a part of its variance: what is left can be learned, and is, at some levels."""

    def weakened(model: GaussianResidual) -> None:
        model.field.variances.mul_(0.05)

    run = gated_run(
        tmp_path, weakened, max_steps=150, validate_every=50, ema=100, warmup=0, log_every=50, validation_batches=10
    )
    run.optimizer = torch.optim.AdamW(run.denoiser.network.parameters(), lr=1e-2)
    run.__post_init__()
    run.train()
    best = load_checkpoint(tmp_path / "checkpoints" / "best.pt")
    assert best["counters"]["step"] >= 100 and best["ema"]["gating.factors"].max() > 0.5
    values = best["scores"]
    assert values["val/loss"] < 0.99 * values["val/loss_gaussian"]
    assert all(torch.equal(best["ema"][name], best["network"][name]) for name in ("gating.levels", "gating.factors"))


def test_a_gated_run_that_stops_and_goes_on_is_one_that_never_stopped(tmp_path: Path) -> None:
    gated_run(tmp_path / "whole", noisy).train()
    gated_run(tmp_path / "parts", noisy, max_steps=2).train()
    second = gated_run(tmp_path / "parts")
    assert second.resume()
    second.train()
    for name in ("last.pt", "best.pt"):
        assert same(*(load_checkpoint(tmp_path / each / "checkpoints" / name) for each in ("whole", "parts")))
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


def test_a_run_from_before_there_were_gates_goes_on(tmp_path: Path) -> None:
    run = gated_run(tmp_path, noisy, max_steps=2)
    run.train()
    state = load_checkpoint(run.last)
    for key in ("network", "ema"):
        state[key] = {name: value for name, value in state[key].items() if not name.startswith("gating.")}
    state["counters"] = {name: state["counters"][name] for name in ("step", "samples", "minutes", "best")}
    save_checkpoint(run.last, state)
    second = gated_run(tmp_path)
    assert second.resume() and second.counters.best_step == 2
    second.train()
    assert load_checkpoint(second.last)["ema"]["gating.factors"].shape == (KNOTS,)


# The size of the set.


def test_few_independent_fields_ask_for_dropout_and_patience() -> None:
    assert [Regularisation.of(n).dropout for n in (1, 29, 30, 100, 499, 500, 1e6)] == [0.3, 0.3, 0.2, 0.1, 0.1, 0, 0]
    assert Regularisation.of(500).patience is None and Regularisation.of(20).patience == 20
    assert [Regularisation.of(n).mirrored for n in (99, 100)] == [True, False]
    auto = {"model": {"dropout": "auto"}, "trainer": {"patience": "auto", "max_steps": 3}, "seed": 1}
    auto["augment"] = {"transforms": "auto"}
    new = dict(mirrors=["flip_x", "flip_y"], before={})
    chosen, said = regularised(auto, 12.34, 40, **new)
    assert chosen == {
        "model": {"dropout": 0.3},
        "trainer": {"patience": 20, "max_steps": 3},
        "augment": {"transforms": ["flip_x", "flip_y"]},
        "seed": 1,
    }
    assert said == (
        "the 40 training snapshots are worth 12.3 independent fields: model.dropout=0.3, trainer.patience=20, "
        "augment.transforms=[flip_x,flip_y]"
    )
    many, said = regularised(auto, 900, 1000, **new)
    assert (many["model"]["dropout"], many["trainer"]["patience"], said) == (0.0, None, "")
    assert many["augment"] == {"transforms": "auto"} == regularised(auto, 9, 40, mirrors=[], before={})[0]["augment"]
    given = {"model": {"dropout": 0.05}, "trainer": {"patience": None}, "augment": {"transforms": "none"}}
    assert regularised(given, 3, 40, **new) == (given, "")
    assert regularised({**given, "model": {}}, 3, 40, **new)[0]["model"] == {}


def test_a_run_goes_on_as_it_began_whatever_auto_is_now() -> None:
    auto = {"model": {"dropout": "auto"}, "trainer": {"patience": "auto"}, "augment": {"transforms": "auto"}}
    before = {"model": {"dropout": 0.0}, "trainer": {}, "augment": {"transforms": "auto"}}
    config, _ = regularised(auto, 12, 40, mirrors=["flip_x"], before=before)
    assert (config["model"]["dropout"], config["augment"]["transforms"]) == (0.0, "auto")
    again, said = regularised(
        auto, 12, 40, mirrors=["flip_x"], before=regularised(auto, 12, 40, mirrors=["flip_x"], before={})[0]
    )
    assert again["augment"]["transforms"] == ["flip_x"] and "dropout=0.3" in said


def test_what_may_be_mirrored() -> None:
    whole = Grid(torch.ones(6, 8, dtype=torch.bool))
    assert mirrors(whole) == ["flip_x", "flip_y"]
    assert mirrors(Grid(LAND)) == []
    assert mirrors(Grid(torch.ones(3, 4, dtype=torch.bool), dx=torch.tensor([1.0, 2.0, 3.0]))) == ["flip_x"]


def test_a_run_without_progress_ends_and_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = gated_run(tmp_path, noisy, max_steps=100, patience=2, validate_every=3)
    run.train()
    assert run.counters.step == 6 and run.counters.stopped and run.untrained == ""
    assert "trainer.patience=" in capsys.readouterr().out
    assert load_checkpoint(run.last)["counters"]["stopped"]
    again = gated_run(tmp_path, max_steps=100, patience=2, validate_every=3)
    assert again.resume()
    again.train()
    assert again.counters.step == 6
    longer = gated_run(tmp_path, max_steps=8, patience=None, validate_every=3)
    assert longer.resume()
    longer.train()
    assert longer.counters.step == 8 and not longer.counters.stopped
    with pytest.raises(ValueError, match="patience must be >= 1"):
        Trainer(patience=0)


def test_what_counts_as_progress() -> None:
    counters, trainer = Counters(), Trainer(patience=3, validate_every=10)
    for step, loss, better in ((10, 1.0, True), (20, 1.0, False), (30, 0.9, True), (40, 0.95, False)):
        counters.step = step
        assert counters.improve(loss) == better and not trainer.waited(counters)
    counters.step = 60
    assert trainer.waited(counters) and not Trainer(validate_every=10).waited(counters)


# The programs.


def test_the_programs_train_ship_and_say_where_the_network_helps(place: Path, run: Call) -> None:
    given = [*TINY, *SMALL, "model=gaussian", "model.blocks=1", "name=gated", "trainer.max_steps=4"]
    code, out, err = run("train", *given)
    assert (code, err) == (0, "") and "the best step is" in out and "independent fields: model.dropout=" in out
    trained = load_trained("outputs/train/gated", torch.device("cpu"))
    assert trained.helps and trained.denoiser.parametrization.gate.fitted
    assert trained.config["model"]["dropout"] in (0.1, 0.2, 0.3)
    assert run("train", *given)[::2] == (0, "")  # auto again, with what it was
    assert run("infer", "ckpt=outputs/train/gated", "inpainting=conditional", "name=g", *FEW)[::2] == (0, "")
    first = json.loads((place / "outputs/train/gated/metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["val/loss"] == first["val/loss_gaussian"]
    assert "not trained" not in unfinished(trained)
    code, out, _ = run("evaluate", "ckpt=outputs/train/gated", "masks=[block]", "cases=2", "name=gated", *FEW)
    assert code == 0 and f"note: {trained.path}: {trained.helps}" in out
    assert trained.helps in (place / "outputs/evaluate/gated/report.html").read_text()
