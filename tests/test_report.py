"""The report of a run, read back with the standard library's parser."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from server import charts
from server.report import write_report
from server.report_style import STYLE
from tests.run_artefacts import SITES, round_records, study, without, write_probe, write_run, write_views

VOID = {"meta", "img", "br"}
HOSTILE = "<script>alert('x')</script>\"><img src=http://e.example onerror=1>&amp;"


@dataclass
class Node:
    tag: str
    attributes: dict[str, str]
    children: list["Node | str"] = field(default_factory=list)

    def all(self, tag: str, **wanted: str) -> Iterator["Node"]:
        """Every element below with this tag and these attributes."""
        for child in self.children:
            if isinstance(child, Node):
                if child.tag == tag and wanted.items() <= child.attributes.items():
                    yield child
                yield from child.all(tag, **wanted)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """Fails on any tag that is not closed where it must be."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("root", {})
        self._open = [self.root]

    @classmethod
    def of(cls, path: Path) -> Self:
        tree = cls()
        tree.feed(path.read_text(encoding="utf-8"))
        tree.close()
        assert [node.tag for node in tree._open] == ["root"]
        return tree

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} stands twice"
        node = Node(tag, {key: value or "" for key, value in attrs})
        self._open[-1].children.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)

    def handle_decl(self, decl: str) -> None:
        assert decl == "doctype html"


def report_of(out: Path) -> Node:
    return Tree.of(write_report(out)).root


def section(page: Node, title: str) -> Node:
    return next(one for one in page.all("section") if next(one.all("h2")).text == title)


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    """Five rounds of three sites; one refused twice, one gone at the end."""
    records = round_records(5)
    for index in (1, 2):
        records[index]["sites"]["beta-ct"] = without(records[index]["sites"]["beta-ct"], "refused", "too_large")
    records[4]["sites"]["alpha-xray"] = without(records[4]["sites"]["alpha-xray"], "absent", "")
    write_run(tmp_path, records, rounds=5)
    write_probe(tmp_path / "report")
    write_views(tmp_path / "report")
    return tmp_path


