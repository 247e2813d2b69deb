"""Scores in time against closed forms: turning, scaled and uniform flows, and drifters by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vecfield_diffusion.evaluation.comparison import Estimate, Setting, score
from vecfield_diffusion.evaluation.lagrangian import seed_drifters, separations
from vecfield_diffusion.evaluation.report import Section
from vecfield_diffusion.evaluation.temporal import rotary_spectrum
from vecfield_diffusion.evaluation.trajectory import DRIFTERS, TrueSeries, score_in_time, time_section
from vecfield_diffusion.evaluation.verdicts import drifters_sentence
from vecfield_diffusion.physics.grid import Grid

T, H, W = 12, 8, 9
GRID = Grid(torch.ones(H, W, dtype=torch.bool), 25e3, 20e3, "periodic", "periodic")
ZERO = torch.zeros(2, H, W, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 2, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def turning(turn: float) -> Tensor:
    """w = w0 exp(i turn t) in every cell, `(T, 2, H, W)`."""
    u, v = noise(seed=1)
    angle = turn * torch.arange(T, dtype=torch.float64)[:, None, None]
    return torch.stack((u * angle.cos() - v * angle.sin(), u * angle.sin() + v * angle.cos()), dim=1)


def values(found: dict[str, dict], kind: str) -> dict[str, float]:
    return {name: score.value for name, score in found[kind].items()}


def test_energy_increments_and_correlation_in_closed_form() -> None:
    """Twice the truth has four times its increments and 10^0.602 of its energy, and turning loses no correlation."""
    truth = TrueSeries(turning(0.5), GRID, ZERO)
    members = torch.stack((2 * turning(0.5), -2 * turning(0.5)))
    found = score_in_time("double", truth, members.mean(dim=0), members)
    got = values(found.scores, "members")
    assert found.scores.keys() == {"members"} and found.separation == {}  # without a time step nothing drifts
    assert got.pop("rotary_error") == pytest.approx(2 * math.log10(2), rel=1e-12)
    assert got == pytest.approx(
        {f"increments_{k}": 4.0 for k in (1, 3, 5)} | {f"lag_correlation_{k}": 1.0 for k in (1, 3, 5)}, rel=1e-12
    )
    own = time_section(truth, [found]).truth
    assert values(own.scores, "mean") == pytest.approx({f"lag_correlation_{k}": 1.0 for k in (1, 3, 5)}, rel=1e-12)


def test_members_that_are_drawn_anew_in_each_frame_are_seen_in_time() -> None:
    """What a method of single snapshots gives: nothing is left from frame to frame, increments are twice its energy."""
    truth = TrueSeries(turning(0.05), GRID, ZERO)
    members = noise(40, T, seed=2) * truth.fields.square().mean().sqrt()
    got = values(score_in_time("anew", truth, members.mean(dim=0), members).scores, "members")
    assert got["lag_correlation_1"] < 0.05
    assert got["increments_1"] == pytest.approx(2 / (2 - 2 * math.cos(0.05)), rel=0.03)
    ours, theirs = (rotary_spectrum(part, 1.0).folded()[1][1:] for part in (members, truth.fields))  # without the mean
    assert got["rotary_error"] == pytest.approx((ours / theirs).log10().square().mean().sqrt().item(), rel=1e-9)
    assert got["rotary_error"] > 1


def test_drifters_of_uniform_flows_part_at_the_difference_of_their_speeds() -> None:
    """Every start, every member: 0.3 m/s more along x and 0.4 along y are 0.5 m/s; the mean of both members is the
    truth."""
    flow = torch.tensor([0.2, -0.1], dtype=torch.float64)[:, None, None].expand(T, 2, H, W)
    other = torch.tensor([0.3, 0.4], dtype=torch.float64)[:, None, None]
    truth = TrueSeries(flow, GRID, ZERO, step=3.0, unit="h", seconds=3 * 3600.0)
    members = torch.stack((flow + other, flow - other))
    found = score_in_time("pair", truth, members.mean(dim=0), members)
    away = 0.5 * 3 * 3600 / 1000 * torch.arange(1, 6, dtype=torch.float64)
    torch.testing.assert_close(found.separation["members"], away, rtol=1e-9, atol=0)
    assert found.separation["mean"].abs().max() < 1e-9
    for lag in (1, 3, 5):
        assert found.scores["members"][f"separation_{lag}"].value == pytest.approx(away[lag - 1].item(), rel=1e-9)
    section = time_section(truth, [found, score_in_time("truth itself", truth, flow, None)])
    said = drifters_sentence("pair", section, ["pair"])
    assert "After 5 steps drifters in pair are" in said and "27 km in its members" in said
    assert said.endswith("in truth itself, 0 km.")
    assert section.nearest(["pair", "truth itself"]) is None


def test_drifters_are_those_of_the_lagrangian_scores_started_every_five_steps() -> None:
    """In cells that are known in all frames of the truth; elsewhere drifters are lost."""
    fields = 0.5 * noise(T, seed=3)
    fields[4, :, 2, 2:5] = math.nan
    members = fields.nan_to_num() + 0.2 * noise(3, T, seed=4)
    truth = TrueSeries(fields, GRID, ZERO, seconds=7200.0, seed=6)
    known = torch.ones(H, W, dtype=torch.bool)
    known[2, 2:5] = False
    grid = Grid(known, GRID.dx, GRID.dy, "periodic", "periodic")
    given, flow = (torch.where(known, part, math.nan) for part in (members, fields))
    options = dict(dt=7200.0, starts=seed_drifters(grid, DRIFTERS, 6), after=range(1, 6))
    want = [separations(flow[k : k + 6], given[:, k : k + 6], grid, **options) for k in (0, 5)]
    found = score_in_time("ours", truth, members.mean(dim=0), members)
    torch.testing.assert_close(found.separation["members"], torch.stack(want).mean(dim=(0, 1)) / 1000)
    assert found.scores["members"]["separation_3"].value == found.separation["members"][2].item()
    assert found.scores["members"]["separation_3"].value != found.scores["mean"]["separation_3"].value


def test_what_is_too_short_or_known_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="4 consecutive frames, got 3"):
        TrueSeries(noise(3), GRID, ZERO)
    with pytest.raises(ValueError, match="known in all frames"):
        TrueSeries(noise(5) * math.nan, GRID, ZERO)
    four = TrueSeries(noise(4), GRID, ZERO, seconds=1.0)
    found = score_in_time("short", four, noise(4, seed=1), noise(2, 4, seed=2))
    assert {"separation_3", "increments_3"} <= found.scores["members"].keys() and len(found.separation["mean"]) == 3
    assert not {"separation_5", "increments_5"} & found.scores["members"].keys()


def test_a_method_that_gives_one_field_is_scored_as_it_is() -> None:
    truth = TrueSeries(turning(0.4), GRID, ZERO, seconds=600.0)
    found = score_in_time("point", truth, 2 * truth.fields, 2 * truth.fields[None])
    assert found.scores.keys() == {"mean"} == found.separation.keys()
    assert found.scores["mean"].keys() >= {"rotary_error", "increments_1", "separation_1"}
    law = score_in_time("law", truth, truth.fields, None)
    assert law.spectrum is None and all(name.startswith("separation") for name in law.scores["mean"])


def test_rows_of_a_section_hold_the_scores_in_time() -> None:
    truth = turning(0.4)
    setting = Setting("strip", range(T), truth, torch.zeros(T, 1, H, W, dtype=torch.bool), GRID, ZERO, 1.0, 4)
    estimate = Estimate(truth + 0.1 * noise(4, T))
    scored = score("ours", lambda chosen: Estimate(estimate.members[:, chosen]), setting)
    series = TrueSeries(truth, GRID, ZERO, seconds=600.0)
    whole = Estimate.joined([Estimate(estimate.members[:, :5]), Estimate(estimate.members[:, 5:])])
    found = score_in_time("ours", series, whole.members.mean(dim=0), whole.realisations)
    section = Section(setting, [scored], ["ours"], in_time=time_section(series, [found]))
    rows = {(row["method"], row["region"], row["metric"]): row for row in section.rows("m s-1")}
    row = rows["ours", "members", "separation_3"]
    assert (row["value"], row["units"], row["cases"]) == (found.separation["members"][2].item(), "km", T)
    assert rows["ours", "members", "increments_1"]["units"] == "1"
    assert ("ours", "mean", "increments_1") not in rows and ("ours", "mean", "separation_1") in rows
    assert rows["truth", "mean", "lag_correlation_1"]["value"] == pytest.approx(1)
    assert [(line["method"], line["of"]) for line in section.time_lines()] == [
        ("ours", "mean"),
        ("ours", "members"),
        ("truth", "mean"),
    ]
    draws = noise(3, T)
    law = Estimate(truth[None], torch.ones_like(truth), draws)
    assert law.realisations is draws and Estimate(truth[None], torch.ones_like(truth)).realisations is None
    halves = Estimate.joined([Estimate(*(part[:, s] for part in (truth[None],)), law.std[s], draws[:, s])
                              for s in (slice(0, 7), slice(7, T))])  # fmt: skip
    assert torch.equal(halves.std, law.std) and torch.equal(halves.draws, draws)
