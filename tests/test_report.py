"""Methods compared on the same cases, the words and figures made of it, and `evaluate.py` from end to end."""

from __future__ import annotations

import base64
import csv
import functools
import io
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.image import imread
from programs import FEW, Call, is_message
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from vecfield_diffusion import commands
from vecfield_diffusion.config.build import build
from vecfield_diffusion.config.program import option
from vecfield_diffusion.evaluation.baselines import BASELINES, fit_baselines, unsuited
from vecfield_diffusion.evaluation.bootstrap import resamples
from vecfield_diffusion.evaluation.comparison import (
    Estimate,
    Score,
    Scored,
    Setting,
    derived,
    gaussian_crps,
    method_sums,
    ratio,
    scales,
    score,
    spread_bins,
)
from vecfield_diffusion.evaluation.generation import Generated
from vecfield_diffusion.evaluation.metrics import scores
from vecfield_diffusion.evaluation.plots import NARROW, WIDE
from vecfield_diffusion.evaluation.report import Section, _distance_label, render
from vecfield_diffusion.evaluation.scores import columns, heading
from vecfield_diffusion.evaluation.spectra import resolved
from vecfield_diffusion.evaluation.tables import rounded_pair
from vecfield_diffusion.evaluation.verdicts import compared, spread_sentence
from vecfield_diffusion.inference.cases import make_cases
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import divergence
from vecfield_diffusion.programs.compared import named_runs
from vecfield_diffusion.programs.fill import fill_cases
from vecfield_diffusion.programs.method import build_method, resolve_method
from vecfield_diffusion.programs.trained import held_out, load_trained
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint

N, H, W = 6, 8, 10
GRID = Grid(torch.ones(H, W, dtype=torch.bool), 1000.0, 1000.0, "periodic", "periodic")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(truth: Tensor, ensemble: int = 5) -> Setting:
    observed = torch.zeros(len(truth), 1, H, W, dtype=torch.bool)
    observed[..., :2] = True
    return Setting("strip", range(len(truth)), truth, observed, GRID, torch.zeros(2, H, W), 1.0, ensemble)


def found(estimate: Estimate, given: Setting, at_once: int = 2, method: str = "ours") -> Scored:
    members, std, _ = estimate
    return score(method, lambda s: Estimate(members[:, s], None if std is None else std[s]), given, at_once)


# Laws.


@pytest.mark.parametrize(("mean", "std", "y"), [(0.3, 0.7, 1.9), (0.0, 1.0, 0.0), (-1.0, 2.0, -4.0)])
def test_the_crps_of_a_gaussian_is_its_integral(mean: float, std: float, y: float) -> None:
    below = quad(lambda x: norm.cdf(x, mean, std) ** 2, mean - 12 * std, y)[0]
    above = quad(lambda x: norm.sf(x, mean, std) ** 2, y, mean + 12 * std)[0]
    got = gaussian_crps(*(torch.tensor(each, dtype=torch.float64) for each in (mean, std, y)))
    assert float(got) == pytest.approx(below + above, rel=1e-7)


def test_the_crps_without_spread_is_the_absolute_error() -> None:
    assert float(gaussian_crps(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(-2.0))) == 3.0


def test_a_calibrated_law_is_found_calibrated() -> None:
    """Truths drawn from the law itself: spread and error agree, ranks are flat, the CRPS is std / sqrt(pi)."""
    std = 0.1 + noise(40, 2, H, W, seed=1).abs()
    truth = std * noise(40, 2, H, W, seed=2)
    where = torch.ones(40, 1, H, W, dtype=torch.bool)
    law = Estimate(torch.zeros(1, 40, 2, H, W, dtype=torch.float64), std)
    sums = method_sums(law, truth, where, GRID, torch.zeros(2, H, W), ensemble=9)
    values = derived({name: value.sum(dim=0) for name, value in sums.items()}, "gaussian")
    assert float(values["spread"]) == pytest.approx(float(std.square().mean().sqrt()), rel=1e-12)
    assert float(values["spread_skill"]) == pytest.approx(float(values["spread"] / values["rmse_component"]), rel=1e-12)
    assert float(values["spread_skill"]) == pytest.approx(1.0, abs=0.03)
    assert float(values["crps"]) == pytest.approx(float(std.mean()) / math.sqrt(math.pi), rel=0.03)
    assert float(values["coverage_50"]) == pytest.approx(0.5, abs=0.02)
    assert float(values["mae"]) == pytest.approx(float(truth.abs().mean()), rel=1e-12)
    ranks = sums["ranks"].sum(dim=0)
    assert ranks.shape == (10,) and float(ranks.sum()) == truth.numel()
    assert torch.equal(ranks, torch.histc(torch.special.ndtr(truth / std), 10, 0, 1))


