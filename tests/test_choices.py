"""Formulations, predictions, samplers and grids from the command line; what does not go together says so early."""

from __future__ import annotations

import json
import math
from itertools import cycle
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import xarray as xr
import yaml
from programs import FEW, SMALL, TINY, Call, is_message

from vecfield_diffusion import commands
from vecfield_diffusion.config.program import CONF
from vecfield_diffusion.diffusion.base import HEADS, ScheduleName
from vecfield_diffusion.programs.parts import make_parts
from vecfield_diffusion.training.checkpoint import load_checkpoint


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


#: Samplers that a network of the mean does for; the other one is chosen in `test_few_steps.py`.
OF_MEANS = [name for name in options("sampler") if name != "consistency"]
#: A formulation, how it is sampled, and with which prediction: every one of each at least once.
CHOICES = [
    ("ddpm", "ddim sampler.eta=0.5", "noise"),
    ("ddpm diffusion.schedule=cosine", "ddpm sampler.variance=large", "velocity"),
    ("ddpm diffusion.inputs=unit", "dpmpp_2m", "edm"),
    ("iddpm", "predictor_corrector", "sample"),
    ("iddpm diffusion.learned_variance=true", "ddpm sampler.variance=learned", "noise"),
    ("vp", "euler_maruyama", "score"),
    ("ve", "heun_sde", "edm"),
    ("edm", "edm_stochastic", "edm"),
    ("custom", "dpmpp_2m sampler.schedule=karras", "score"),
    ("edm diffusion.uncertainty=true diffusion.noise=log_normal", "langevin", "noise"),
    ("flow", "euler", "velocity"),
    ("flow diffusion.times=logit_normal", "midpoint", "sample"),
    ("ou", "adaptive", "velocity"),
    ("thermodynamic", "mala sampler.corrections=2", "score"),
    ("thermodynamic diffusion.schedule=learned", "pcn sampler.corrections=2", "noise"),
    ("vp diffusion.inputs=unit", "replica_exchange sampler.rounds=2", "noise"),
    ("edm", "feynman_kac sampler.particles=2", "sample"),
    ("interpolant", "heun", "velocity"),
    ("interpolant", "adaptive sampler.rtol=1e-2", "edm"),
]


def test_every_choice_is_made_once() -> None:
    no_noise = {"regression", "consistency", "crps"}  # to predict; the last two are chosen in test_few_steps
    assert {choice[0].split()[0] for choice in CHOICES} == set(options("diffusion")) - no_noise
    assert {choice[1].split()[0] for choice in CHOICES} == set(OF_MEANS)
    assert {choice[2] for choice in CHOICES} == set(HEADS)


@pytest.mark.parametrize(("diffusion", "sampler", "prediction"), CHOICES, ids=[choice[0] for choice in CHOICES])
def test_a_formulation_trains_and_samples(
    place: Path,
    run: Call,
    diffusion: str,
    sampler: str,
    prediction: str,
) -> None:
    name = "-".join([*diffusion.split(), prediction]).replace("=", "_").replace(".", "_")
    chosen = [f"diffusion={diffusion}".split(" "), [f"diffusion.prediction={prediction}", f"name={name}"]]
    few = ["trainer.max_steps=4", "trainer.validate_every=4"]
    code, out, err = run("train", *TINY, *SMALL, *chosen[0], *chosen[1], *few)
    assert (code, err) == (0, ""), err
    size = [] if sampler.startswith("adaptive") else ["sampler.steps=3"]
    more = [f"ckpt=outputs/train/{name}", f"name={name}", "members=2", f"sampler={sampler}".split(" "), size]
    flat = [part for given in more for part in ([given] if isinstance(given, str) else given)]
    code, out, err = run("infer", *flat)
    assert (code, err) == (0, ""), err
    with xr.open_dataset(place / "outputs" / "infer" / name / "fields.nc") as data:
        assert np.isfinite(data["u_members"].values).all()
        seen = data["observed"].values == 1
        known = data["u_truth"].values[seen]
        np.testing.assert_allclose(
            data["u_members"].values[:, seen], np.broadcast_to(known, (2, len(known))), rtol=1e-5
        )


#: Samplers that evaluate often; they are run once, above.
LONG = {"mala", "pcn", "replica_exchange", "feynman_kac"}


