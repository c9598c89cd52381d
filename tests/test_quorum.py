"""A round that too few sites or updates came of: who is asked again, who is not, and what the operator is told."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from flwr.app import Context, Message

from server.coordinator_config import CoordinatorConfig, RegisteredSite
from server.local_grid import LocalGrid
from server.quorum import too_few_updates
from server.rounds import Federation
from server.simulate import Quorum
from server.site_round import SiteRound
from tests.federation import Answer, StubSite, good_answer, small_study, stub_app
from tests.test_site_level import site_study
from unimiss_core.errors import RoundError, WireError
from unimiss_core.reasons import REASONS, lasts
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Refusal, TrainReply, TrainRequest

pytestmark = pytest.mark.usefixtures("narrow")

LASTING = sorted(reason for reason in REASONS if lasts(reason))


def refusing(*reasons: str) -> Answer:
    """Each in its turn, the last one for ever; `ok` is an update."""

    def answer(request: TrainRequest, site: StubSite) -> TrainReply:
        reason = reasons[min(len(site.requests), len(reasons)) - 1]
        if reason == "ok":
            return good_answer(request, site)
        raise WireError(reason, "")

    return answer


def site(name: str, *reasons: str) -> StubSite:
    return StubSite(name, {2: 10}, refusing(*reasons))


def told_at_the_end_of(out: Path, sites: Sequence[StubSite], **config: object) -> str:
    """What a run that needs two updates ends with."""
    settings = {"study": Path("unused"), "out": out, "min_sites": 2, "min_replies": 2, "wait_s": 0.1, **config}
    nodes = {one.name: {"name": one.name} for one in sites}
    with (
        LocalGrid(stub_app({one.name: one for one in sites}), nodes, run_config={}) as grid,
        pytest.raises(RoundError) as failure,
    ):
        Federation(grid, small_study(3), CoordinatorConfig.model_validate(settings)).run()
    assert failure.value.exit_code == 5
    return str(failure.value)


# -- who is asked again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["budget", "held", "undisclosed", "ledger", "promise"])
def test_who_refuses_for_a_reason_that_lasts_is_asked_once(tmp_path: Path, reason: str) -> None:
    """Also where there would be a pause to mend it in: an operator who knows is worth more than one who waits."""
    sites, began = [site("a", "ok"), site("b", "ok", reason)], time.monotonic()
    told = told_at_the_end_of(tmp_path, sites, retry_s=60.0)
    assert time.monotonic() - began < 30
    assert [request.round for request in sites[1].requests] == [1, 2]
    assert told.startswith("round 2 could not be completed: 1 of at least 2 updates count (a: ok; b: refused")
    assert "rounds up to 1 are saved. No time mends this; a person can:\n" in told
    assert f"\n  - b, {reason}: {REASONS[reason].mend}\n" in told
    assert "Mend the sites" not in told


def test_a_mixture_with_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    sites = [site("a", "ok"), site("b", "budget"), site("c", "failed")]
    told = told_at_the_end_of(tmp_path, sites, retry_s=0.0, min_sites=3, min_replies=3)
    assert [len(one.requests) for one in sites] == [1, 3, 3]
    assert "Mend the sites, then resume:\n  - b, budget: " in told


def test_what_passed_in_the_second_try_is_enough(tmp_path: Path) -> None:
    sites = [site("a", "ok"), site("b", "budget"), site("c", "failed", "ok", "ok", "budget")]
    told = told_at_the_end_of(tmp_path, sites, retry_s=0.0)
    assert told.startswith("round 3 could not be completed")
    assert [request.round for request in sites[2].requests] == [1, 1, 2, 3]


def test_where_all_registered_sites_have_refused_nobody_is_waited_for(tmp_path: Path) -> None:
    """One that has not come yet may come, and is."""
    app = stub_app({})

    def refuse(message: Message, _: Context) -> Message:
        return Message(Refusal("budget").pack(), reply_to=message)

    app._registered_funcs["query.default"] = refuse

    def seconds(*names: str) -> float:
        settings = {"wait_s": 4.0, "round_tries": 1, "sites": tuple(RegisteredSite(name=name) for name in names)}
        config = CoordinatorConfig(study=Path("unused"), out=tmp_path / "-".join(names), **settings)
        began = time.monotonic()
        with LocalGrid(app, {"a": {"name": "a"}}, run_config={}) as grid, pytest.raises(RoundError, match="a: budget"):
            Federation(grid, small_study(), config).run()
        return time.monotonic() - began

    assert seconds("a") < 3
    assert seconds("a", "b") > 4


# -- what is told ------------------------------------------------------------------------------------------------------


def told(study: StudyConfig, reasons: dict[str, str], **config: object) -> str:
    lines = {name: SiteRound("refused" if reason else "ok", reason) for name, reason in reasons.items()}
    settings = {"study": Path("s"), "out": Path("o"), "min_sites": 3, "min_replies": 3, **config}
    return str(too_few_updates(2, lines, study, CoordinatorConfig.model_validate(settings)))


def test_each_reason_that_lasts_says_once_what_to_do_and_for_whom() -> None:
    said = told(small_study(), {f"{reason}-{n}": reason for reason in LASTING for n in (1, 2)})
    for reason in LASTING:
        assert said.count(f"{reason}-1 and {reason}-2, {reason}: {REASONS[reason].mend}\n") == 1
    assert "you can do nothing about it" in said
    assert "unimiss-site clear SITE.yaml" in said
    assert "forget_ledgers" in said


def test_the_way_on_without_them_names_the_file_that_its_reader_wrote() -> None:
    reasons = {"a": "", "b": "", "c": "budget"}
    without = "without them: lower min_sites and min_replies of the coordinator file to 2, then resume"
    assert f"{without}\n" in told(small_study(), reasons)
    sites = tuple(RegisteredSite(name=name) for name in reasons)
    assert f"{without}; who is taken out of its `sites` is not asked" in told(small_study(), reasons, sites=sites)
    simulated = told(small_study(), reasons, written_by="unimiss-simulate")
    assert "lower quorum.min_sites and quorum.min_replies of the simulation file to 2, then resume; who" in simulated
    composed = told(small_study(), reasons, sites=sites, written_by="unimiss-server")
    assert "min_replies of the coordinator.yaml to 2, then `unimiss-server run` again\n" in composed
    assert "resume" not in composed
    assert f"{without};" in told(small_study(), reasons, sites=sites, ledgers=Path("ledgers.json"))  # by hand as well
    assert {"min_sites", "min_replies"} <= Quorum.model_fields.keys()


def test_where_no_site_is_left_nobody_is_told_to_go_on_without() -> None:
    said = told(small_study(), {"a": "budget", "b": "held", "c": "budget"})
    assert "without them" not in said
    assert said.endswith("or leave it at this: what was finished is saved, and the last checkpoint is whole")


@pytest.mark.parametrize("reason", ["budget", "failed"])
def test_a_site_level_study_is_not_told_to_lower_what_it_forbids(reason: str) -> None:
    reasons = {"a": "", "b": "", "c": reason}
    said = told(site_study(sites=3), reasons)
    assert "lower min_sites" not in said
    assert "privacy.sites=3 says how many updates a round takes, so that no lower min_replies is accepted" in said
    assert "begin a run of a study with a lower privacy.sites, to whose epsilon what this one released adds" in said
    assert "lower min_sites and min_replies of the coordinator file to 2" in told(site_study(sites=2), reasons)
