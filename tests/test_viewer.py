"""The page of a filled series: its numbers come back, and a real browser draws it, wide and narrow."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation import viewer
from vecfield_diffusion.evaluation.plots import Coordinates
from vecfield_diffusion.evaluation.viewer import MEMBERS, Shown, check_page, packed, render_page, times_shown

H, W, T, M = 6, 9, 3, 4
COORDINATES = Coordinates(np.linspace(10, 12, W), np.linspace(42, 40, H), "longitude", "latitude")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
#: What is asked of the page once it is drawn, and left where the test finds it.
PROBE = """<script>
const probe = document.createElement("pre");
document.documentElement.style.width = "WIDTHpx";
const ask = () => {
  const traces = at("map").data, drawn = document.querySelectorAll("#map .heatmaplayer image").length;
  return {date: at("date").textContent, z: traces[0].z[1][2], text: traces[0].text[1][2], drawn,
    kinds: traces.map(trace => trace.type), wide: document.body.scrollWidth,
    map: at("map").getBoundingClientRect().width};
};
Plotly.Plots.resize("map").then(() => {
const first = ask();
at("time").value = 2; at("field").value = "member 2"; at("part").value = "1"; at("arrows").checked = false; draw();
probe.id = "probe"; probe.textContent = JSON.stringify([first, ask()]);
document.body.append(probe);
});
</script></body>"""


def shown(truth: bool = True) -> list[Shown]:
    rng = np.random.default_rng(0)
    found = []
    for time in range(T):
        members = rng.standard_normal((M, 2, H, W))
        members[..., 0, 0] = np.nan
        measured = np.zeros((H, W), dtype=bool)
        measured[1, 2] = time == 2
        found.append(Shown(f"2024-01-0{time + 1}", members, measured, members[0] if truth else None))
    return found


def data_of(page: str) -> dict:
    return json.loads(re.search(r"^const D = (.*);$", page, re.MULTILINE)[1])


def unpacked(field: dict) -> np.ndarray:
    numbers = np.frombuffer(base64.b64decode(field["values"]), dtype="<i2").reshape(-1, field["parts"], H, W)
    return np.where(numbers == -32768, np.nan, numbers * field["scale"])


def test_the_numbers_come_back() -> None:
    """Mean, spread, members and truth, to a 64000th of their range; land as what is missing."""
    times = shown()
    members = np.stack([time.members for time in times], axis=1)
    page = render_page("a title", times, COORDINATES, units="m s-1")
    data = data_of(page)
    options = re.search(r'id="field">(.*?)</select>', page)[1]
    names = ["mean", "spread", "truth", *(f"member {k}" for k in range(1, M + 1))]
    assert options == "".join(f"<option>{name}</option>" for name in names) and set(data["fields"]) == set(names)
    spread = np.sqrt(members.var(axis=0, ddof=1).sum(axis=1, keepdims=True))
    for name, expected in (("mean", members.mean(axis=0)), ("spread", spread), ("member 3", members[2])):
        found = unpacked(data["fields"][name])
        np.testing.assert_allclose(found, expected, atol=np.nanmax(np.abs(expected)) / 60000)
    assert data["dates"] == [time.date for time in times] and data["y"][0] == 42
    assert data["ratio"] == pytest.approx(1 / np.cos(np.deg2rad(41)))
    assert packed(np.full((1, 1, H, W), np.nan))["scale"] == 1.0


def test_a_page_of_one_member_and_no_truth() -> None:
    times = [Shown(time.date, time.members[:1], time.measured) for time in shown()]
    page = render_page("<b>", times, COORDINATES, units="m s-1", note="Short.")
    assert "&lt;b&gt;" in page and "Short." in page
    data = data_of(page)
    assert set(data["fields"]) == {"mean", "spread", "member 1"}
    assert np.isnan(unpacked(data["fields"]["spread"])).all()


def test_long_series_are_shown_in_part() -> None:
    assert list(times_shown(5, 16, 1000)) == [0, 1, 2, 3, 4]
    chosen = times_shown(1000, 50, 3321)
    assert len(chosen) * 3321 * (2 * MEMBERS + 5) <= viewer.NUMBERS and chosen[-1] > 900
    assert list(times_shown(3, 50, 10**8)) == [0]


def test_without_plotly_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "get_plotlyjs", None)
    with pytest.raises(UserError, match="figure=map.html takes plotly: pip install plotly"):
        check_page("map.html")
    check_page("map.png")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
@pytest.mark.skipif(viewer.get_plotlyjs is None, reason="plotly is not installed: pip install plotly")
@pytest.mark.parametrize("width", [1400, 420])
def test_a_browser_draws_it(tmp_path: Path, width: int) -> None:
    """The first time, then the second component of a member at the last one, with what was measured; none too wide."""
    times = shown()
    page = render_page("A series", times, COORDINATES, units="m s-1")
    (tmp_path / "page.html").write_text(page.replace("</body>", PROBE.replace("WIDTH", str(width))))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += [f"--window-size={width},900", "--virtual-time-budget=4000", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *options, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=90
    )
    answer = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)[1]
    first, then = json.loads(html.unescape(answer))
    mean = times[0].members.mean(axis=0)[:, 1, 2]
    assert first["date"] == "2024-01-01" and first["z"] == pytest.approx(np.hypot(*mean), abs=1e-3)
    assert first["drawn"] == then["drawn"] == 1
    assert first["kinds"] == ["heatmap", "contour", "scatter"] and first["text"].endswith("filled")
    assert then["date"] == "2024-01-03" and then["z"] == pytest.approx(times[2].members[1, 1, 1, 2], abs=1e-3)
    assert then["kinds"] == ["heatmap", "contour"] and then["text"].endswith("measured")
    assert 0.8 * min(width, 1300) < first["map"] <= first["wide"] <= width