@pytest.mark.parametrize(
    ("sampler", "grid"), list(zip(sorted(set(OF_MEANS) - LONG), cycle(get_args(ScheduleName)), strict=False))
)
def test_one_checkpoint_with_every_sampler_and_grid(place: Path, run: Call, sampler: str, grid: str) -> None:
    size = [] if sampler == "adaptive" else ["sampler.steps=3", f"sampler.schedule={grid}"]
    code, _, err = run("infer", "ckpt=outputs/train/run", f"name={sampler}", f"sampler={sampler}", "members=2", *size)
    assert (code, err) == (0, ""), err


def test_what_a_formulation_learns_beside_the_mean_is_trained_and_kept(place: Path, run: Call) -> None:
    for name, extra in (
        ("part", "trainer.max_steps=2"),
        ("part", "trainer.max_steps=4"),
        ("whole", "trainer.max_steps=4"),
    ):
        given = ["diffusion.uncertainty=true", f"name={name}", extra, "trainer.warmup=0", "trainer.log_every=1"]
        code, _, err = run("train", *TINY, *SMALL, *given)
        assert code == 0, err
    weights = {}
    for name in ("part", "whole"):
        state = load_checkpoint(place / "outputs" / "train" / name / "checkpoints" / "last.pt")
        weights[name] = state["diffusion"]["uncertainty.out.bias"].item()
    assert weights["whole"] != 0 and weights["part"] == weights["whole"]


def test_physics_joins_the_loss(place: Path, run: Call) -> None:
    losses = []
    for weight in (0.0, 2.0):
        given = [f"name=physics{weight}", "physics=divergence", f"physics.divergence={weight}", "trainer.max_steps=2"]
        code, _, err = run("train", *TINY, *SMALL, *given, "trainer.log_every=1")
        assert code == 0, err
        lines = (place / "outputs" / "train" / f"physics{weight}" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if '"loss"' in line][0])
    assert losses[1] > losses[0] + 1e-4


MINE = """
import torch
from vecfield_diffusion.diffusion.base import Diffusion

class Trigonometric(Diffusion):
    def alpha(self, t):
        return torch.cos(torch.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(torch.pi / 2 * t)

class Plain(Diffusion):
    def preconditioning(self, t):
        return 1 / (1 + t), t.log(), t / (1 + t), 1 / (1 + t)
"""


@pytest.mark.parametrize(
    ("target", "keys"),
    [
        ("Trigonometric", ["t_min=0.001", "t_max=0.99", "prediction=velocity"]),
        ("Plain", ["t_min=0.01", "t_max=100.0"]),
    ],
)
def test_a_path_and_a_preconditioner_of_a_users_own(
    place: Path, run: Call, monkeypatch: pytest.MonkeyPatch, target: str, keys: list[str]
) -> None:
    (place / "own_path.py").write_text(MINE)
    monkeypatch.syspath_prepend(place)
    own = ["diffusion=custom", f"diffusion._target_=own_path.{target}", *(f"diffusion.{key}" for key in keys)]
    code, _, err = run("train", *TINY, *SMALL, *own, f"name={target}")
    assert (code, err) == (0, "")
    given = [f"ckpt=outputs/train/{target}", f"name={target}", *FEW]
    is_message(run("infer", *given), "own_path", "trust=[own_path]")
    assert run("infer", *given, "trust=[own_path]")[::2] == (0, "")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("sampler=ddpm sampler.variance=learned", ("diffusion.learned_variance=true", "EDM")),
        ("sampler=ddpm sampler.variance=learned physics=divergence", ("variance=learned",)),
        ("sampler=adaptive inpainting=repaint", ("sampler=adaptive", "inpainting=repaint")),
        ("sampler.schedule=kaRras", ("sampler.schedule", "karras")),
        ("sampler=ddim sampler.eta=2", ("sampler.eta", "[0, 1]")),
        ("likelihood=exact", ("sigma_obs", "mask=none")),
        ("likelihood=exact mask=none physics=divergence", ("physics=none",)),
        ("likelihood=exact mask=none likelihood_steps=1", ("likelihood_steps must be >= 2",)),
    ],
)
def test_what_does_not_go_together_is_said_before_data_are_read(
    place: Path,
    run: Call,
    monkeypatch: pytest.MonkeyPatch,
    overrides: str,
    parts: tuple[str, ...],
) -> None:
    def unread(*args: object) -> None:
        raise RuntimeError("data were read")

    monkeypatch.setattr("vecfield_diffusion.programs.trained.held_out", unread)
    is_message(run("infer", "ckpt=outputs/train/run", "name=odd", *overrides.split(" ")), *parts)


