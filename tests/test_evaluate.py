"""What `evaluate.py` makes of regressions, of calibrated spreads and of instruments, against direct computations."""

from __future__ import annotations

import csv
import errno
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from programs import FEW, SMALL, TINY, Call, is_message, trained_in
from torch import Tensor

from vecfield_diffusion.commands import evaluate as main
from vecfield_diffusion.config.build import build
from vecfield_diffusion.config.program import option
from vecfield_diffusion.data.gaps import OtherTimes
from vecfield_diffusion.data.masks import Full
from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.data.sequences import Timeline
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.evaluation.comparison import Estimate, Scored, Setting
from vecfield_diffusion.evaluation.metrics import scores
from vecfield_diffusion.evaluation.report import Section
from vecfield_diffusion.evaluation.series import along_time
from vecfield_diffusion.inference.calibration import store_factor
from vecfield_diffusion.inference.cases import Cases, make_cases
from vecfield_diffusion.models.residual import AroundMean
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs import evaluate as program
from vecfield_diffusion.programs.baselines import chosen_baselines
from vecfield_diffusion.programs.compared import Network, method_of, regressions
from vecfield_diffusion.programs.evaluate import Collection, model_scored
from vecfield_diffusion.programs.in_time import (
    consecutive,
    neighbours,
    observations,
    step_of,
    time_before,
    training_frames,
)
from vecfield_diffusion.programs.method import process_of
from vecfield_diffusion.programs.trained import Trained, held_out, load_trained, unfinished
from vecfield_diffusion.programs.twin import TwinExperiment
from vecfield_diffusion.programs.written import Kept
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint

N, H, W = 5, 6, 7
TAU, SIGMA, STD = 0.8, 0.3, 2.0
GRID = Grid(torch.ones(H, W, dtype=torch.bool), 1000.0, 1000.0, "periodic", "periodic")
CPU = torch.device("cpu")


