"""Charts of runs with more rounds than can be seen apart: small, and no spike, gap or byte is lost."""

import math
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from server import charts
from server.charts import Series
from server.report import write_report
from tests.run_artefacts import round_records, write_run

ROUNDS = 1000


def drawn(panel: str) -> list[np.ndarray]:
    """The lines of a panel in its own units, (points, 2) each, downwards."""
    return [
        np.array([[float(value) for value in pair.split(",")] for pair in points.split()])
        for points in re.findall(r'<polyline class="line" points="([^"]+)"', panel)
    ]


def panel_of(*series: Series) -> str:
    return charts.line_panel("t", series, reference=None, bounds=(0.0, 10.0))


def noise(seed: int = 0, rounds: int = ROUNDS) -> list[tuple[int, float]]:
    return list(enumerate(np.random.default_rng(seed).uniform(4.0, 6.0, rounds).tolist(), start=1))


@pytest.mark.parametrize("spike_at", [1, 2, 417, 999, 1000])
@pytest.mark.parametrize("spike", [0.0, 10.0])
def test_no_spike_is_lost(spike_at: int, spike: float) -> None:
    points = noise()
    points[spike_at - 1] = (spike_at, spike)
    (line,) = drawn(panel_of(Series("s", points, 0)))
    (two,) = drawn(panel_of(Series("s", [(1, 0.0), (ROUNDS, 10.0)], 0)))
    x, y = np.interp([spike_at, spike], [1, ROUNDS], two[:, 0])[0], (two[0, 1] if spike == 0.0 else two[1, 1])
    assert np.abs(line - [x, y]).max(axis=1).min() < 0.06
    assert (line[0, 0], line[-1, 0]) == (two[0, 0], two[-1, 0])
    assert len(line) <= 300
    assert (np.diff(line[:, 0]) >= 0).all()


def test_a_line_keeps_its_shape() -> None:
    """Within two units of its width it goes as far up and down as all its points do."""
    points = noise()
    (line,) = drawn(panel_of(Series("s", points, 0)))
    (ends,) = drawn(panel_of(Series("s", [(1, 0.0), (ROUNDS, 10.0)], 0)))
    whole = np.array(points)
    whole[:, 0] = np.interp(whole[:, 0], [1, ROUNDS], ends[:, 0])
    whole[:, 1] = np.interp(whole[:, 1], [0.0, 10.0], ends[:, 1])
    for left in np.arange(ends[0, 0], ends[1, 0] - 6.0, 6.0):
        near = line[(line[:, 0] >= left - 2.0) & (line[:, 0] <= left + 8.0)]
        inside = whole[(whole[:, 0] >= left) & (whole[:, 0] <= left + 6.0)]
        assert near[:, 1].min() <= inside[:, 1].min() + 0.06
        assert near[:, 1].max() >= inside[:, 1].max() - 0.06


def test_a_long_gap_stays_and_a_short_one_closes() -> None:
    points: list[tuple[int, float | None]] = list(noise())
    points[100] = (101, None)
    points[101] = (102, math.nan)
    assert len(drawn(panel_of(Series("s", points, 0)))) == 1
    points[300:400] = [(round, None) for round in range(301, 401)]
    before, after = drawn(panel_of(Series("s", points, 0)))
    assert after[0, 0] - before[-1, 0] > 20


def test_hints_are_given_where_they_fit() -> None:
    few = panel_of(*(Series(f"s{i}", noise(i), i) for i in range(3)))
    assert 0 < few.count("<title>") <= 900
    assert "<title>" not in panel_of(*(Series(f"s{i}", noise(i), i) for i in range(40)))
    assert panel_of(Series("s", noise(0, 300), 0)).count("<title>") == 300


def test_a_bar_is_the_mean_of_its_rounds_and_says_so() -> None:
    sites = {"a": [(2_000_000, 1_000_000), (4_000_000, 0)] * (ROUNDS // 2)}
    panel = unescape(charts.traffic_panel("Bytes", list(range(1, ROUNDS + 1)), sites))
    hints = re.findall(r"<title>([^<]*)</title>", panel)
    assert len(hints) <= 120
    assert "Bytes: each bar the mean of 9<" in panel
    first, *_, last = hints
    assert (
        first == "rounds 1\N{EN DASH}9, in each: 556 kB from sites, 2.89 MB to sites"
    )  # five of the one, four of the other
    assert last == "round 1000: 0 B from sites, 4.00 MB to sites"
    assert "500 MB from sites and 3.00 GB to sites over 1000 rounds" in panel


def test_a_bar_stands_in_the_middle_of_its_rounds() -> None:
    """So that the first is as far from the first round as the last is from the last, by four of the line's steps."""
    rounds = 9 * 120
    panel = charts.traffic_panel("Bytes", list(range(1, rounds + 1)), {"a": [(10, 20)] * rounds})
    bars = re.findall(r'<rect[^>]* x="([\d.]+)"[^>]* width="([\d.]+)"', panel)
    first, last = (float(x) + float(width) / 2 for x, width in (bars[0], bars[-1]))
    (line,) = drawn(panel_of(Series("s", [(1, 0.0), (rounds, 10.0)], 0)))
    four = 4 * (line[1, 0] - line[0, 0]) / (rounds - 1)
    assert (first - line[0, 0], line[1, 0] - last) == pytest.approx((four, four), abs=0.02)


def test_a_bar_of_one_round_is_as_before() -> None:
    panel = charts.traffic_panel("Bytes", [1, 2], {"a": [(10, 20), (30, 40)]})
    assert "<figcaption>Bytes</figcaption>" in panel
    assert "<title>round 2: 40 B from sites, 30 B to sites</title>" in panel


def cells_of(statuses: Sequence[str]) -> list[str]:
    return re.findall(r'class="cell (\w+)"', charts.attendance(statuses))


def test_a_cell_shows_what_a_quarter_of_its_rounds_were_or_worse() -> None:
    statuses = ["ok"] * 500 + ["absent"] * 400 + ["ok"] * 100
    statuses[7] = "error"
    cells = cells_of(statuses)
    assert len(cells) <= 66
    assert cells.count("absent") / len(cells) == pytest.approx(0.4, abs=0.03)
    assert "error" not in cells
    assert cells_of(["ok", "late"]) == ["ok", "late"]


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (["ok", "refused"], "refused"),
        (["refused", "ok"], "refused"),
        (["ok"] * 9 + ["error"] * 6, "error"),
        (["ok"] * 12 + ["error"] * 3, "ok"),
        (["error"] * 2 + ["refused"] * 2 + ["late"] * 2 + ["ok"] * 9, "refused"),  # no kind has a quarter alone
        (["late"] * 5 + ["strange"] * 5 + ["ok"] * 5, "absent"),
    ],
)
def test_steady_trouble_shows_in_each_cell_of_a_long_run(cell: list[str], shown: str) -> None:
    assert cells_of(cell * 66) == [shown] * 66


def test_the_report_of_a_thousand_rounds_says_what_its_strips_are(tmp_path: Path) -> None:
    write_run(tmp_path, round_records(ROUNDS), rounds=ROUNDS)
    report = write_report(tmp_path)
    assert report.stat().st_size < 3_000_000
    assert "A cell of a strip is 16 rounds" in report.read_text(encoding="utf-8")