def test_more_steps_than_the_chain_has_are_refused_before_data_are_made(place: Path, run: Call) -> None:
    given = [*TINY, "diffusion=ddpm", "diffusion.T=8", "sampler.steps=9", "sampler.schedule=native", "name=odd"]
    is_message(run("train", *given), "sampler.steps must be <= T=8", "sampler.schedule=karras")
    learned = ["sampler=ddpm", "sampler.variance=learned", "name=odd"]
    is_message(run("train", *TINY, *learned), "diffusion.learned_variance=true")


@pytest.mark.parametrize("keys", [[], ["t_min=0", "t_max=0.9"], ["t_max=1.0"]])
def test_a_path_without_levels_is_refused_before_data_are_made(
    place: Path, run: Call, monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    (place / "own_path.py").write_text(MINE)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr("vecfield_diffusion.data.turbulence.open_turbulence", None)
    own = ["diffusion=custom", "diffusion._target_=own_path.Trigonometric", *(f"diffusion.{key}" for key in keys)]
    is_message(run("train", *TINY, *own, "name=odd"), "diffusion.t_min and diffusion.t_max")


INPAINTING = [
    ("inpainting=mmps mask=pixels", "mmps", "sampler.steps=3"),
    ("inpainting=pigdm mask=track", "pigdm", "sampler.steps=3"),
    ("inpainting=dps sampler=euler", "dps", "sampler.steps=5"),
    ("inpainting=repaint inpainting.resamples=2 sampler=ddpm", "repaint", "sampler.steps=3"),
    ("inpainting=replacement", "replacement", "sampler.steps=3"),
    ("inpainting=mmps physics=divergence", "physics.mode=rows: divergence", "sampler.steps=3"),
    ("inpainting=pigdm physics=divergence_curl", "physics.mode=rows: divergence", "sampler.steps=3"),
    ("physics=custom physics.mode=rows physics.momentum=[0,0]", "inpainting=mmps: physics", "sampler.steps=3"),
    ("physics=custom physics.kinetic_energy=0.1 physics.no_flow=0.5", "physics.mode=gradient", "sampler.steps=3"),
    ("physics=divergence physics.mode=hard", "physics.mode=hard", "sampler.steps=3"),
    ("sensor=component sensor.component=v", "inpainting=mmps: the network was not", "sampler.steps=3"),
    ("sensor=radial sensor.sites=[[0,0],[5e4,0]] inpainting=pigdm", "", "sampler.steps=3"),
    ("sensor=footprint mask=pixels", "inpainting=mmps", "sampler.steps=3"),
    ("guidance=cfg guidance.scale=2", "inpainting=conditional", "sampler.steps=3"),
    ("guidance=autoguidance guidance.ckpt=outputs/train/run", "inpainting=conditional", "sampler.steps=3"),
]


@pytest.mark.parametrize(("overrides", "said", "steps"), INPAINTING, ids=[choice[0] for choice in INPAINTING])
def test_ways_to_condition_from_the_command_line(place: Path, run: Call, overrides: str, said: str, steps: str) -> None:
    given = ["ckpt=outputs/train/run", "members=2", steps, "sigma_obs=0.02", "name=ways", *overrides.split(" ")]
    code, out, err = run("infer", *given)
    assert (code, err) == (0, ""), err
    assert said in out or "inpainting=" + said in overrides
    with xr.open_dataset(place / "outputs" / "infer" / "ways" / "fields.nc") as data:
        assert np.isfinite(data["u_members"].values).all()


def test_evaluation_says_what_it_chose(place: Path, run: Call) -> None:
    code, out, err = run("evaluate", "ckpt=outputs/train/run", "cases=2", *FEW, "masks=[block]", "sigma_obs=5")
    assert (code, err) == (0, ""), err
    assert "inpainting=mmps: sigma_obs=5 is beyond the errors that the network was trained with" in out


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("physics=divergence physics.mode=rows inpainting=conditional", ("mode=rows needs inpainting=mmps",)),
        ("physics=divergence physics.mode=rows inpainting=dps", ("mode=rows needs inpainting=mmps",)),
        ("sensor=component inpainting=conditional", ("sensor=component needs inpainting=mmps",)),
        ("sensor=radial sensor.sites=[[1]]", ("sensor.sites", "[x, y]")),
        (
            "sensor=radial sensor.sites=[[0,0]] radars=[[0,0],[5e4,0]]",
            ("radars= gives errors of u and v", "sensor.error"),
        ),
        (
            "sensor=radial sensor.sites=[[0,0]] sigma_obs=[a,b,c]",
            ("sigma_obs=['a', 'b', 'c'] gives errors", "one number"),
        ),
        ("guidance=cfg inpainting=mmps", ("guidance=cfg", "inpainting=conditional")),
        ("guidance=cfg sensor=component", ("guidance=cfg", "sensor=none")),
        ("sensor=component physics=divergence physics.mode=hard", ("mode=hard", "physics.mode=rows")),
        ("sensor=footprint sensor.size=33", ("sensor.size", "periodic")),
        ("physics=custom physics.momentum=[0,0] physics.curl=0.5", ("momentum", "at most 1")),
        ("sensor=footprint sensor.size=2", ("sensor.size", "must be odd")),
        ("guidance=cfg guidance.scale=-1", ("guidance.scale", "must be >= 0")),
        ("guidance=autoguidance guidance.ckpt=nowhere", ("nowhere", "no checkpoint there")),
        ("physics=custom physics.mode=hard physics.curl=0.1", ("mode=hard takes the divergence to zero",)),
        ("physics=custom physics.mode=rows physics.kinetic_energy=1", ("kinetic_energy", "mode=gradient")),
        ("inpainting=repaint inpainting.resamples=0", ("inpainting.resamples", "must be >= 1")),
    ],
)
def test_ways_to_condition_that_make_no_sense(place: Path, run: Call, overrides: str, parts: tuple[str, ...]) -> None:
    given = ["ckpt=outputs/train/run", "name=odd", *FEW, "sigma_obs=0.02"]
    is_message(run("infer", *given, *overrides.split(" ")), *parts)