class Constant(torch.nn.Module, AroundMean):
    """Two networks for fields c ~ N(0, TAU^2), the same in all cells: the mean given n values with the error SIGMA,

    E[c | y] = sum(y) / (n + SIGMA^2 / TAU^2), and any denoiser of the residual. `fields` counts what each worked on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fields = {"mean": 0, "residual": 0}

    scale = torch.tensor(0.5, dtype=torch.float64)

    def mean(self, told: Tensor) -> Tensor:
        self.fields["mean"] += len(told)
        total = told[:, :2].sum(dim=(2, 3), keepdim=True)
        n = told[:, 2:3].sum(dim=(2, 3), keepdim=True)
        return (total / (n + (SIGMA / TAU) ** 2)).expand(-1, -1, H, W)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        self.fields["residual"] += len(x)
        return x[:, :2] / 3


def constant() -> tuple[Trained, Cases]:
    """A network with a regression, and cases of constant fields of which some cells are observed with an error."""
    generator = torch.Generator().manual_seed(0)
    normalizer = Normalizer(torch.zeros(2, H, W, dtype=torch.float64), STD).double()
    denoiser = Denoiser(Constant(), EDM(sigma_max=20.0), normalizer).eval()
    config = {"window": None, "dataset": {}, "trainer": {"condition_dropout": 0.1, "sigma_obs": 1.0}}
    trained = Trained(denoiser, GRID, SimpleNamespace(std=STD), "m s-1", {}, config, Path("run.pt"), 7)
    truth = (STD * TAU * torch.randn(N, 2, 1, 1, dtype=torch.float64, generator=generator)).expand(N, 2, H, W)
    observed = torch.rand(N, 1, H, W, generator=generator) < 0.4
    y = truth + STD * SIGMA * torch.randn(N, 2, H, W, dtype=torch.float64, generator=generator)
    sigma = torch.full((N, 1, 1, 1), STD * SIGMA, dtype=torch.float64)
    none = torch.zeros(N, 2, H, W, dtype=torch.bool)
    return trained, Cases(list(range(N)), truth, observed, none, torch.where(observed, y, math.nan), sigma, GRID)


def scored(name: str, trained: Trained, cases: Cases, **options: Any) -> tuple[list[Scored], dict[str, Any]]:
    """What `model_scored` makes of a network, and the fields that it collects."""
    config = main.config("ckpt=run", "members=4", "sampler.steps=3", "inpainting=conditional", "batch=8")
    method = method_of(config, trained, CPU)
    setting = Setting("mine", cases.numbers, cases.truth, cases.observed, GRID, torch.zeros(2, H, W), STD, 4)
    collected = Collection(100)
    study, model = SimpleNamespace(config=config), Network(name, trained, method, **options)
    experiment = TwinExperiment(setting, Full(), cases, [])
    return list(model_scored(study, model, cases, experiment, [collected])), collected.found


def test_the_regression_in_a_residual_is_one_evaluation_of_the_mean() -> None:
    """Its row is the closed form, worked out here in physical units."""
    trained, cases = constant()
    ((name, alone),) = regressions({"diffusion": trained}).items()
    (found,), collected = scored(name, alone, cases)
    assert (name, found.law) == ("regression", "point")
    assert torch.equal(Estimate.joined(collected["regression"]).members[:, N // 2], found.example.members)
    assert trained.denoiser.network.fields == {"mean": N, "residual": 0}
    mean = torch.stack([y[:, seen[0]].sum(dim=1) for y, seen in zip(cases.y, cases.observed, strict=True)])
    mean = mean / (cases.observed.sum(dim=(1, 2, 3)) + (SIGMA / TAU) ** 2)[:, None]
    error = (mean[..., None, None] - cases.truth).movedim(1, 0)[:, ~cases.observed[:, 0]]
    values = found.scores["hidden"]
    assert values["crps"].value == values["mae"].value == pytest.approx(error.abs().mean().item(), rel=1e-12)
    assert values["rmse_component"].value == pytest.approx(error.square().mean().sqrt().item(), rel=1e-12)
    rows = {row["metric"] for row in found.rows("mine", "m s-1") if row["region"] == "hidden"}
    assert not rows & {"spread", "spread_skill", "coverage_90", "reliability_index"} and "crps" in rows


def test_regressions_are_named_by_whose_they_are() -> None:
    trained, _ = constant()
    alone = regressions({"a": trained})["regression"]
    assert list(regressions({"a": trained, "b": alone})) == ["regression"]
    assert list(regressions({"a": trained, "b": trained})) == ["regression of a", "regression of b"]
    assert list(regressions({"a": trained, "regression": alone})) == ["regression of a"]
    assert chosen_baselines("all")[-1] == "regression" and chosen_baselines(["regression", "oi"]) == [
        "oi",
        "regression",
    ]


def test_a_calibrated_ensemble_is_the_same_members_with_their_spread_times_the_factor() -> None:
    factor = 1.7
    (plain,), _ = scored("diffusion", constant()[0], constant()[1])
    trained, cases = constant()
    (same, calibrated), collected = scored("diffusion", trained, cases, factor=factor)
    assert trained.denoiser.network.fields["residual"] == N * 4 * 3  # members, steps: nothing is sampled twice
    assert (same.method, calibrated.method) == ("diffusion", "diffusion calibrated") == tuple(collected)
    assert calibrated.seconds == same.seconds
    for before, after in zip(plain.example.members, same.example.members, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    old, new = same.example.members, calibrated.example.members
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new - new.mean(0), factor * (old - old.mean(0)), rtol=1e-10, atol=1e-12)
    for region in ("hidden", "observed"):
        first, second = same.scores[region], calibrated.scores[region]
        assert second["spread"].value == pytest.approx(factor * first["spread"].value, rel=1e-12)
        assert second["spread_skill"].value == pytest.approx(factor * first["spread_skill"].value, rel=1e-12)
        assert second["rmse_component"].value == pytest.approx(first["rmse_component"].value, rel=1e-12)
    assert calibrated.scores["hidden"]["crps"].value != same.scores["hidden"]["crps"].value
    fields = [Estimate.joined(collected[name]).members for name in ("diffusion calibrated", "diffusion")]
    assert fields[0].shape[:2] == fields[1].shape[:2] == (4, N) and not torch.equal(*fields)


# The program.

RUN, RESIDUAL, REGRESSION = (f"outputs/train/{name}" for name in ("run", "residual", "regression"))
FOUR = ["cases=4", "members=3", "sampler.steps=2"]


@pytest.fixture(scope="module")
def networks(place: Path) -> None:
    """A regression, and a network that has one, beside the run."""
    short = [*TINY, *SMALL, "trainer.max_steps=3"]
    for name, given in (("regression", "diffusion=regression"), ("residual", "model=residual")):
        trained_in(place, *short, given, f"name={name}")


def table(place: Path, name: str) -> dict[tuple[str, str, str], dict[str, float]]:
    """The scores by mask, method and region."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    with (place / "outputs" / "evaluate" / name / "scores.csv").open() as stream:
        for row in csv.DictReader(stream):
            at = (row["mask"], row["method"], row["region"])
            found.setdefault(at, {})[row["metric"]] = float(row["value"])
    return found


