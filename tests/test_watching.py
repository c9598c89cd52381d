"""What `unimiss-server run` shows of a run is what the ServerApp, another process, showed of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from server import app, said, superlink
from server.composition import Composed, compose
from server.display import Tally
from server.home import Home
from server.run_folder import RunFolder
from server.watching import Watching
from tests.coordinator_home import approved_site, found_home, write_study
from tests.run_artefacts import round_records
from unimiss_core import progress
from unimiss_core.progress import Collapsed, Event, Note

SIGN = "volume: all targets are alike, at the uniform answer"


@pytest.fixture
def told() -> Iterator[list[Event]]:
    events: list[Event] = []
    with progress.listen(events.append):
        yield events


def test_what_collapsed_is_named_in_its_rounds_and_at_the_end(tmp_path: Path, told: list[Event]) -> None:
    folder, tally, rows = RunFolder(tmp_path), Tally(clock=lambda: 0.0), round_records(3)
    watching = Watching(folder, 3)
    for row in rows:
        with said.kept(tmp_path):  # as the process says it that heard the sites
            for site in {2: ("alpha-xray", "beta-ct"), 3: ("beta-ct",)}.get(row["round"], ()):
                progress.report(Collapsed(row["round"], site, SIGN))
            folder.append_metrics(row)
        told.clear()
        watching.look()
        for event in told:
            tally.count(event)
    assert [event for event in told if isinstance(event, Collapsed)] == [Collapsed(3, "beta-ct", SIGN)]
    assert tally.summary()[-1].startswith("Collapsed in round 3, so that nothing is learned: beta-ct;")


def test_notes_of_another_process_are_shown_once_in_their_order(tmp_path: Path, told: list[Event]) -> None:
    with said.kept(tmp_path):
        progress.report(Note("of an earlier run"))
    watching = Watching(RunFolder(tmp_path), 3)
    lines = ['{"note": "a \\u00e9"}\n', '{"note": "torn', ' off"}\n', "[]\n7\n{}\nno line\n", '{"note": "c"}\n']
    shown = []
    for line in lines:
        told.clear()
        with (tmp_path / "said.jsonl").open("a") as file:
            file.write(line)
        watching.look()
        watching.look()
        shown.append([event.text for event in told if isinstance(event, Note)])
    assert shown == [["a é"], [], ["torn off"], [], ["c"]]


def test_notes_that_cannot_be_written_cost_no_round(tmp_path: Path, told: list[Event]) -> None:
    with said.kept(tmp_path / "nowhere"):
        progress.report(Note("all the same"))
    assert told == [Note("all the same")]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = found_home(tmp_path / "home", min_sites=1)
    approved_site(home, "alpha")
    return home


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
    watching = Watching(composed.folder, 2)
    asked = "toy" if is_named else str(composed.file)
    app.main(None, Context(1, 1, {}, RecordDict(), {"coordinator": asked}))  # type: ignore[arg-type]
    told.clear()
    watching.look()
    assert told == ([Note("best: round 2")] if is_named else [])
    kept = composed.folder.path / "said.jsonl"
    assert kept.exists() == is_named
    assert not is_named or json.loads(kept.read_text()) == {"note": "best: round 2"}