def test_the_report_is_one_well_formed_file_that_asks_for_nothing(whole_run: Path) -> None:
    page = report_of(whole_run)
    text = re.sub(r"base64,[^\"]*", "", (whole_run / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe", text)
    sources = [node.attributes["src"] for node in page.all("img")]
    assert len(sources) == len(SITES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_parts_stand_in_the_order_in_which_they_are_read(whole_run: Path) -> None:
    titles = [node.text for node in report_of(whole_run).all("h2")]
    assert titles == ["Sites", "Loss", "Rounds", "Collapse", "Views", "Held-out scans", "Probe", "Study"]


@pytest.mark.parametrize("skipped", [0.0, 3.0])
def test_skipped_batches_have_a_panel_where_there_are_any(tmp_path: Path, skipped: float) -> None:
    records = round_records(3)
    records[1]["sites"]["beta-ct"]["diagnostics"]["skipped_batches"] = skipped
    write_run(tmp_path, records, rounds=3)
    page = report_of(tmp_path)
    assert ("Batches skipped for NaN or infinity" in section(page, "Rounds").text) == bool(skipped)
    assert "skipped" not in section(page, "Collapse").text


def collapsed_run(out: Path, *, sites: list[str], local_steps: int = 400) -> Node:
    """Two rounds, of whose steps 20 are warm-up; at the end the targets of `sites` are uniform."""
    records = round_records(2)
    for site in records[1]["sites"]:
        mean = 6.23 if site in sites else 3.0
        records[1]["sites"][site]["diagnostics"] = {
            "target_entropy_image": mean - 0.01,
            "mean_target_entropy_image": mean,
        }
        if site not in sites:
            records[1]["sites"][site]["diagnostics"]["target_entropy_image"] = 1.0
    write_run(out, records, rounds=2, local_steps=local_steps)
    return report_of(out)


def test_a_run_of_few_steps_is_called_too_short_and_not_collapsed(tmp_path: Path) -> None:
    page = collapsed_run(tmp_path, sites=["beta-ct"], local_steps=50)
    (verdict,) = page.all("p", **{"class": "verdict"})
    assert "too short to learn: after 100 of some 800 steps all scans of beta-ct still get one answer" in verdict.text
    assert "collapsed" not in verdict.text


def test_a_collapsed_run_is_called_so_at_its_top_and_with_a_way_out(tmp_path: Path) -> None:
    page = collapsed_run(tmp_path, sites=["beta-ct", "gamma-mixed"])
    (verdict,) = page.all("p", **{"class": "verdict"})
    assert "The run has collapsed: beta-ct and gamma-mixed last told no scan from another" in verdict.text
    (caution,) = section(page, "Collapse").all("p", **{"class": "caution"})
    assert "gamma-mixed: image: all targets are alike, at the uniform answer" in caution.text
    assert "docs/objectives.md says under Collapse what to try" in caution.text
    assert "alpha" not in caution.text


def test_a_run_without_collapse_is_not_blamed(tmp_path: Path) -> None:
    page = collapsed_run(tmp_path, sites=[])
    assert "collapsed" not in page.text
    assert not list(section(page, "Collapse").all("p", **{"class": "caution"}))


def test_figures_stand_where_they_belong_under_words(whole_run: Path) -> None:
    page = report_of(whole_run)
    titles = {
        name: [next(one.all("figcaption")).text for one in section(page, name).all("figure")]
        for name in ("Rounds", "Collapse")
    }
    assert titles["Collapse"] == ["Entropy of the targets: 2d", "Entropy of the targets: 3d"]
    assert "Norm of the gradient, before clipping" in titles["Rounds"]
    assert "grad" not in section(page, "Collapse").text


def test_a_group_that_nobody_trained_has_no_line(tmp_path: Path) -> None:
    records = round_records(2)
    for record in records:
        record["global"]["update_norm"]["3d"] = 0.0
    write_run(tmp_path, records, rounds=2)
    text = section(report_of(tmp_path), "Rounds").text
    assert "2D only" in text
    assert "3D only" not in text


def test_every_picture_says_in_words_what_it_shows(whole_run: Path) -> None:
    page = report_of(whole_run)
    assert next(page.all("html")).attributes["lang"] == "en"
    assert all(node.attributes["alt"] for node in page.all("img"))
    figures = list(page.all("figure"))
    assert all(next(figure.all("figcaption")).text for figure in figures)
    pictures = [svg for svg in page.all("svg") if svg.attributes.get("aria-hidden") != "true"]
    assert len(pictures) == len(figures) - len(SITES)
    assert all(len(svg.attributes["aria-label"]) > 20 and svg.attributes["role"] == "img" for svg in pictures)


def test_the_table_holds_the_sums_of_the_metrics(tmp_path: Path) -> None:
    records = round_records(7, seed=3)
    records[2]["sites"]["beta-ct"] = without(records[2]["sites"]["beta-ct"], "error", "failed")
    write_run(tmp_path, records, rounds=7)
    rows = list(next(section(report_of(tmp_path), "Sites").all("table")).all("tr"))[1:]
    names = [next(row.all("th")).text for row in rows]
    assert names == [*SITES, "Whole run"]
    shown = {
        name: [float(node.attributes["value"]) for node in row.all("data")]
        for name, row in zip(names, rows, strict=True)
    }
    for name in SITES:
        keys = ("steps", "bytes_down", "bytes_up", "seconds")
        expected = np.array([[record["sites"][name][key] for key in keys] for record in records]).sum(axis=0)
        np.testing.assert_allclose(shown[name], expected)
    down_and_up = np.array([shown[name][1:3] for name in SITES]).sum(axis=0)
    np.testing.assert_allclose(shown["Whole run"], [*down_and_up, sum(record["seconds"] for record in records)])


def test_the_table_says_why_a_round_did_not_count(whole_run: Path) -> None:
    rows = list(next(section(report_of(whole_run), "Sites").all("table")).all("tr"))
    assert "4 ok, 1 absent" in rows[1].text
    assert "absent, round\N{NO-BREAK SPACE}5: no reason given" in rows[1].text
    assert "3 ok, 2 refused" in rows[2].text
    in_words = "the update is larger than the study allows too_large"
    assert f"refused, rounds\N{NO-BREAK SPACE}2\N{EN DASH}3: {in_words}" in rows[2].text
    assert [code.text for code in rows[2].all("code")] == ["too_large"]
    assert "2D + 3D" in rows[3].text
    assert "412 images" in rows[3].text


def test_the_verdict_names_the_site_that_no_longer_counts(whole_run: Path) -> None:
    verdict = next(report_of(whole_run).all("p", **{"class": "verdict"})).text
    assert verdict.startswith("Finished 5 of 5 rounds with 3 sites in ")
    assert "alpha-xray did not count after round 4 and beta-ct did not count in 2 rounds" in verdict


def test_the_verdict_tells_a_stopped_run_from_a_finished_one(tmp_path: Path) -> None:
    write_run(tmp_path, round_records(2), rounds=9)
    verdict = next(report_of(tmp_path).all("p", **{"class": "verdict"})).text
    assert verdict.startswith("Stopped after 2 of 9 rounds")
    assert verdict.endswith("Every site counted in every round.")


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    records = round_records(2)
    for record in records:
        sites = record["sites"]
        sites[HOSTILE] = without(sites.pop("beta-ct"), "refused", HOSTILE)
        sites["gamma-mixed"]["losses"][HOSTILE] = 5.0
        sites["gamma-mixed"]["diagnostics"][HOSTILE] = 5.0
        record["global"]["update_norm"][HOSTILE] = 1.0
    write_run(tmp_path, records, rounds=2)
    write_probe(tmp_path / "report")
    (tmp_path / "report" / f"views-{HOSTILE.replace('/', '_')}.png").write_bytes(b"\x89PNG")
    labels = np.array([HOSTILE, "b", HOSTILE])
    points = np.arange(6.0).reshape(3, 2)
    np.savez(
        tmp_path / "report" / "probe-projection.npz", **{"t/before": points, "t/after": points, "t/labels": labels}
    )
    page = report_of(tmp_path)
    assert not list(page.all("script"))
    assert all(image.attributes["src"].startswith("data:") for image in page.all("img"))
    assert HOSTILE in section(page, "Sites").text
    assert HOSTILE in section(page, "Held-out scans").text
    assert "<script>" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        (["study.yaml"], "study.yaml is missing"),
        (["metrics.jsonl"], "No round was finished"),
        (["report/probe-before.json"], "before the first round was not made"),
        (["report/probe-after.json"], "after the last round was not made"),
        (["report/probe-before.json", "report/probe-after.json"], "No probe was made"),
        ([f"report/views-{name}.png" for name in SITES], "No example views were kept"),
        (["study.yaml", "metrics.jsonl"], "The study of this run is not known"),
    ],
)
def test_a_missing_part_costs_a_sentence(whole_run: Path, remove: list[str], said: str) -> None:
    for name in remove:
        (whole_run / name).unlink()
    assert said in report_of(whole_run).text


def test_an_empty_folder_still_gives_a_report(tmp_path: Path) -> None:
    assert "study.yaml is missing. metrics.jsonl is missing." in report_of(tmp_path).text


@pytest.mark.parametrize(
    "damage",
    [
        "study.yaml",
        "metrics.jsonl",
        "report/probe-before.json",
        "report/probe-after.json",
        "report/probe-projection.npz",
        "stopped.json",
    ],
)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00\x13[[",
        b"null",
        b"PK\x03\x04",
        b'{"a": 3, "round": "x"}',
        pytest.param(b"[" * 50_000, id="deep"),
    ],
)
def test_a_damaged_part_is_left_out_without_its_path(whole_run: Path, damage: str, content: bytes) -> None:
    (whole_run / damage).write_bytes(content)
    text = report_of(whole_run).text
    assert Path(damage).name in text or (damage == "metrics.jsonl" and "No round" in text)
    assert str(whole_run) not in text


@pytest.mark.parametrize(
    "arrays",
    [
        {"t/before": np.zeros((3, 2)), "t/after": np.zeros((3, 2))},
        {"t/before": np.zeros((3, 2)), "t/after": np.zeros((4, 2)), "t/labels": np.arange(3)},
        {"t/before": np.zeros((3, 5)), "t/after": np.zeros((3, 5)), "t/labels": np.arange(3)},
    ],
    ids=["no labels", "another length", "not in the plane"],
)
def test_a_projection_that_does_not_fit_is_left_out(whole_run: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(whole_run / "report" / "probe-projection.npz", **arrays)
    assert "probe-projection.npz could not be read" in report_of(whole_run).text


def test_a_line_that_was_cut_off_does_not_hide_the_rounds_before(tmp_path: Path) -> None:
    write_run(tmp_path, round_records(3), rounds=5)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    text = report_of(tmp_path).text
    assert "Line 3 of metrics.jsonl is damaged or incomplete" in text
    assert "Stopped after 2 of 5 rounds" in text


@pytest.mark.parametrize("key", ["round", "seconds", "sites"])
@pytest.mark.parametrize("value", [None, -1, 10**30, math.inf, math.nan, "x", [1]])
def test_a_line_that_cannot_be_true_is_left_out(tmp_path: Path, key: str, value: object) -> None:
    records = round_records(2)
    records[1][key] = value
    write_run(tmp_path, records, rounds=2)
    assert "Line 2 of metrics.jsonl is damaged" in report_of(tmp_path).text


def test_a_figure_that_diverged_leaves_a_gap_and_the_axis_in_scale(tmp_path: Path) -> None:
    records = round_records(3)
    for index, value in enumerate((1e308, math.inf, math.nan)):
        records[index]["sites"]["beta-ct"]["losses"]["volume"] = value
    write_run(tmp_path, records, rounds=3)
    panels = {next(one.all("figcaption")).text: one for one in section(report_of(tmp_path), "Loss").all("figure")}
    label = next(panels["volume"].all("svg")).attributes["aria-label"]
    assert "beta-ct" not in label
    assert all(float(node.text) < 10 for node in panels["volume"].all("text", **{"class": "tick end"}))


def test_of_a_round_that_was_done_twice_the_later_counts(tmp_path: Path) -> None:
    again = round_records(2, seed=9)[1]
    again["sites"]["beta-ct"]["bytes_up"] = 1
    write_run(tmp_path, [*round_records(2), again], rounds=2)
    page = report_of(tmp_path)
    first = round_records(2)[0]["sites"]["beta-ct"]["bytes_up"]
    assert "2 of 2 rounds" in page.text
    assert any(node.attributes["value"] == str(first + 1) for node in page.all("data"))


@pytest.mark.parametrize(("steps", "warned"), [(799, True), (801, False)])
def test_a_run_too_short_to_learn_says_so(tmp_path: Path, steps: int, warned: bool) -> None:
    records = round_records(1)
    for record in records[0]["sites"].values():
        record["steps"] = steps
    write_run(tmp_path, records, rounds=1)
    assert ("some 800 steps a site are needed" in section(report_of(tmp_path), "Probe").text) is warned


def test_the_probe_stands_with_its_interval_and_its_reason(whole_run: Path) -> None:
    rows = [row.text for row in next(section(report_of(whole_run), "Probe").all("table")).all("tr")]
    assert "2D300970.6340.612 [0.541, 0.680]0.701 [0.640, 0.759]+0.089 [+0.020, +0.151]" in rows[1]
    assert "\N{MINUS SIGN}0.020 [\N{MINUS SIGN}0.130, +0.090]" in rows[2]
    assert rows[3].endswith("too few positivestoo few positives")


def test_the_study_reads_back_from_the_report(whole_run: Path) -> None:
    text = section(report_of(whole_run), "Study").text
    assert study(5).digest() in text
    assert "local_steps: 40" in text


def test_loss_curves_are_drawn_against_the_uniform_level(whole_run: Path) -> None:
    """The dashed line stands where the axis, read off its tick labels, says log 512."""
    panels = list(section(report_of(whole_run), "Loss").all("figure"))
    assert len(panels) == 5
    for panel in panels:
        heights = {}
        for line, label in zip(
            panel.all("line", **{"class": "gridline"}), panel.all("text", **{"class": "tick end"}), strict=True
        ):
            heights[float(label.text)] = float(line.attributes["y1"])
        reference = float(next(panel.all("line", **{"class": "reference"})).attributes["y1"])
        slope, offset = np.polyfit(list(heights.values()), list(heights), 1)
        assert slope * reference + offset == pytest.approx(math.log(512), abs=0.01)


def test_a_reconstruction_is_drawn_by_itself_without_a_uniform_level(tmp_path: Path) -> None:
    """A mean squared error of some hundredths says nothing beside nats, nor do nats beside it."""
    records = round_records(3)
    plain = tmp_path / "plain"
    write_run(plain, records, rounds=3)
    for record in records:
        record["sites"]["beta-ct"]["losses"]["volume_reconstruction"] = 0.05 / record["round"]
    write_run(tmp_path, records, rounds=3)
    before, after = (section(report_of(out), "Loss") for out in (plain, tmp_path))
    *compared, drawn = after.all("figure")
    assert compared == list(before.all("figure"))
    assert next(drawn.all("figcaption")).text == "volume reconstruction"
    assert not list(drawn.all("line", **{"class": "reference"}))
    assert "mean squared error" in after.text
    assert "mean squared error" not in before.text


def polylines(panel: str) -> list[np.ndarray]:
    return [
        np.array([[float(v) for v in pair.split(",")] for pair in points.split()])
        for points in re.findall(r'<polyline class="line" points="([^"]+)"', panel)
    ]


def test_a_curve_is_linear_in_round_and_value_and_breaks_where_a_value_is_missing() -> None:
    points = [(3, 1.0), (4, 2.0), (5, None), (6, 4.0), (7, math.nan), (8, 5.0), (9, 6.0), (13, 10.0)]
    panel = charts.line_panel("t", [charts.Series("s", points, 0)], reference=None, bounds=(0.0, 11.0))
    first, last = polylines(panel)
    np.testing.assert_allclose(np.diff(first, axis=0)[0] * [1, -1], np.diff(last, axis=0)[0] * [1, -1], atol=0.11)
    np.testing.assert_allclose(np.diff(last, axis=0)[1], 4 * np.diff(last, axis=0)[0], atol=0.4)


def test_bars_are_as_high_as_their_bytes() -> None:
    panel = charts.traffic_panel("t", [1, 2], {"a": [(1000, 300), (2000, 0)], "b": [(3000, 900), (0, 450)]})
    heights = [float(h) for h in re.findall(r'<rect class="bar[^>]* height="([0-9.]+)"', panel)]
    # In the order drawn: round 1 down a, b, up a, b; round 2 alike. A gap of 0.8 is taken off each bar.
    bytes_drawn = np.array([1000, 3000, 300, 900, 2000, 0, 0, 450])
    drawn = np.array(heights) + 0.8 * (np.array(heights) > 1.6)
    np.testing.assert_allclose(drawn, bytes_drawn * drawn[1] / 3000, atol=0.05)


def test_points_of_a_projection_keep_their_shape() -> None:
    """One scale for both axes: distances in the panel are in proportion to those between embeddings."""
    points = np.array([[0.0, 0.0], [6.0, 0.0], [6.0, 1.0]])
    panel = charts.scatter_panel("t", points, np.array(["a"] * 3), {"a": 0})
    centres = np.array(re.findall(r'<circle cx="([0-9.]+)" cy="([0-9.]+)"', panel), float)
    apart = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    assert apart[0] / apart[1] == pytest.approx(6.0, rel=1e-2)


@pytest.mark.parametrize("kind", ["few", "many"])
def test_a_projection_without_points_or_with_too_many_still_draws(kind: str) -> None:
    points = np.zeros((0, 2)) if kind == "few" else np.random.default_rng(0).normal(size=(40_001, 2))
    panel = charts.scatter_panel("t", points, np.array(["a"] * len(points), dtype=str), {"a": 0})
    assert panel.count("<circle") == (0 if kind == "few" else 1482)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 17.9), (6.123, 6.131), (0.0, 4.2e7), (1e-7, 3e-7)])