def judged(text: str) -> list[str]:
    """The methods whose errors a report puts first."""
    return re.findall(r"RMSE of hidden components: [^,]*? m s⁻¹ for ([\w ]+)[,.]", text)


def direct(ckpt: str) -> dict[str, float]:
    """The scores of the mean that a checkpoint gives of four cases behind a block, without a sampler."""
    trained = load_trained(ckpt, CPU)
    fields, offered = held_out(trained, "test")
    indices = [offered[i * len(offered) // 4] for i in range(4)]
    cases = make_cases(
        fields, indices, build(option("mask", "block"), "mask", trusted=True), seed=0, sigma_obs=0.02, add_error=True
    )
    denoiser = trained.denoiser
    observation = cases.observation(denoiser.normalizer, CPU)
    mean = denoiser.mean(observation)
    if mean is None:
        mean = denoiser(torch.zeros_like(observation.y), torch.full((4,), 100.0), observation)
    return scores(denoiser.normalizer.denormalize(mean)[None], cases.truth, cases.hidden, trained.grid)


def test_regressions_are_scored_beside_ensembles(place: Path, networks: None, run: Call) -> None:
    given = ["masks=[block]", "sigma_obs=0.02", *FOUR, "baselines=[climatology,regression]"]
    given += [f"ckpt=[{RUN},{RESIDUAL},{REGRESSION}]", "name=beside", "physics=divergence"]
    assert run("evaluate", *given)[::2] == (0, "")
    found = table(place, "beside")
    methods = {method for _, method, _ in found}
    assert methods == {"run", "residual", "regression", "regression of residual", "climatology"}
    for method, ckpt in (("regression", REGRESSION), ("regression of residual", RESIDUAL)):
        got, want = found["block", method, "hidden"], direct(ckpt)
        close = {name: value for name, value in want.items() if math.isfinite(value) and name != "divergence_rms"}
        assert {name: got[name] for name in close} == pytest.approx(close, rel=1e-3)  # bf16
        assert got["crps"] == got["mae"] and not got.keys() & {"spread", "spread_skill", "coverage_90"}
    assert "spread_skill" in found["block", "residual", "hidden"]
    text = (place / "outputs/evaluate/beside/report.html").read_text()
    assert judged(text) == ["run", "residual"] and "Too few to tell" in text


def test_a_regression_by_itself_is_what_is_judged(place: Path, networks: None, run: Call) -> None:
    few = ["masks=[none]", "baselines=climatology", *FOUR]
    assert run("evaluate", f"ckpt={REGRESSION}", "name=alone", *few)[::2] == (0, "")
    assert ("none", "regression", "hidden") in table(place, "alone")
    assert judged((place / "outputs/evaluate/alone/report.html").read_text()) == ["regression"]


def test_calibrated_rows(place: Path, networks: None, run: Call) -> None:
    """Every mask needs a factor, before anything is sampled; rows of calibrated ensembles stand beside the plain."""
    given = [f"ckpt=[{RUN},{REGRESSION}]", "inpainting=conditional", *FOUR, "calibrate=true", "baselines=climatology"]
    trained = load_trained(RUN, CPU)
    config = main.config(*given)
    for name, factor in (("block", 2.5), ("none", 30.0)):
        store_factor(trained.path, trained.step, process_of(config, option("mask", name), None), factor)
    bad = run("evaluate", *given, "name=lacking", "masks=[block,track]")
    is_message(bad, "masks=[track]: calibrate=true:", "vecfield-calibrate")
    is_message(run("evaluate", *given, "name=lacking", "masks=[block]", "sigma_obs=0.1"), "sigma_obs=0.0, not 0.1")
    assert not (place / "outputs/evaluate/lacking").exists()
    assert run("evaluate", *given, "name=scaled", "masks=[block,none]")[::2] == (0, "")
    found = table(place, "scaled")
    for mask, factor in (("block", 2.5), ("none", 30.0)):
        plain, scaled = (found[mask, name, "hidden"] for name in ("run", "run calibrated"))
        assert scaled["spread_skill"] == pytest.approx(factor * plain["spread_skill"], rel=1e-3)
        assert scaled["rmse_component"] == pytest.approx(plain["rmse_component"], rel=1e-4)
        assert (mask, "regression", "hidden") in found and (mask, "regression calibrated", "hidden") not in found
    held = [found["block", name, "observed"]["rmse_component"] for name in ("run", "run calibrated")]
    assert max(held) < 1e-6  # what was observed without error stays
    assert ("none", "run calibrated", "generated") in found
    state = load_checkpoint(trained.path)
    del state["calibration"]
    save_checkpoint(trained.path, state)
    is_message(run("evaluate", f"ckpt={REGRESSION}", "name=lacking", *FEW, "calibrate=true"), "has no spread")


@pytest.mark.parametrize(
    "sensor", ["sensor=component", "sensor=footprint", "sensor=radial sensor.sites=[[20e3,30e3],[600e3,100e3]]"]
)
def test_ensembles_of_what_an_instrument_sees_are_those_of_infer(place: Path, run: Call, sensor: str) -> None:
    """Both programs fill the same snapshots; what `fields.nc` holds is scored here."""
    how = [f"ckpt={RUN}", *sensor.split(), "members=3", "sampler.steps=2", "sigma_obs=0.02"]
    code, out, err = run("evaluate", *how, "name=seen", "masks=[pixels]", "cases=5", "baselines=[climatology,linear]")
    assert (code, err) == (0, "") and "note: linear take" in out
    found = table(place, "seen")
    assert {method for _, method, _ in found} == {"diffusion", "climatology"}
    assert run("infer", *how, "name=seen", "mask=pixels", "time=all")[::2] == (0, "")
    with xr.open_dataset(place / "outputs/infer/seen/fields.nc") as data:
        members = torch.stack([torch.from_numpy(data[f"{name}_members"].values) for name in "uv"], dim=2)
        truth = torch.stack([torch.from_numpy(data[f"{name}_truth"].values) for name in "uv"], dim=1)
        seen = torch.from_numpy(data["observed"].values > 0)[:, None]  # 2 and 3: one component
    assert len(truth) == 5
    for region, where in (("hidden", ~seen), ("observed", seen)):
        want = scores(members, truth, where)
        got = found["pixels", "diffusion", region]
        chosen = ("rmse_component", "crps", "spread", "correlation")
        assert {name: got[name] for name in chosen} == pytest.approx({name: want[name] for name in chosen}, rel=1e-2)
    # A baseline sees nothing of it: where the instrument looked it knows no more than elsewhere.
    blind = [found["pixels", "climatology", region]["rmse_component"] for region in ("observed", "hidden")]
    assert blind[0] == pytest.approx(blind[1], rel=0.3)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("baselines=regression", ("baselines=regression: no checkpoint holds one", "diffusion=regression", "ckpt=[")),
        ("baselines=[regresion]", ("Did you mean 'regression'?",)),
        ("sensor=radial sensor.velocity=[vr] sensor.bearing=[head]", ("sensor.velocity", "sensor.sites=")),
        ("sensor=footprint inpainting=conditional", ("sensor=footprint needs inpainting=mmps",)),
        (f"ckpt=[{RUN},{REGRESSION}] sensor=component", (f"ckpt={REGRESSION}: a regression takes", "sensor=none")),
    ],
)
def test_what_does_not_go_together(place: Path, networks: None, run: Call, given: str, parts: tuple[str, ...]) -> None:
    ckpt = [] if given.startswith("ckpt") else [f"ckpt={RUN}"]
    is_message(run("evaluate", *ckpt, "name=bad", *FEW, "cases=2", *given.split()), *parts)
    assert not (place / "outputs/evaluate/bad").exists()