def test_likelihood_from_the_command_line(place: Path, run: Call) -> None:
    given = ["ckpt=outputs/train/run", *FEW, "mask=none", "likelihood=hutchinson", "likelihood_steps=6", "time=[0,1]"]
    values = []
    for batch in (1, 2):
        code, out, err = run("infer", *given, f"batch={batch}", f"name=likelihood{batch}")
        assert (code, err) == (0, "")
        assert "nats per value" in out
        path = place / "outputs" / "infer" / f"likelihood{batch}" / "metrics.json"
        found = yaml.safe_load(path.read_text())
        values.append(list(found["log_likelihood"].values()))
        assert found["all"]["log_likelihood"] == pytest.approx(sum(values[-1]) / 2)
    assert values[0] == pytest.approx(values[1], rel=1e-4) and values[0][0] != values[0][1]


#: Learning rate, batch, warm-up in steps, steps, dropout, half-life of the average in samples, evaluations.
RECIPES = {
    "ddpm_2020": (2e-4, 128, 5000, 800_000, 0.1, 128 * np.log(0.5) / np.log(0.9999), 1000),
    "iddpm_2021": (1e-4, 128, 0, 500_000, 0.3, 128 * np.log(0.5) / np.log(0.9999), 250),
    "vp_2021": (2e-4, 128, 5000, 1_300_000, 0.1, 128 * np.log(0.5) / np.log(0.9999), 1000),
    "ve_2021": (2e-4, 128, 5000, 1_300_000, 0.1, 128 * np.log(0.5) / np.log(0.999), 1999),
    "edm_2022": (1e-3, 512, 10e6 / 512, 200e6 / 512, 0.13, 0.5e6, 35),
    "edm_2022_stochastic": (1e-4, 4096, 10e6 / 4096, 2500e6 / 4096, 0.1, 50e6, 511),
    "flow_matching_2023": (5e-4, 256, 45_000, 391_000, 0.0, 50_000, None),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_the_literature_have_the_published_numbers(name: str) -> None:
    config = commands.train.config(f"experiment={name}")
    parts = make_parts(config)
    trainer, optimizer = parts["trainer"], config["optimizer"]
    lr, batch, warmup, steps, dropout, half_life, evaluations = RECIPES[name]
    assert (optimizer["lr"], optimizer["weight_decay"], trainer.batch_size) == (lr, 0.0, batch)
    assert (config["model"]["dropout"], config["name"]) == (dropout, name)
    assert trainer.warmup / batch == pytest.approx(warmup, rel=1e-3)
    assert trainer.max_steps == pytest.approx(steps, rel=1e-3)
    assert trainer.ema == pytest.approx(half_life, rel=1e-3)
    assert parts["sampler"].evaluations == evaluations


def test_every_recipe_of_the_literature_is_in_the_table() -> None:
    assert set(RECIPES) == {name for name in options("experiment") if "_20" in name}


@pytest.mark.usefixtures("rendered")
def test_the_paths_of_samples_are_followed(run: Call, place: Path):
    options = ["ckpt=outputs/train/run", "mask=none", "members=6", "sampler.steps=4", "thermodynamics=true"]
    code, out, err = run("infer", *options, "name=paths")
    assert code == 0, err
    assert "annealed paths: mean work" in out
    found = json.loads((place / "outputs/infer/paths/metrics.json").read_text())["thermodynamics"]
    assert len(found["levels"]) == len(found["energy"]) == 4
    changes = [w + q for w, q in zip(found["work"], found["heat"], strict=True)]
    assert [u - found["energy"][0] for u in found["energy"]] == pytest.approx(changes, abs=1e-5)
    assert found["energy"][0] == pytest.approx(math.log(2 * math.pi * math.e * found["levels"][0] ** 2) / 2, abs=0.15)
    assert (place / "outputs/infer/paths/figure_thermodynamics.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["mask=block"], ["thermodynamics: cells observed without error have no density", "mask=none"]),
        (["mask=none", "physics=divergence"], ["thermodynamics is that of the network"]),
        (["mask=none", "sampler=adaptive"], ["thermodynamics follows members from level to level"]),
    ],
)
def test_paths_that_cannot_be_followed(run: Call, options, parts):
    few = [] if "sampler=adaptive" in options else FEW
    is_message(run("infer", "ckpt=outputs/train/run", "thermodynamics=true", *few, *options, "name=bad"), *parts)


