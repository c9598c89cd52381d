"""A deadline that is too short for a site is told with what the site needs."""

import threading
import time
from pathlib import Path

import pytest

from server import exchange
from server.attendance import Attendance
from server.slow_sites import SlowSites
from tests.federation import StubSite, good_answer, metric_rows
from tests.test_faults import exact_study, federate, raises, site
from tests.test_private_rounds import private_study
from unimiss_core import progress
from unimiss_core.wire import TrainReply, TrainRequest


def told(*late: bool, seconds: float | None = None, tries: int = 1) -> list[str]:
    """What is said of a site that is late, or not, in rounds 1, 2, ..."""
    heard: list[progress.Event] = []
    slow = SlowSites(600.0)
    if seconds is not None:
        slow.note_seconds("beta", seconds)
    with progress.listen(heard.append):
        for round, one in enumerate(late, start=1):
            for _ in range(tries):
                slow.note("beta", round, late=one)
    return [event.text for event in heard if isinstance(event, progress.Note)]


def test_the_second_round_in_a_row_is_told_once_with_the_deadline_and_what_the_site_needs() -> None:
    (text,) = told(True, True, True, True, seconds=723.0)
    assert text.startswith("beta was not done in time in 2 rounds in a row: its last update took 12 min 03 s, and ")
    assert "deadline_s is 600 s. Raise deadline_s" in text
    assert "how long it needs is not known yet" in told(True, True)[0]


@pytest.mark.parametrize("late", [(True,), (True, False, True), (False, True, False)])
def test_once_is_chance(late: tuple[bool, ...]) -> None:
    assert told(*late) == []


def test_two_tries_of_a_round_are_one_round() -> None:
    assert told(True, tries=3) == []


def test_a_site_whose_updates_all_come_late_is_told_of(tmp_path: Path) -> None:
    def slow(request: TrainRequest, of: StubSite) -> TrainReply:
        time.sleep(1.5)
        return good_answer(request, of)

    heard: list[progress.Event] = []
    with progress.listen(heard.append):
        federate(tmp_path, [site("slow", slow), site("a")], exact_study(late_weight=0.5), deadline_s=1.0)
    (text,) = [event.text for event in heard if isinstance(event, progress.Note) and event.text.startswith("slow ")]
    assert text.startswith("slow was not done in time in 2 rounds in a row")
    assert "deadline_s is 1 s" in text


# -- where patients pay for each answer, whether it comes in time or not -----------------------------------------------


@pytest.mark.parametrize(
    ("patients_pay", "others_suffice"),
    [(True, True), (True, False), (False, True)],
    ids=["not asked", "the round needs it", "nobody pays"],
)
def test_a_site_that_is_late_is_not_asked_behind_that_unless_the_round_needs_it(
    tmp_path: Path, patients_pay: bool, others_suffice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "GRACE", 60)  # requests live as long as the test
    next_began = threading.Event()

    def slow(request: TrainRequest, of: StubSite) -> TrainReply:
        assert next_began.wait(20)
        return good_answer(request, of)

    def prompt(request: TrainRequest, of: StubSite) -> TrainReply:
        if request.round == 2:
            next_began.set()
        return good_answer(request, of)

    def other(request: TrainRequest, of: StubSite) -> TrainReply:
        return good_answer(request, of) if others_suffice or request.round == 1 else raises(request, of)

    late = site("slow", slow)
    sites = [late, site("a", prompt), site("b", other)]
    study = private_study(2) if patients_pay else exact_study(2)
    failures = federate(tmp_path, sites, study, deadline_s=0.5, min_sites=2, min_replies=2).attendance.failures
    first, second = ([row["sites"][name]["reason"] for name in ("slow", "a", "b")] for row in metric_rows(tmp_path))
    is_asked = not (patients_pay and others_suffice)
    assert first == ["no_reply", "", ""]
    assert second == (["busy", "", ""] if not is_asked else ["", "", "" if others_suffice else "failed"])
    assert [request.round for request in late.requests] == ([1, 2] if is_asked else [1])
    told = {name: failed.unanswered for name, failed in failures.items()}
    assert told == ({"slow": True} if not is_asked else {} if others_suffice else {"b": False})


@pytest.mark.parametrize(
    ("patients_pay", "unanswered", "asked"),
    [(True, True, 12), (True, False, 64), (False, True, 64)],
    ids=["paid for nothing", "refused, which costs nothing", "nobody pays"],
)
def test_a_site_that_never_answers_in_time_is_asked_ever_less_where_patients_pay(
    patients_pay: bool, unanswered: bool, asked: int
) -> None:
    """In the rounds 1, 2, 3, then after pauses of 1, 2, 4, ...: 12 to round 523, and the next would be 1036."""
    attendance, rounds = Attendance(), []
    for round in range(1, 1001):
        if not attendance.is_set_aside("slow", round, 3, patients_pay=patients_pay):
            rounds.append(round)
            attendance.note("slow", round, counted=False, unanswered=unanswered)
        attendance = Attendance.of(attendance.facts())  # as a checkpoint keeps it
    assert len(rounds) == asked
    assert rounds[:7] == [1, 2, 3, 5, 8, 13, 22]
    attendance.note("slow", 1001, counted=True)
    assert not attendance.is_set_aside("slow", 1002, 3, patients_pay=patients_pay)


def test_a_checkpoint_of_before_does_not_tell_who_was_late() -> None:
    found = Attendance.of({"failures": {"slow": [9, 5]}, "sizes": {}})
    assert [found.is_set_aside("slow", round, 3, patients_pay=True) for round in (21, 22)] == [True, False]