def test_a_run_that_did_less_than_half_of_its_schedule_is_said(place: Path, networks: None, run: Call) -> None:
    """In the log and in the report; the last state of the run counts, not the step that was best."""
    state = load_checkpoint(place / RUN / "checkpoints/last.pt")
    config = yaml.safe_load(state["config"])
    config["trainer"]["max_steps"] = 100
    for folder, name, step in (("44", "best", 3), ("44", "last", 44), ("50", "best", 3), ("50", "last", 50)):
        path = place / f"short/{folder}/checkpoints/{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        counters = {**state["counters"], "step": step}
        save_checkpoint(path, {**state, "config": yaml.safe_dump(config), "counters": counters})
    assert unfinished(load_trained("short/50", CPU)) == "" == unfinished(load_trained("pretrained/agulhas", CPU))
    given = ["ckpt=short/44", "masks=[block]", "cases=2", "baselines=climatology", "name=short", *FEW]
    code, out, err = run("evaluate", *given)
    said = "its training did 44 of the 100 steps of its schedule: the network is not trained"
    assert (code, err) == (0, "") and said in out
    assert said in (place / "outputs/evaluate/short/report.html").read_text()


# Masks: gaps of other times, masks that cannot be scored, evaluations that stop and go on.


@pytest.fixture(scope="module")
def radar(place: Path) -> Path:
    """A checkpoint of data with gaps: the west or the east is missing in turn."""
    velocity = torch.randn(48, 2, 16, 16, generator=torch.Generator().manual_seed(5)).numpy()
    velocity[::2, :, :, :6] = math.nan
    velocity[1::2, :, :, 10:] = math.nan
    write_hdf5(place / "radar.h5", velocity, 40e3, 40e3, "periodic", "periodic", source="a radar")
    state = load_checkpoint(place / RUN / "checkpoints/last.pt")
    dataset = {"_target_": "vecfield_diffusion.data.hdf5.open_hdf5", "path": "radar.h5"}
    config = {**yaml.safe_load(state["config"]), "dataset": dataset}
    save_checkpoint(place / "radar.pt", {**state, "config": yaml.safe_dump(config)})
    return place / "radar.h5"


