"""A deadline that is too short for a site is told with what the site needs."""

import time
from pathlib import Path

import pytest

from server.slow_sites import SlowSites
from tests.federation import StubSite, good_answer
from tests.test_faults import exact_study, federate, site
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