def test_ticks_are_round_evenly_spaced_and_inside(low: float, high: float) -> None:
    ticks = charts.ticks(low, high, 4)
    assert 2 <= len(ticks) <= 6
    assert low <= ticks[0] + 1e-12
    assert ticks[-1] <= high * (1 + 1e-9)
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0])
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 1e-6


def palettes() -> Iterator[Any]:
    blocks = re.findall(r":root \{([^}]*--paper[^}]*)\}", STYLE)
    for name, block in zip(("light", "dark"), blocks, strict=True):
        yield pytest.param(dict(re.findall(r"--(\w+): (#\w{6})", block)), id=name)


@pytest.mark.parametrize("palette", list(palettes()))
def test_colours_stand_out_from_the_paper(palette: dict[str, str]) -> None:
    """WCAG 2.2: text 4.5 to 1 (1.4.3), graphics 3 to 1 (1.4.11)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(name: str, ground: str) -> float:
        light, dark = sorted((luminance(palette[name]), luminance(palette[ground])), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert all(contrast(name, ground) >= 4.5 for name in ("ink", "soft", "warn") for ground in ("paper", "wash"))
    assert all(contrast(f"s{i}", ground) >= 3 for i in range(charts.STYLES) for ground in ("paper", "wash"))


def test_the_report_of_a_long_run_stays_small(tmp_path: Path) -> None:
    write_run(tmp_path, round_records(200), rounds=200)
    assert write_report(tmp_path).stat().st_size < 1_500_000


def test_writing_again_gives_the_same_bytes(whole_run: Path) -> None:
    first = write_report(whole_run).read_bytes()
    assert write_report(whole_run).read_bytes() == first