# Scores.


def test_scores_taken_in_parts_are_those_of_the_whole() -> None:
    truth = noise(N, 2, H, W, seed=3)
    members = truth + noise(5, N, 2, H, W, seed=4)
    given = setting(truth)
    got = found(Estimate(members), given)
    want = scores(members, truth, given.regions["hidden"], GRID, given.climatology)
    assert {name: got.scores["hidden"][name].value for name in want} == pytest.approx(want, rel=1e-12)
    hidden = given.regions["hidden"].expand_as(truth)
    error = (members.mean(dim=0) - truth).abs()[hidden].mean()
    assert got.scores["hidden"]["mae"].value == pytest.approx(float(error), rel=1e-12)
    assert got.scores["hidden"]["crps"][3:] == (N, N * H * (W - 2))
    near = got.scores["hidden d <= 1"]["rmse_component"].value
    one = torch.zeros_like(given.observed)
    one[..., [2, W - 1]] = True  # the domain closes
    assert near == pytest.approx(scores(members, truth, one)["rmse_component"], rel=1e-12)
    assert torch.equal(got.example.members, members[:, N // 2])


def test_intervals_hold_the_value_and_vanish_for_equal_cases() -> None:
    truth = noise(12, 2, H, W, seed=5)
    mixed = found(Estimate((truth + noise(12, 1, 1, 1, seed=6))[None]), setting(truth)).scores["hidden"]
    for name in ("rmse_component", "crps", "mae", "relative_l2"):
        assert mixed[name].low < mixed[name].value < mixed[name].high
    same = truth[:1].expand_as(truth)
    equal = found(Estimate((same + noise(1, 2, H, W, seed=7))[None]), setting(same)).scores["hidden"]
    for name in ("rmse_component", "crps", "correlation"):
        assert equal[name].low == pytest.approx(equal[name].value, rel=1e-9)
        assert equal[name].high == pytest.approx(equal[name].value, rel=1e-9)


def test_a_ratio_is_taken_within_each_resample() -> None:
    """Errors that are half as large in every case: the interval has no width, however much the cases differ."""
    truth, error = noise(9, 2, H, W, seed=8), noise(9, 2, H, W, seed=9) * torch.arange(1, 10).view(-1, 1, 1, 1)
    ours, theirs = (found(Estimate((truth + part * error)[None]), setting(truth)) for part in (0.5, 1.0))
    assert ratio(ours, theirs, "rmse_component")[:3] == pytest.approx((0.5, 0.5, 0.5), rel=1e-9)
    assert ours.scores["hidden"]["rmse_component"].high > 1.1 * ours.scores["hidden"]["rmse_component"].value


def test_spread_is_compared_with_error_bin_by_bin() -> None:
    """Two members a either side of their mean: variance 2 a^2, times 3 / 2 for one more draw."""
    truth = torch.zeros(1, 2, H, W, dtype=torch.float64)
    a = torch.full_like(truth, 0.1)
    a[:, :, :, 5:] = 1.0
    members = 0.3 + torch.stack((a, -a))
    count, variance, error = spread_bins(Estimate(members), truth, torch.ones(1, 1, H, W, dtype=torch.bool), 1.0)
    used = count > 0
    assert count[used].tolist() == [80.0, 80.0]
    assert (variance / count)[used].tolist() == pytest.approx([0.03, 3.0])
    assert (error / count)[used].tolist() == pytest.approx([0.09, 0.09])


def test_spectra_of_truth_members_and_error() -> None:
    """A wave, a member with twice its amplitude and another without any: mean energies 1, (4 + 0) / 2, error 0."""
    x = 2 * math.pi * torch.arange(W, dtype=torch.float64) / W
    wave = torch.stack((torch.zeros(H, W, dtype=torch.float64), torch.sin(2 * x).expand(H, W)))
    truth = wave.expand(3, 2, H, W)
    got = found(Estimate(torch.stack((2 * truth, 0 * truth))), setting(truth))
    peak = int(got.signal.argmax())
    assert float(got.spectrum[peak] / got.signal[peak]) == pytest.approx(2.0)
    assert float(got.noise.abs().max()) < 1e-12 * float(got.signal[peak])


def test_scales_of_members_and_of_the_error() -> None:
    """Members of 1.1 the amplitude of the truth have 1.21 its energy; the error of their mean is 0.01 of it."""
    truth = noise(N, 2, H, W, seed=20)
    got = found(Estimate(torch.stack((1.1 * truth, 1.1 * truth))), setting(truth)).scores["field"]
    assert got["spectrum_error"] == pytest.approx((0.21, 0.21, 0.21, N, 0))
    assert got["effective_resolution"] == pytest.approx((2000.0, 2000.0, 2000.0, N, 0))  # two cells
    none = found(Estimate(torch.zeros(1, N, 2, H, W)), setting(truth))
    assert none.scores["field"]["spectrum_error"].value == pytest.approx(1.0)
    assert none.scores["field"]["effective_resolution"][:3] == (math.inf,) * 3
    lines = {line["metric"]: line for line in none.rows("strip", "m s-1") if line["region"] == "field"}
    assert (lines["effective_resolution"]["units"], lines["spectrum_error"]["units"]) == ("m", "1")


def test_scales_are_resampled_with_their_cases() -> None:
    """Resamples taken one by one; the spectrum of the truth ends before its last shell, and errors grow with it."""
    cases, shells = 9, 12
    k = torch.arange(shells).double()
    signal = (k + 1) ** -2 * (1 + 0.3 * noise(cases, shells, seed=21).abs()) * torch.where(k < 9, 1.0, 1e-9)
    spectrum = signal * (1 + 0.2 * noise(cases, shells, seed=22))
    error = signal * k / 10 * noise(cases, 1, seed=23).abs()
    got = scales(k, spectrum, error, signal)
    deviation, length = [], []
    for chosen in [torch.arange(cases), *resamples(cases)]:
        energy, missed, truth = (each[chosen].mean(dim=0) for each in (spectrum, error, signal))
        deviation.append(float(max(abs(energy[j] / truth[j] - 1) for j in range(1, 7))))  # 3/4 of shell 8
        length.append(2 * math.pi / float(resolved(k, missed, truth)))
    low, middle, high = np.quantile(deviation[1:], [0.025, 0.5, 0.975]) - deviation[0]
    assert got["spectrum_error"].value == pytest.approx(deviation[0])
    assert got["spectrum_error"].low == pytest.approx(max(0, deviation[0] + low - middle), abs=1e-4)
    assert got["spectrum_error"].high == pytest.approx(deviation[0] + high - middle, abs=1e-4)
    ends = np.quantile(length[1:], [0.025, 0.975])
    assert got["effective_resolution"][:3] == pytest.approx([length[0], *ends], rel=1e-2)
    assert ends[0] < 0.95 * length[0] < 0.9 * ends[1]


def test_without_a_rectangle_there_are_no_scales() -> None:
    truth = noise(N, 2, H, W, seed=24)
    truth[:, :, ::3] = math.nan
    got = found(Estimate(truth.nan_to_num()[None]), setting(truth))
    assert got.spectrum is None and math.isnan(got.scores["field"]["spectrum_error"].value)
    assert not {"spectrum_error", "effective_resolution"} & {line["metric"] for line in got.rows("strip", "m s-1")}


# Words.


@pytest.mark.parametrize(
    ("quotient", "words"),
    [
        (Score(0.88, 0.84, 0.93), "is 12 % (95 % interval 7 to 16 %) smaller than"),
        (Score(1.25, 1.1, 1.5), "is 25 % (95 % interval 10 to 50 %) larger than"),
        (Score(2.5, 2.0, 3.0), "is 2.5 (95 % interval 2.0 to 3.0) times"),
        (Score(0.95, 0.9, 1.01), "does not clearly differ (ratio 0.95, 95 % interval 0.90 to 1.01) from"),
    ],
)
def test_a_ratio_in_words(quotient: Score, words: str) -> None:
    assert compared(quotient) == words


@pytest.mark.parametrize(
    ("factor", "words"), [(1.0, "is calibrated"), (0.5, "is overconfident"), (1.6, "is underconfident")]
)
def test_the_spread_in_words(factor: float, words: str) -> None:
    truth = noise(12, 2, H, W, seed=10)
    assert words in spread_sentence(found(Estimate(factor * noise(30, 12, 2, H, W, seed=11)), setting(truth, 30)))


def test_a_wide_interval_about_one_is_no_proof_of_calibration() -> None:
    ours = found(Estimate(noise(30, 12, 2, H, W, seed=11)), setting(noise(12, 2, H, W, seed=10), 30))
    hidden = ours.scores["hidden"]
    for ends, words in (
        ((1.02, 0.95, 1.09), "is calibrated"),
        ((1.02, 0.7, 1.4), "may be calibrated"),
        ((0.93, 0.85, 0.98), "may be calibrated"),
        ((0.8, 0.7, 0.9), "is overconfident"),
        ((1.3, 1.1, 1.4), "is underconfident"),
        ((1.3, 0.9, 1.7), "may be calibrated"),
    ):
        hidden["spread_skill"] = Score(*ends)
        assert words in spread_sentence(ours)


# The file.


class Reader(HTMLParser):
    """What a browser would load, and whether the tags that open close."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.others: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "img":
            self.images.append(given["src"])
        self.others += [given[key] for key in ("href", "src") if key in given and tag != "img"]
        if tag == "source":
            self.images.append(given["srcset"])
        if tag not in ("img", "meta", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str, folder: Path) -> Reader:
    """The report, which holds all that it shows."""
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and all(each.startswith("#") for each in reader.others)
    assert "http" not in text and "<script" not in text and "url(" not in text
    for number, source in enumerate(reader.images):
        assert source.startswith("data:image/png;base64,")
        file = folder / f"{number}.png"
        file.write_bytes(base64.b64decode(source.partition(",")[2], validate=True))
        picture = imread(file)
        assert picture.shape[0] > 100 and np.ptp(picture[..., :3]) > 0.5
    return reader


@pytest.mark.usefixtures("rendered")
def test_the_report_holds_all_that_it_shows(tmp_path: Path) -> None:
    truth = noise(N, 2, H, W, seed=12)
    given = setting(truth)
    methods = {
        "a <b>": Estimate(truth + noise(5, N, 2, H, W, seed=13)),
        "optimal interpolation": Estimate((truth + 1)[None], torch.ones_like(truth)),
        "linear": Estimate((truth - 2)[None]),
    }
    scored = [found(each, given, method=name) for name, each in methods.items()]
    train = noise(20, 2, H, W, seed=14)
    generated = Generated.of({"a <b>": noise(16, 2, H, W, seed=15)}, noise(16, 2, H, W, seed=16), train, GRID)
    sections = [Section(given, scored, ["a <b>"]), Section(given, scored, ["a <b>"], generated)]
    text = render("trial", sections, {"data": "file.nc", "note": "x\ny"}, "m s-1", data="file.nc", network="UNet")
    assert len(read(text, tmp_path).images) == 2 * (5 + 6 + 1)
    assert "<title>UNet on file.nc</title>" in text and '<p class="name">trial</p>' in text
    assert 'effective resolution <span class="unit">[m] ↓</span></th>' in text and "<th>energy ratio → 1</th>" in text
    first = next(line for line in sections[1].rows("m s-1") if line["region"] == "generated")
    assert first["low"] < first["value"] < first["high"] and first["cases"] == 16
    value, half = rounded_pair(*(first[key] for key in ("value", "low", "high")))
    assert f'<td data-label="energy ratio → 1"><span>{value} <small>± {half}</small></span></td>' in text
    assert [line["metric"] for line in sections[1].rows("m s-1") if line["region"] == "generated"][:1] == [
        "energy_ratio"
    ]


@functools.cache
def methods(cases: int) -> tuple[Setting, list[Scored]]:
    """A network, and an interpolation with errors twice as large."""
    truth = noise(cases, 2, H, W, seed=12)
    given = setting(truth, ensemble=30)
    members = truth + 0.3 * noise(1, cases, 2, H, W, seed=14) + 0.3 * noise(30, cases, 2, H, W, seed=13)
    law = Estimate((truth + 0.6 * noise(cases, 2, H, W, seed=15))[None], torch.full_like(truth, 0.6))
    return given, [found(Estimate(members), given), found(law, given, method="optimal interpolation")]


def report(cases: int, **more: object) -> Section:
    """What was found of both."""
    given, scored = methods(cases)
    return Section(given, scored, ["ours"], **more)


def test_a_verdict_needs_ten_independent_cases() -> None:
    """The same scores: a verdict from twelve cases, none from nine, nor from twelve that count as three."""
    better, closer, spread = report(12).sentences("m s-1")
    assert (
        "error of ours is" in better and "smaller than that of optimal interpolation, the best other method" in better
    )
    assert "CRPS of ours" in closer and "Spread: ours is calibrated" in spread
    assert report(12, independent=11.0).sentences("m s-1") == [better, closer, spread]
    for few, words in (
        (report(9), "9 unseen snapshots. A verdict needs 10"),
        (
            report(12, independent=3.2),
            "12 unseen snapshots, which resemble each other and count as 3.2 independent ones.",
        ),
    ):
        doubt, numbers = few.sentences("m s-1")
        assert doubt.startswith("Too few to tell") and words in doubt
        assert numbers.startswith("RMSE of hidden components: 0.3") and " ± " in numbers
        text = render("trial", [few], {}, "m s-1")
        for verdict in ("calibrated:", "confident:", "smaller than", "larger than", 'class="top"'):
            assert verdict not in text
    assert 'class="top"' in render("trial", [report(12)], {}, "m s-1")


def test_the_best_of_a_column_is_what_its_score_calls_better() -> None:
    section = report(12)
    text = render("trial", [section], {}, "m s-1")
    rows = [line for line in text.splitlines() if line.startswith("<tr class=") and "head" not in line]
    ours, other = ({name for name in columns("report") if _is_top(row, name)} for row in rows)
    assert {"rmse_component", "crps", "correlation", "mae"} <= ours
    assert ours & other == {"effective_resolution"}  # both as fine as the grid


def _is_top(row: str, name: str) -> bool:
    return f'<td data-label="{heading(name, "m s-1")}' in row and re.search(
        f'data-label="{re.escape(heading(name, "m s-1"))}[^"]*" class="top"', row
    )


def test_the_report_says_when_its_snapshots_were() -> None:
    dates = [f"2002-07-{day:02d}" for day in range(1, 13)]
    text = render("trial", [report(12, dates=dates)], {}, "m s-1")
    assert "12 unseen snapshots, 2002-07-01 to 2002-07-12</h2>" in text
    assert "<figcaption>2002-07-07, filled by ours</figcaption>" in text and "2002-07-03, 2002-07-04" in text
    noted = render("trial", [report(12)], {}, "m s-1", notes=["test snapshots are 5 times stronger"])
    assert noted.index("<li>test snapshots are 5 times stronger</li>") < noted.index("<h2")
    plain = render("trial", [report(12)], {}, "m s-1")
    assert "12 unseen snapshots</h2>" in plain and "<figcaption>snapshot 6, filled by ours</figcaption>" in plain


@pytest.mark.usefixtures("rendered")
def test_figures_come_in_two_widths_for_letters_of_one_size(tmp_path: Path) -> None:
    """On a telephone of 420 pixels a narrow figure is shrunk to seven eighths at most."""
    text = render("trial", [report(12)], {}, "m s-1")
    assert _distance_label("d <= 1") == "≤ 1"
    assert [_distance_label(name) for name in ("1 < d <= 2", "d > 16")] == ["1–2", "> 16"]
    assert text.count("<picture>") == text.count('media="(max-width: 800px)"') == 6
    sizes = [
        imread(io.BytesIO(base64.b64decode(source.partition(",")[2]))).shape for source in read(text, tmp_path).images
    ]
    assert {size[1] for size in sizes} == {round(100 * WIDE), round(150 * NARROW)}
    assert (420 - 2 * 0.9 * 15) / (100 * NARROW) > 7 / 8


# The program.


@pytest.mark.parametrize(("share", "names"), [(0.1, ["OI without divergence"]), (0.3, [])])
def test_a_covariance_without_divergence_is_for_flows_without(share: float, names: list[str]) -> None:
    reasons = unsuited(["oi_solenoidal"], divergence_share=share, persistence=1.0)
    suited = [key for key in ["oi_solenoidal"] if key not in reasons]
    assert [BASELINES[key].label for key in suited] == names
    for baseline in fit_baselines(suited, noise(20, 2, H, W, seed=18).numpy(), GRID).values():
        mean, _ = baseline.posterior(noise(2, H, W, seed=19).numpy(), np.eye(H, W, dtype=bool), 0.1)
        assert divergence(torch.from_numpy(mean)[None], GRID).abs().max() < 1e-12


def rows_of(place: Path, name: str) -> list[dict[str, str]]:
    with (place / "outputs" / "evaluate" / name / "scores.csv").open() as stream:
        return list(csv.DictReader(stream))


def values(rows: list[dict[str, str]], method: str, region: str = "hidden") -> dict[str, float]:
    chosen = (row for row in rows if row["method"] == method and row["region"] == region)
    return {row["metric"]: float(row["value"]) for row in chosen if row["value"]}


@pytest.fixture
def twin(place: Path) -> str:
    """A copy of the run, which is another checkpoint with the same network."""
    other = place / "outputs" / "train" / "copy"
    if not other.exists():
        shutil.copytree(place / "outputs" / "train" / "run", other)
    return "outputs/train/copy"


@pytest.mark.usefixtures("rendered")
def test_scores_are_those_of_the_members(place: Path, run: Call, tmp_path: Path) -> None:
    few = ["cases=4", "members=3", "sampler.steps=2", "batch=6", "sigma_obs=0.02"]
    code, out, err = run(
        "evaluate",
        "ckpt=outputs/train/run",
        "name=exact",
        "masks=[block]",
        *few,
        "baselines=[linear,oi,oi_solenoidal,dineof]",
    )
    assert (code, err) == (0, "")
    rows = rows_of(place, "exact")
    config = commands.evaluate.config("ckpt=outputs/train/run", "masks=[block]", *few)
    trained = load_trained("outputs/train/run", torch.device("cpu"))
    fields, offered = held_out(trained, "test")
    indices = [offered[i * len(offered) // 4] for i in range(4)]
    cases = make_cases(
        fields, indices, build(option("mask", "block"), "mask", trusted=True), seed=0, sigma_obs=0.02, add_error=True
    )
    method = resolve_method(config, build_method(config, trained, torch.device("cpu")), trained, cases)
    members = fill_cases(config, trained=trained, method=method, cases=cases)
    want = scores(members, cases.truth, cases.hidden, trained.grid)
    got = values(rows, "diffusion")
    assert {name: got[name] for name in want} == pytest.approx(want, rel=2e-3)  # batches differ, bf16
    table = {(row["method"], row["metric"]): row for row in rows if row["region"] == "hidden"}
    assert table["linear", "crps"]["value"] == table["linear", "mae"]["value"]
    assert float(table["optimal interpolation", "crps"]["value"]) < float(
        table["optimal interpolation", "mae"]["value"]
    )
    assert table["diffusion", "crps"]["cells"] == str(int(cases.hidden.sum()))
    assert "of the Gaussian law of optimal interpolation" in out
    rates = {row["method"]: float(row["value"]) for row in rows if row["metric"] == "divergence_rms"}
    assert "DINEOF" in rates and "OI without divergence" not in rates
    assert "oi_solenoidal is left out: the divergence of the data is" in out  # central differences see it
    assert len(read((place / "outputs/evaluate/exact/report.html").read_text(), tmp_path).images) == 12


@pytest.mark.usefixtures("rendered")
def test_equal_networks_score_equally(place: Path, run: Call, twin: str, tmp_path: Path) -> None:
    given = ["name=two", "masks=[track]", "cases=2", *FEW, "baselines=climatology"]
    code, out, err = run("evaluate", f"ckpt=[outputs/train/run,{twin}]", *given)
    assert (code, err) == (0, "") and "track  copy" in out
    rows = [row for row in rows_of(place, "two") if row["metric"] != "seconds_per_field"]
    ours, theirs = ([{**row, "method": ""} for row in rows if row["method"] == name] for name in ("run", "copy"))
    assert ours == theirs and len(ours) > 30
    assert {row["method"] for row in rows} == {"run", "copy", "climatology"}
    text = (place / "outputs/evaluate/two/report.html").read_text()
    read(text, tmp_path)
    assert "Too few to tell" in text and "m s⁻¹ for copy" in text and "network run" in text


def test_a_folder_of_numbered_runs_is_all_of_them(place: Path, run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    sweep = place / "outputs" / "train" / "swept"
    for number, rate in enumerate(("1e-3", "2e-3")):
        shutil.copytree(place / "outputs" / "train" / "run", sweep / str(number))
        overrides = f'["optimizer.lr={rate}", "seed=0"]'
        (sweep / str(number) / "result.json").write_text(f'{{"overrides": {overrides}, "status": "done"}}')
    (sweep / "2").mkdir()
    assert named_runs("outputs/train/swept") == {
        "0 optimizer.lr=1e-3": "outputs/train/swept/0",
        "1 optimizer.lr=2e-3": "outputs/train/swept/1",
    }
    assert named_runs("outputs/train/swept/0") == {"diffusion": "outputs/train/swept/0"}
    assert named_runs(["a/linear", "b"]) == {"a/linear": "a/linear", "b": "b"}


def test_generated_fields_are_scored(place: Path, run: Call) -> None:
    given = ["name=free", "masks=[none]", "cases=3", "members=4", "sampler.steps=2", "baselines=[climatology]"]
    code, out, err = run("evaluate", "ckpt=outputs/train/run", *given)
    assert (code, err) == (0, "") and "halves of the unseen fields" in out
    rows = rows_of(place, "free")
    ours, chance = (values(rows, name, "generated") for name in ("diffusion", "halves of the unseen fields"))
    assert ours.keys() == chance.keys() and {"energy_ratio", "memorisation", "frechet_distance"} <= ours.keys()
    assert ours["energy_ratio"] > 0 and values(rows, "climatology")["rmse_component"] > 0


def test_persistence_is_scored_where_snapshots_resemble_each_other(place: Path, run: Call) -> None:
    """A file in which each snapshot is the last one times 1.1: what persistence misses is known exactly."""
    config = load_checkpoint(place / "outputs/train/run/checkpoints/last.pt")
    velocity = noise(2, 16, 16, seed=17).numpy()[None] * 1.1 ** np.arange(48)[:, None, None, None] * 1e-2
    from vecfield_diffusion.data.readers.hdf5 import write_hdf5

    write_hdf5(place / "grows.h5", velocity, 40e3, 40e3, "periodic", "periodic", source="made")
    dataset = {"_target_": "vecfield_diffusion.data.hdf5.open_hdf5", "path": "grows.h5"}
    other = {**yaml.safe_load(config["config"]), "dataset": dataset}
    save_checkpoint(place / "grows.pt", {**config, "config": yaml.safe_dump(other)})
    given = ["name=grows", "masks=[block]", "history=whole", "cases=3", *FEW, "baselines=[persistence]"]
    code, _, err = run("evaluate", "ckpt=grows.pt", "data=grows.h5", *given)
    assert (code, err) == (0, "")
    relative = values(rows_of(place, "grows"), "persistence (1 snapshot before)")["relative_l2"]
    assert relative == pytest.approx(0.1 / 1.1, rel=1e-4)
    is_message(run("evaluate", "ckpt=[outputs/train/run,grows.pt]", *given), "trained with another data", "grows.h5")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("baselines=[linaer]", ("baselines=linaer", "Did you mean 'linear'?", "all, climatology")),
        ("baselines=al", ("Did you mean 'all'?",)),
        ("ckpt=[outputs/train/run,outputs/train/run]", ("named twice",)),
        ("ckpt=[]", ("ckpt=[]: name at least one",)),
        ("ckpt=[outputs/train/run,outputs/train/nowhere]", ("no checkpoint there",)),
        ("sigma_obs=error", ("has no variable 'error'",)),
    ],
)
def test_what_does_not_fit_is_one_line(place: Path, run: Call, overrides: str, parts: tuple[str, ...]) -> None:
    ckpt = [] if overrides.startswith("ckpt") else ["ckpt=outputs/train/run"]
    is_message(run("evaluate", *ckpt, "name=bad", *FEW, "cases=2", overrides), *parts)
    assert not (place / "outputs" / "evaluate" / "bad").exists()