def test_gaps_are_those_of_other_times(place: Path, radar: Path, run: Call) -> None:
    """Each snapshot measures one side; hidden is what the other pattern lacks, and nothing else is scored."""
    given = ["ckpt=radar.pt", "data=radar.h5", "masks=[gaps]", "cases=4", "baselines=climatology", "name=radar", *FEW]
    code, out, err = run("evaluate", *given)
    assert (code, err) == (0, "") and "hides no cell" not in out
    with (place / "outputs/evaluate/radar/scores.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["metric"] == "rmse_component"]
    cells = {row["region"]: int(row["cells"]) for row in rows if row["method"] == "diffusion"}
    assert cells["hidden"] == 4 * 16 * 6 and cells["observed"] == 4 * 16 * 4


def test_a_pattern_is_drawn_among_those_that_hide_something_and_show_something() -> None:
    patterns = torch.zeros(4, 2, 3, dtype=torch.bool)
    patterns[0] = True  # hides nothing
    patterns[1, 0], patterns[2, 1] = True, True
    mask = OtherTimes(patterns)
    drawn = mask(200, torch.ones(2, 3, dtype=torch.bool), torch.Generator().manual_seed(0))[:, 0]
    kinds = [(drawn == pattern).flatten(1).all(dim=1) for pattern in patterns[1:3]]
    assert (kinds[0] ^ kinds[1]).all() and 60 < kinds[0].sum() < 140
    row = torch.tensor([[True, True, True], [False, False, False]])
    whole = mask(3, row, torch.Generator().manual_seed(0))[:, 0]
    assert (whole == row).all()  # no pattern hides some of the row and shows another: nothing to score


def test_a_mask_that_cannot_be_scored_does_not_end_the_others(place: Path, run: Call) -> None:
    few = ["cases=2", "baselines=climatology", "name=others", *FEW]
    code, out, err = run("evaluate", f"ckpt={RUN}", "masks=[gaps,block]", *few)
    assert (code, err) == (0, "") and "gaps hides no cell that is known, and is left out" in out
    assert {mask for mask, _, _ in table(place, "others")} == {"block"}
    is_message(run("evaluate", f"ckpt={RUN}", "masks=[gaps]", "name=bad", *few[:2], *FEW), "gaps hides no cell")


def test_few_independent_cases_are_said_to_be_too_few(place: Path, run: Call) -> None:
    given = [f"ckpt={RUN}", "masks=[block]", "cases=3", "baselines=climatology", "name=few", *FEW]
    _, out, _ = run("evaluate", *given)
    assert "note: Too few to tell which method is better" in out and "3 unseen snapshots" in out


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_while_data_are_opened_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
    name: str,
) -> None:
    monkeypatch.setattr(program, "open_experiments", lambda *given, **options: signal.raise_signal(number))
    with pytest.raises(SystemExit) as stop:
        program.evaluate(main.config("ckpt=run"), tmp_path)
    assert stop.value.code == code
    said = f"stopped by {name}: no mask finished and kept in {tmp_path}; the same command goes on\n"
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143)])
def test_what_is_finished_is_kept_and_the_same_command_goes_on(
    place: Path, run: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    name = f"stopped_{code}"
    given = [f"ckpt={RUN}", "masks=[block,none,pixels]", "cases=4", "baselines=[climatology,oi]", f"name={name}", *FEW]
    config = main.config(*given)
    folder = Path("outputs/evaluate") / name
    original, asked = program.scored_section, []

    def stopping(study: Any, trial: Any) -> Any:
        asked.append(trial.setting.mask)
        if trial.setting.mask == "pixels":
            os.kill(os.getpid(), number)
        return original(study, trial)

    monkeypatch.setattr(program, "scored_section", stopping)
    with pytest.raises(SystemExit) as stop:
        program.evaluate(config, folder)
    assert stop.value.code == code and asked == ["block", "none", "pixels"]
    stopped = f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}"
    kept = f"block, none finished and kept in {folder}; the same command goes on"
    assert capsys.readouterr().err == f"{stopped}: {kept}\n"
    half = table(place, name)
    assert {mask for mask, _, _ in half} == {"block", "none"} and not (folder / "report.html").exists()
    asked.clear()
    monkeypatch.setattr(program, "scored_section", lambda study, trial: asked.append(1) or original(study, trial))
    scores_after = program.evaluate(config, folder)
    assert asked == [1]  # only the mask that was not finished
    whole = table(place, name)
    assert {key: value for key, value in whole.items() if key[0] != "pixels"} == half
    assert ("none", "diffusion", "generated") in whole and scores_after["block/crps"] > 0
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "scores.csv"]
    fresh = program.evaluate(main.config(*given[:-1], f"name={name}", "sampler.steps=3"), folder)
    assert asked == [1, 1, 1, 1] and fresh["block/crps"] != scores_after["block/crps"]


