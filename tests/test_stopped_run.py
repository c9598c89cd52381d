"""A run that ended before its last round: what is kept of it, and what its report tells."""

import json
from pathlib import Path

import pytest
from flwr.app import Context, Message

from server.coordinator_config import CoordinatorConfig
from server.local_grid import LocalGrid
from server.rounds import Federation
from tests.federation import small_study, stub_app
from tests.run_artefacts import round_records, write_run
from tests.test_report import HOSTILE, Node, report_of, section
from tests.test_rounds import broken, ct, federate, xray
from unimiss_core.errors import RoundError
from unimiss_core.wire import Refusal


def test_why_a_run_ended_is_kept_until_it_is_gone_on_with(tmp_path: Path) -> None:
    stopped = tmp_path / "stopped.json"
    with pytest.raises(RoundError):
        federate(tmp_path, [ct()], min_replies=2)
    there = json.loads(stopped.read_text())
    assert there["round"] == 1
    assert there["error"].startswith("1 of at least 2 sites are there")
    assert {name: (site["status"], site["scans"]) for name, site in there["sites"].items()} == {
        "ct": ("there", {"2d": 0, "3d": 6})
    }
    with pytest.raises(RoundError):
        federate(tmp_path, [ct(), xray(answer=broken)], min_replies=2, resume=True)
    failed = json.loads(stopped.read_text())
    assert {name: site["status"] for name, site in failed["sites"].items()} == {"ct": "ok", "xray": "error"}
    federate(tmp_path, [ct(), xray()], min_replies=2, resume=True)
    assert not stopped.exists()


@pytest.mark.parametrize(("reason", "asked"), [("site_setup", 1), ("failed", 3)])
def test_a_site_that_time_does_not_mend_is_not_asked_again_where_there_is_none(
    tmp_path: Path, reason: str, asked: int
) -> None:
    app, hellos = stub_app({}), []

    def refuse(message: Message, _: Context) -> Message:
        hellos.append(message)
        return Message(Refusal(reason).pack(), reply_to=message)

    app._registered_funcs["query.default"] = refuse
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path, wait_s=0.1, retry_s=0.0)
    with (
        LocalGrid(app, {"a": {"name": "a"}}, run_config={}) as grid,
        pytest.raises(RoundError, match=f"0 of at least 1 sites are there; a: {reason}"),
    ):
        Federation(grid, small_study(), config).run()
    assert len(hellos) == asked


def test_a_run_without_a_round_tells_its_last_roster_and_why_it_ended(tmp_path: Path) -> None:
    write_run(tmp_path, [], rounds=9)
    there = {"status": "there", "reason": "", "scans": {"2d": 412, "3d": 0}}
    sites = {"beta-ct": {"status": "refused", "reason": "no_usable_scans"}, "alpha-xray": there}
    stop = {"round": 1, "error": f"1 of at least 2 sites are there; {HOSTILE}", "sites": sites}
    (tmp_path / "stopped.json").write_text(json.dumps(stop))
    page = report_of(tmp_path)
    verdict = next(page.all("p", **{"class": "verdict"})).text
    said = f"The run ended in round 1: 1 of at least 2 sites are there; {HOSTILE}."
    assert verdict == f"No round was finished of the 9 rounds that the study asks for. {said}"
    rows = [[cell.text for cell in row.children if isinstance(cell, Node)] for row in section(page, "Sites").all("tr")]
    assert rows == [
        ["Site", "Trains on", "Scans", "When the run ended"],
        ["alpha-xray", "2D", "412 images", "there"],
        [
            "beta-ct",
            "unknown",
            "unknown",
            "refusedthe site's folders hold nothing that can be trained on no_usable_scans",
        ],
    ]


def test_a_stopped_run_tells_why_it_ended(tmp_path: Path) -> None:
    write_run(tmp_path, round_records(2), rounds=9)
    (tmp_path / "stopped.json").write_text(json.dumps({"round": 3, "error": "it was interrupted"}))
    verdict = next(report_of(tmp_path).all("p", **{"class": "verdict"})).text
    assert verdict.endswith("Every site counted in every round. The run ended in round 3: it was interrupted.")
