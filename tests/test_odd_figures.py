"""A figure that no artefact can hold is refused on the wire; one that stands in a run's files costs itself alone."""

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from server.artefacts import SiteRecord, read_artefacts
from server.model_card import privacy_in_words, site_epsilon_by
from server.report import write_report
from tests.federation import StubSite, good_answer, metric_rows, small_study
from tests.run_artefacts import round_records, study, write_run
from tests.test_rounds import federate, xray
from unimiss_core.errors import WireError
from unimiss_core.gaussian_privacy import gaussian_epsilon
from unimiss_core.wire import Introduction, TrainReply, TrainRequest

SITE_LEVEL = {"mode": "site", "max_epsilon": 50.0, "noise_multiplier": 2.0, "clip_norm": 1.0, "sites": 2}


@pytest.mark.usefixtures("narrow")
def test_a_site_that_says_it_worked_longer_than_a_report_can_hold_costs_itself_alone(tmp_path: Path) -> None:
    def slow(request: TrainRequest, site: StubSite) -> TrainReply:
        return replace(good_answer(request, site), seconds=2e12)

    federate(tmp_path, [xray("good"), xray("evil", slow)], small_study(2))
    lines = [row["sites"] for row in metric_rows(tmp_path)]
    assert [(line["good"]["status"], line["evil"]["reason"]) for line in lines] == [("ok", "malformed")] * 2
    run = read_artefacts(tmp_path)
    assert (len(run.rounds), run.gaps) == (2, ())
    write_report(tmp_path)
    assert "2 of 2 rounds" in re.sub(r"<[^>]+>", "", (tmp_path / "report.html").read_text())


@pytest.mark.parametrize("facts", [{"left_out": 2**63}, {"scans_2d": 2**63}, {"scans_3d": -(2**64)}])
def test_a_count_that_no_artefact_can_hold_is_refused_before_it_counts(facts: dict[str, int]) -> None:
    packed = Introduction("a", {2: 3, 3: 0}).pack()
    with pytest.raises(WireError, match="should be at most"):
        Introduction.unpack(RecordDict({"facts": ConfigRecord({**packed["facts"], **facts})}))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("field", "value", "without"),
    [
        ("seconds", 2e12, 0.0),
        ("seconds", "long", 0.0),
        ("steps", -1, 0),
        ("left_out", 2**64, 0),
        ("bytes_up", None, 0),
        ("scans", {"2d": 412, "3d": -7}, {"2d": 412}),
        ("losses", {"image": 2.0, "volume": "low"}, {"image": 2.0}),
        ("diagnostics", [1], {}),
    ],
)
def test_a_figure_that_cannot_be_right_is_left_out_alone(tmp_path: Path, field: str, value: Any, without: Any) -> None:
    records = round_records(2)
    records[1]["sites"]["beta-ct"][field] = value
    write_run(tmp_path, records, rounds=2)
    run = read_artefacts(tmp_path)
    assert [one.round for one in run.rounds] == [1, 2]
    read = run.rounds[1].sites["beta-ct"]
    right = SiteRecord.model_validate(records[1]["sites"]["beta-ct"] | {field: without})
    assert read.model_dump() == right.model_dump()
    assert run.rounds[1].sites["alpha-xray"].seconds == records[1]["sites"]["alpha-xray"]["seconds"]
    assert run.gaps == ("Line 2 of metrics.jsonl: 1 figure cannot be right and was left out.",)


@pytest.mark.parametrize("line", [{"seconds": 1.0}, {"status": 7}, "ok", None])
def test_a_site_whose_line_says_not_how_it_stood_costs_no_other(tmp_path: Path, line: object) -> None:
    records = round_records(1)
    records[0]["sites"]["beta-ct"] = line
    write_run(tmp_path, records, rounds=1)
    run = read_artefacts(tmp_path)
    assert sorted(run.rounds[0].sites) == ["alpha-xray", "gamma-mixed"]
    assert len(run.gaps) == 1


@pytest.mark.parametrize("round", [0, "one", None])
def test_a_line_that_says_not_which_round_it_is_of_is_left_out(tmp_path: Path, round: object) -> None:
    records = round_records(2)
    records[0]["round"] = round
    write_run(tmp_path, records, rounds=2)
    run = read_artefacts(tmp_path)
    assert [one.round for one in run.rounds] == [2]
    assert run.gaps == ("Line 1 of metrics.jsonl is damaged or incomplete and was left out.",)


def delta_of(epsilon: float, releases: int, noise: float) -> float:
    """Of Gaussian releases of sensitivity 1: Balle and Wang 2018, theorem 8."""
    mu, normal = releases**0.5 / noise, NormalDist().cdf
    return normal(mu / 2 - epsilon / mu) - 2.718281828459045**epsilon * normal(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("lost", ["nothing", "a figure", "the lines", "the metrics", "the record"])
def test_the_card_never_says_that_sites_paid_less_than_was_released(tmp_path: Path, lost: str) -> None:
    """Three rounds, the second of which was done twice."""
    records = round_records(3)
    for record, releases in zip(records, (1, 3, 4), strict=True):
        record["global"]["site_epsilon"] = gaussian_epsilon(2.0, releases, 1e-5)
    settings = {"privacy": SITE_LEVEL, "aggregation": {"max_size_ratio": None}}
    held = study(3, **settings)
    book = {"rounds": [1, 2, 2, 3], "study": held.digest()}
    (tmp_path / "released.json").write_text(json.dumps(book))
    if lost == "a figure":
        records[2]["global"]["site_epsilon"] = "a lot"
    write_run(tmp_path, records[:1] if lost == "the lines" else records, rounds=3, **settings)
    if lost == "the metrics":
        (tmp_path / "metrics.jsonl").unlink()
    if lost == "the record":
        (tmp_path / "released.json").write_text("{")
    for round, releases in ((1, 1), (2, 3), (3, 4)):
        paid = site_epsilon_by(held, round, read_artefacts(tmp_path))
        assert paid is not None
        assert delta_of(paid, releases, 2.0) == pytest.approx(1e-5, rel=1e-3)
        assert f"By this round a site has paid {paid:.3g}." in privacy_in_words(held, round, read_artefacts(tmp_path))


def test_each_round_was_released_once_at_least_whatever_is_lost(tmp_path: Path) -> None:
    held = study(3, privacy=SITE_LEVEL, aggregation={"max_size_ratio": None})
    paid = site_epsilon_by(held, 3, read_artefacts(tmp_path))
    assert paid is not None
    assert delta_of(paid, 3, 2.0) == pytest.approx(1e-5, rel=1e-3)