def test_what_was_kept_of_another_command_or_is_damaged_is_not_used(place: Path, tmp_path: Path) -> None:
    kept = Kept(tmp_path, "key")
    kept.add("block", Section(*([None] * 3)))
    assert kept.find("block") is not None and kept.find("track") is None
    assert Kept(tmp_path, "other").find("block") is None
    path = tmp_path / "masks" / "block.pt"
    path.write_bytes(path.read_bytes()[:-20])
    assert kept.find("block") is None
    torch.save({"key": "key", "section": SimpleNamespace()}, path)  # a class that no section is made of
    assert kept.find("block") is None
    kept.clear()
    assert not path.exists()


def test_a_folder_that_cannot_be_written_is_met_before_the_first_mask(
    place: Path, run: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "scored_section", lambda *given: pytest.fail("a mask was scored"))
    original = Path.touch

    def refused(path: Path, *given: Any, **options: Any) -> None:
        if "readonly" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        original(path, *given, **options)

    monkeypatch.setattr(Path, "touch", refused)
    bad = run("evaluate", f"ckpt={RUN}", "masks=[block]", "cases=2", "baselines=climatology", "name=readonly", *FEW)
    is_message(bad, "outputs/evaluate/readonly: nothing can be written there (Permission denied)", "hydra.run.dir=")


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (["2020-01-01", "2020-01-02", "2020-01-03"], "1 day"),
        (["2020-01-01T00", "2020-01-01T06", "2020-01-03T06"], "6 hours to 2 days"),
        (["2020-01-01T00:00", "2020-01-01T00:30", "2020-01-01T01:00"], "30 minutes"),
    ],
)
def test_from_when_persistence_is(times: list[str], words: str) -> None:
    fields = SimpleNamespace(time=np.array(times, dtype="datetime64[ns]"))
    assert time_before(fields, [0, 1, 2]) == words
    for time in (None, np.arange(3.0)):
        assert time_before(SimpleNamespace(time=time), [0, 1, 2]) == "1 snapshot"


def test_all_baselines_leave_out_a_regression_that_there_is_not(place: Path, run: Call) -> None:
    few = ["masks=[block]", "cases=2", *FEW]
    assert run("evaluate", f"ckpt={RUN}", "name=all", "baselines=all", *few)[::2] == (0, "")
    assert not any("regression" in method for _, method, _ in table(place, "all"))


# Series.


@pytest.fixture(scope="module")
def drifting(place: Path) -> str:
    """The run with other data: smooth waves that drift over a day's step, from which a snapshot each is missing."""
    generator = np.random.default_rng(0)
    x = 2 * np.pi * np.arange(16) / 16
    time = np.delete(np.arange(60), [20, 57])
    velocity = np.zeros((len(time), 2, 16, 16), dtype=np.float32)
    for _ in range(200):
        column, row = generator.integers(-6, 7, size=2)
        angle = column * x + row * x[:, None] + (0.15 * column + 0.1 * generator.random()) * time[:, None, None]
        size = generator.standard_normal(2) / (1 + column**2 + row**2)
        velocity[:, 0] += size[0] * np.cos(angle + 2 * np.pi * generator.random())
        velocity[:, 1] += size[1] * np.cos(angle + 2 * np.pi * generator.random())
    seconds = 86400.0 * time
    write_hdf5(place / "drifting.h5", 0.2 * velocity, 40e3, 40e3, "periodic", "periodic", source="made", time=seconds)
    with h5py.File(place / "drifting.h5", "a") as file:
        file["time"].attrs["units"] = "seconds since 2020-01-01"
    state = load_checkpoint(place / RUN / "checkpoints/last.pt")
    dataset = {"_target_": "vecfield_diffusion.data.hdf5.open_hdf5", "path": "drifting.h5"}
    config = {**yaml.safe_load(state["config"]), "dataset": dataset}
    split = {"train": [0, 40], "validation": [42, 44], "test": [44, 58]}
    data = {**state["data"], "split": split}
    save_checkpoint(place / "drifting.pt", {**state, "config": yaml.safe_dump(config), "data": data})
    return "ckpt=drifting.pt"


