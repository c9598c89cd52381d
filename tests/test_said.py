"""What `unimiss-server run` shows of a run is what the ServerApp, another process, showed of it."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from server import app, said, superlink
from server.composition import Composed, compose
from server.display import Tally
from server.home import Home
from server.said import Said
from tests.coordinator_home import home_of_alpha, write_study
from unimiss_core import progress
from unimiss_core.progress import Collapsed, Event, Note, RoundDone, RoundStarted, SiteReplied, StepDone

SIGN = "volume: all targets are alike, at the uniform answer"


@pytest.fixture
def told() -> Iterator[list[Event]]:
    events: list[Event] = []
    with progress.listen(events.append):
        yield events


SITES = ("alpha-xray", "beta-ct")


def a_round(number: int, *, collapsed: tuple[str, ...] = ()) -> list[Event]:
    """What the process says of a round that heard the sites."""
    return [
        RoundStarted(number, 3, SITES),
        *(SiteReplied(number, site, "ok", "") for site in SITES),
        *(Collapsed(number, site, SIGN, 300 * number) for site in collapsed),
        RoundDone(number, 3, 70.0, {"alpha-xray": 5.5}),
    ]


def say(folder: Path, events: Iterable[Event]) -> None:
    with said.kept(folder):
        for event in events:
            progress.report(event)


def test_what_another_process_says_of_its_rounds_is_said_again_as_it_comes(tmp_path: Path, told: list[Event]) -> None:
    say(tmp_path, a_round(1))
    heard = Said(tmp_path)
    heard.say_again()
    told.clear()
    for part in (a_round(2)[:2], a_round(2)[2:], a_round(3)):
        say(tmp_path, [*part, StepDone("alpha-xray", 1, 2, 5.0)])
        told.clear()
        heard.say_again()
        heard.say_again()
        assert [replace(e, ago_s=0.0) if isinstance(e, RoundStarted) else e for e in told] == part


def test_the_time_of_rounds_counts_from_their_beginning(
    tmp_path: Path, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(said.time, "time", lambda: now[0])
    heard = Said(tmp_path)
    say(tmp_path, [RoundStarted(1, 3, SITES)])
    told.clear()
    now[0] += 1.5
    heard.say_again()
    assert told == [RoundStarted(1, 3, SITES, ago_s=1.5)]
    say(tmp_path, [RoundStarted(2, 3, SITES)])
    told.clear()
    now[0] -= 60.0  # a clock that was put back
    heard.say_again()
    assert told == [RoundStarted(2, 3, SITES)]


def test_the_round_at_work_tells_who_is_waited_for(tmp_path: Path) -> None:
    assert said.at_work(tmp_path) is None
    say(tmp_path, [*a_round(1), *a_round(2)[:2]])
    found = said.at_work(tmp_path)
    assert found is not None
    assert (found.round, list(found.replied), found.silent) == (2, ["alpha-xray"], ["beta-ct"])
    say(tmp_path, [RoundStarted(2, 3, SITES)])  # the round is tried again
    again = said.at_work(tmp_path)
    assert again is not None
    assert again.silent == list(SITES)
    say(tmp_path, a_round(2)[1:])
    assert said.at_work(tmp_path) is None


def test_what_collapsed_is_named_in_its_rounds_and_at_the_end(tmp_path: Path, told: list[Event]) -> None:
    tally, heard = Tally(clock=lambda: 0.0), Said(tmp_path)
    for number, collapsed in {1: (), 2: SITES, 3: ("beta-ct",)}.items():
        say(tmp_path, a_round(number, collapsed=collapsed))
        told.clear()
        heard.say_again()
        for event in told:
            tally.count(event)
    assert [event for event in told if isinstance(event, Collapsed)] == [Collapsed(3, "beta-ct", SIGN, 900)]
    assert tally.summary()[-1].startswith("Collapsed in round 3, so that nothing is learned: beta-ct;")


def test_notes_of_another_process_are_shown_once_in_their_order(tmp_path: Path, told: list[Event]) -> None:
    say(tmp_path, [Note("of an earlier run")])
    heard = Said(tmp_path)
    note = '{"at": 7.0, "event": "Note", "text": "'
    lines = [
        note + 'a \\u00e9"}\n',
        note + "torn",
        ' off"}\n',
        f"[]\n7\n{{}}\nno line\n{'[' * 50_000}\n",
        note + 'c"}\n',
    ]
    shown = []
    for line in lines:
        told.clear()
        with (tmp_path / "said.jsonl").open("a") as file:
            file.write(line)
        heard.say_again()
        heard.say_again()
        shown.append([event.text for event in told if isinstance(event, Note)])
    assert shown == [["a é"], [], ["torn off"], [], ["c"]]


def test_notes_that_cannot_be_written_cost_no_round(tmp_path: Path, told: list[Event]) -> None:
    with said.kept(tmp_path / "nowhere"):
        progress.report(Note("all the same"))
    assert told == [Note("all the same")]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return home_of_alpha(tmp_path / "home")


@pytest.fixture
def composed(home: Home, tmp_path: Path) -> Composed:
    return compose(home, write_study(tmp_path / "study.yaml"))


@pytest.mark.parametrize("is_named", [True, False])
def test_the_server_app_of_a_coordinators_folder_alone_keeps_what_it_says(
    home: Home, composed: Composed, monkeypatch: pytest.MonkeyPatch, told: list[Event], is_named: bool
) -> None:
    """In a simulation sites say theirs in the same process, which nobody else need read."""
    for name, value in superlink.environment(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(app, "run", lambda *_, **__: progress.report(Note("best: round 2")))
    monkeypatch.setattr(app.uploads, "bound", lambda _: None)
    heard = Said(composed.folder.path)
    asked = "toy" if is_named else str(composed.file)
    app.main(None, Context(1, 1, {}, RecordDict(), {"coordinator": asked}))  # type: ignore[arg-type]
    told.clear()
    heard.say_again()
    assert told == ([Note("best: round 2")] if is_named else [])
    kept = composed.folder.path / "said.jsonl"
    assert kept.exists() == is_named
    assert not is_named or json.loads(kept.read_text()).items() >= {"event": "Note", "text": "best: round 2"}.items()
