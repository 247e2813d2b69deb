"""The table of scores: units, directions, columns; a new entry is all that a new score needs."""

from __future__ import annotations

import csv
import io
import math

import pytest
import torch

from vecfield_diffusion.evaluation.metrics import scores
from vecfield_diffusion.evaluation.scores import SCORES, Definition, columns, derive, heading, superscript, unit


def test_units() -> None:
    for name, units in (
        ("rmse_component", "m s-1"),
        ("mae", "m s-1"),
        ("sliced_wasserstein", "m s-1"),
        ("divergence_rms", "s-1"),
        ("veering", "degrees"),
        ("effective_resolution", "m"),
        ("seconds_per_field", "s"),
        ("spread_skill", "1"),
    ):
        assert unit(name, "m s-1") == units
    assert (unit("crps", "cm/s"), unit("divergence_rms", "cm/s")) == ("cm/s", "cm/s m-1")


def test_headings() -> None:
    assert heading("rmse_component", "m s-1") == "RMSE, component [m s⁻¹]"
    assert heading("spread_skill", "m s-1") == "spread / error"
    assert superscript("kg m-2 s-1") == "kg m⁻² s⁻¹" and superscript("cm/s") == "cm/s"


@pytest.mark.parametrize(
    ("name", "best", "worse"),
    [
        ("rmse_component", 0.1, 0.2),
        ("correlation", 0.9, 0.8),
        ("skill", 0.5, -1.0),
        ("spread_skill", 0.9, 1.2),
        ("coverage_90", 0.93, 0.86),
        ("coverage_50", 0.4, 0.93),
        ("veering", -2.0, 5.0),
        ("memorisation", 1.1, 0.0),
        ("effective_resolution", 2e4, math.inf),
        ("log_likelihood", 1.2, -0.3),
    ],
)
def test_which_way_is_better(name: str, best: float, worse: float) -> None:
    assert SCORES[name].badness(best) < SCORES[name].badness(worse)


def test_neither_way_is_better_without_a_direction_or_a_value() -> None:
    assert SCORES["spread"].badness(0.1) == SCORES["crps"].badness(math.nan) == math.inf
    assert (SCORES["crps"].direction, SCORES["coverage_90"].direction, SCORES["spread"].direction) == (
        "lower",
        "best 0.9",
        "",
    )


def test_columns_are_those_that_say_so_in_their_order() -> None:
    assert columns("table") == ["rmse_component", "rmse_vector", "crps", "spread_skill"]
    assert columns("fill") == [
        "rmse_component",
        "rmse_vector",
        "correlation",
        "crps",
        "spread_skill",
        "coverage_90",
    ]
    assert set(columns("report")) > set(columns("table"))


def test_sums_that_were_not_gathered_leave_their_scores_out() -> None:
    truth = torch.ones(1, 2, 3, 4)
    everywhere = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    found = scores(2 * truth[None], truth, everywhere)
    assert not {"skill", "divergence_rms", "mae"} & set(found)
    assert scores(2 * truth[None], truth, everywhere, climatology=0 * truth)["skill"] == 0


def test_every_score_of_sums_is_in_the_table_and_in_the_csv_with_its_unit() -> None:
    sums = {name: torch.ones(()) for name in ("cells", "error", "truth", "mean", "along", "across", "angle", "angles")}
    sums |= {name: torch.ones(()) for name in ("crps", "variance", "energy", "absolute", "climatology", "brier")}
    sums |= {"divergence": torch.ones(()), "divergence_cells": torch.ones(()), "ranks": torch.ones(4)}
    assert set(derive(sums)) == {name for name, score in SCORES.items() if score.formula is not None}


def test_a_new_score_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed, has its interval, stands in scores.csv with its unit and in the report with its best value."""
    import test_report
    from test_report import report

    from vecfield_diffusion.evaluation.report import render

    twice = lambda s: 2 * (s["error"] / (2 * s["cells"])).sqrt()  # noqa: E731
    monkeypatch.setitem(SCORES, "doubled", Definition("twice the RMSE", "velocity", "lower", twice, shown=("report",)))
    monkeypatch.setattr(test_report, "methods", test_report.methods.__wrapped__)  # what is kept has no such score
    section = report(12)
    rows = [row for row in section.rows("m s-1") if row["region"] == "hidden"]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writerows(rows)
    values = {(row["method"], row["metric"]): row for row in rows}
    for method in ("ours", "optimal interpolation"):
        twice, once = (values[method, name] for name in ("doubled", "rmse_component"))
        assert [twice[key] for key in ("value", "low", "high")] == pytest.approx(
            [2 * once[key] for key in ("value", "low", "high")]
        )
    assert 'twice the RMSE <span class="unit">[m s⁻¹] ↓</span></th>' in render("trial", [section], {}, "m s-1")