SERIES = ["last_observed", "linear_in_time", "oi_spacetime", "extended_eof", "dineof_spacetime"]
LABELS = {"last value of the cell", "linear in time", "OI in space and time", "extended EOFs"}
LABELS |= {"DINEOF in space and time"}


def test_baselines_of_series_fill_from_the_unseen_snapshots_around(place: Path, drifting: str, run: Call) -> None:
    """Interpolation in time is worked out here from the cases of the neighbours, with the same masks and errors."""
    few = [drifting, "data=drifting.h5", "masks=[pixels]", "cases=3", "sigma_obs=0.01", *FEW]
    code, out, err = run("evaluate", *few, "name=around", f"baselines=[climatology,oi,{','.join(SERIES)}]")
    assert (code, err) == (0, "") and "oi_spacetime: " in out and "left out" not in out
    found = {method: row for (_, method, region), row in table(place, "around").items() if region == "hidden"}
    assert found.keys() == {"diffusion", "climatology", "optimal interpolation", *LABELS}
    assert found["OI in space and time"]["rmse_component"] < 0.5 * found["optimal interpolation"]["rmse_component"]
    assert 0.5 < found["OI in space and time"]["spread_skill"] < 2 and "spread" not in found["linear in time"]
    fields, offered = held_out(load_trained("drifting.pt", CPU), "test", data="drifting.h5")
    mask, numbers = build(option("mask", "pixels"), "mask", trusted=True), list(offered)
    cases = make_cases(fields, numbers, mask, seed=0, sigma_obs=0.01, add_error=True)
    frames = [number + (number >= 20) + (number >= 56) for number in numbers]  # two are missing
    series = np.full((frames[-1] - frames[0] + 1, 2, 16, 16), np.nan)
    series[np.array(frames) - frames[0]] = cases.y.numpy()
    scored = [numbers[k * 14 // 3] for k in range(3)]
    mean = fields.read(range(40)).mean(dim=0).numpy()
    square = []
    for number in scored:
        at = numbers.index(number)
        guess = along_time(series, frames[at] - frames[0])
        guess = np.where(np.isfinite(guess), guess, mean)
        square.append((guess - cases.truth[at].numpy())[:, cases.hidden[at, 0].numpy()] ** 2)
    want = float(np.sqrt(np.concatenate(square, axis=1).mean()))
    assert found["linear in time"]["rmse_component"] == pytest.approx(want, rel=1e-5)


def test_past_alone_leaves_out_what_needs_later_snapshots(place: Path, drifting: str, run: Call) -> None:
    few = [drifting, "data=drifting.h5", "masks=[pixels]", "cases=3", *FEW, "name=past", "time_context=past"]
    code, out, _ = run("evaluate", *few, "baselines=[linear_in_time,last_observed,dineof_spacetime]")
    assert code == 0 and "note: linear_in_time is left out: without later observations it is last_observed" in out
    assert "note: dineof_spacetime is left out: without later observations it fills all frames at once" in out
    assert {method for _, method, _ in table(place, "past")} == {"diffusion", "last value of the cell"}


def test_a_series_is_scored_as_trajectories(place: Path, drifting: str, run: Call) -> None:
    """The longest stretch without a missing snapshot, 12 of 14; scores are those of the same arrays."""
    given = [drifting, "data=drifting.h5", "masks=[pixels,none]", "series=true", "name=series", *FEW]
    given += ["baselines=[linear,linear_in_time,oi,oi_spacetime]"]
    code, out, err = run("evaluate", *given)
    assert (code, err) == (0, "") and "12 unseen snapshots of drifting.h5, one after the other" in out
    found = table(place, "series")
    ours, law = found["pixels", "diffusion", "members"], found["pixels", "OI in space and time", "members"]
    names = ("increments", "lag_correlation", "separation")
    for row in (ours, law):
        assert {f"{name}_{lag}" for name in names for lag in (1, 3, 5)} <= row.keys()
    assert law["lag_correlation_1"] == pytest.approx(found["pixels", "truth", "mean"]["lag_correlation_1"], abs=0.05)
    assert abs(law["increments_1"] - 1) < 0.5 and law["rotary_error"] < ours["rotary_error"]
    of_means = {method: row for (mask, method, of), row in found.items() if (mask, of) == ("pixels", "mean")}
    means = {method: row["separation_5"] for method, row in of_means.items() if method != "truth"}
    assert means.keys() == {"diffusion", "linear", "linear in time", "optimal interpolation", "OI in space and time"}
    assert min(means, key=means.get) == "OI in space and time"
    assert ("pixels", "optimal interpolation", "members") not in found
    assert found["none", "linear in time", "hidden"] == found["none", "linear", "hidden"]  # nothing is observed
    assert ("none", "diffusion", "members") in found and ("none", "diffusion", "generated") in found
    text = (place / "outputs/evaluate/series/report.html").read_text()
    assert "After 5 steps drifters in diffusion are" in text and "<th>series</th>" in text
    assert "energy by frequency" in text


def test_what_is_no_series_is_refused_or_said(place: Path, drifting: str, run: Call) -> None:
    few = ["masks=[pixels]", *FEW, "name=none"]
    code, out, _ = run("evaluate", f"ckpt={RUN}", *few, "cases=2", "baselines=[linear_in_time,oi_spacetime]")
    assert code == 0 and "note: linear_in_time, oi_spacetime are left out: the correlation with the snapshot" in out
    is_message(run("evaluate", f"ckpt={RUN}", *few, "series=true"), "series=true", "are no series", "correlation")
    short = [drifting, "data=drifting.h5", *few, "series=true", "cases=3"]
    is_message(run("evaluate", *short), "series=true", "need 4 snapshots that follow one another", "keeps 3")
    is_message(run("evaluate", *short, "time_context=later"), "time_context", "both", "past")


def test_frames_that_jump_too_often_leave_series_out(place: Path, drifting: str) -> None:
    """Neighbours, training frames and stretches are those of equal steps, missing snapshots included."""
    frames = np.array([0, 1, 2, 4, 5, 40, 41, 42, 43, 80])
    assert neighbours(frames, range(3, 10), [4]) == [3, 4]
    assert neighbours(frames, range(3, 10), [4, 9]) == [3, 4, 9]
    cases = SimpleNamespace(
        numbers=[3, 4, 5, 6, 9], y=torch.arange(5.0)[:, None, None, None].expand(5, 2, 1, 2),
        sigma_obs=torch.tensor([0.0, 0.3, 0.0, 0.0, 0.0])[:, None, None, None],
    )  # fmt: skip
    parts = observations(cases, Timeline(frames, 20, ""), [4, 6], 0.1)  # two of three runs hold one that is wanted
    assert [part.frames for part in parts] == [[1], [1]] and [len(part.y) for part in parts] == [2, 2]
    assert parts[0].y[:, 0, 0, 0].tolist() == [0, 1] and parts[1].y[:, 1, 0, 1].tolist() == [2, 3]
    assert parts[0].noise[:, 0, 0, 0].tolist() == pytest.approx([0.01, 0.09])
    assert consecutive(frames, range(0, 10), 50, "file") == [5, 6, 7, 8]
    assert consecutive(frames, range(0, 10), 4, "file") == [5, 6, 7, 8]
    fields = SimpleNamespace(
        grid=Grid(torch.ones(1, 2, dtype=torch.bool)), shape=(1, 2),
        read=lambda at: torch.as_tensor(np.asarray(at, dtype=float))[:, None, None, None].expand(-1, 2, 1, 2),
    )  # fmt: skip
    found = training_frames(fields, frames, range(1, 5))
    assert found[:, 0, 0, 0].tolist() == pytest.approx([1, 2, math.nan, 3, 4], nan_ok=True)


@pytest.mark.parametrize(
    ("time", "attrs", "units", "want"),
    [
        (np.arange("2020-01-01", "2020-01-09", np.timedelta64(1, "D"), dtype="datetime64[ns]"), {}, "m s-1",
         (1.0, "day", 86400.0)),
        (np.arange("2020-01-01T00", "2020-01-01T08", dtype="datetime64[h]").astype("datetime64[ns]"), {}, "m s-1",
         (1.0, "h", 3600.0)),
        (600.0 * np.arange(5), {"units": "seconds since start"}, "m s-1", (600.0, "seconds", 600.0)),
        (0.5 * np.arange(5), {}, "1 (of the free stream)", (0.5, "unit of time", 0.5)),
        (0.5 * np.arange(5), {}, "m s-1", (0.5, "unit of time", None)),
        (None, {}, "m s-1", (1.0, "step", None)),
    ],
)  # fmt: skip
def test_the_step_of_a_series(time: np.ndarray | None, attrs: dict[str, str], units: str, want: tuple) -> None:
    assert step_of(SimpleNamespace(time=time, time_attrs=attrs, units=units)) == want