def test_what_a_sampler_recorded_stands_in_the_scores_of_an_evaluation(run: Call, place: Path):
    few = ["cases=2", "members=2", "sampler=pcn", "sampler.steps=2", "sampler.corrections=1", "masks=[block]"]
    code, out, err = run("evaluate", "ckpt=outputs/train/run", *few, "name=recorded")
    assert code == 0, err
    assert "not to be trusted" in out
    rows = (place / "outputs/evaluate/recorded/scores.csv").read_text().splitlines()
    found = {cells[2]: float(cells[4]) for cells in (row.split(",") for row in rows) if "sampler_" in cells[2]}
    assert {"sampler_acceptance", "sampler_noise_left"} <= found.keys()
    assert 0 <= found["sampler_acceptance"] <= 1 and found["sampler_noise_left"] > 1


@pytest.fixture
def pair(run: Call, place: Path) -> str:
    """Two networks that differ, as `ckpt=` takes them."""
    if not (place / "outputs/train/other").exists():
        assert run("train", *TINY, *SMALL, "trainer.max_steps=2", "seed=3", "name=other")[0] == 0
    return "ckpt=[outputs/train/run,outputs/train/other]"


def test_members_of_a_mixture_are_those_of_its_networks(run: Call, place: Path, pair: str):
    found = {}
    given = ["mask=block", "members=4", "sampler.steps=2", "time=[0,1]", "batch=1"]
    for name, ckpt in (("run", "ckpt=outputs/train/run"), ("other", "ckpt=outputs/train/other"), ("both", pair)):
        weights = ["weights=[.5,.5]"] if name == "both" else []
        code, _, err = run("infer", ckpt, *weights, *given, f"name=mixed_{name}")
        assert code == 0, err
        with xr.open_dataset(place / f"outputs/infer/mixed_{name}/fields.nc") as data:
            values = data["u_members"]
            found[name] = values.transpose(values.dims[values.shape.index(4)], ...).values
    assert not np.array_equal(found["run"], found["other"])
    np.testing.assert_array_equal(found["both"][:2], found["run"][:2])
    np.testing.assert_array_equal(found["both"][2:], found["other"][2:])


def test_a_mixture_is_weighed_by_what_is_observed(run: Call, pair: str):
    few = ["likelihood_steps=6", "name=evidence"]
    code, out, err = run("infer", pair, "weights=evidence", "mask=pixels", "sigma_obs=0.05", *FEW, *few)
    assert code == 0, err
    assert out.count("weights by evidence") == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["weights=[1]"], ["weights=[1.0]", "each of the 2 checkpoints"]),
        (["weights=evidence", "mask=block"], ["weights=evidence", "sigma_obs="]),
        (["weights=evidense"], ["weights=evidense", "evidence"]),
        (["likelihood=hutchinson", "mask=none"], ["likelihood=hutchinson is that of one network"]),
    ],
)
def test_what_a_mixture_cannot_do_is_one_line(run: Call, pair: str, options, parts):
    is_message(run("infer", pair, *options, *FEW, "name=refused"), *parts)


def test_a_series_by_itself_has_no_paths(run: Call):
    is_message(run("infer", "ckpt=none", "input=run.nc", "thermodynamics=true", "name=bad"), "takes a network")


def test_weights_of_one_network_are_none(run: Call):
    given = ["ckpt=outputs/train/run", "weights=[1]", *FEW, "name=refused"]
    is_message(run("infer", *given), "weights are those of several checkpoints")
