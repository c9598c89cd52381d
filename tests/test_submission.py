"""A run is submitted until its own artefacts say that it is finished, or that a person is needed."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from server import submission
from server.control import RunState
from server.run_folder import RunFolder
from server.server_config import Patience
from server.submission import RunEnded, Submission
from unimiss_core import checkpoint
from unimiss_core.errors import AuditError, ConfigError, RoundError, RunFolderError, UnimissError

LOST = RunState(is_finished=True, how="failed", details="No heartbeat received from the task")


class StubSuperLink:
    """Numbers runs from 1; says of each what `states` holds, RUNNING where it holds nothing."""

    def __init__(self) -> None:
        self.submitted: list[Mapping[str, str | bool]] = []
        self.states: dict[int, RunState | None] = {}

    def submit(self, run_config: Mapping[str, str | bool]) -> int:
        self.submitted.append(run_config)
        return len(self.submitted)

    def state(self, run: int) -> RunState | None:
        return self.states.get(run, RunState(is_finished=False, how="", details=""))


class Trial:
    """A submission of three rounds, its clock, and how many rounds its folder holds."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.rounds_done = 100.0, 0
        self.link, self.folder = StubSuperLink(), RunFolder(folder)
        folder.mkdir()
        monkeypatch.setattr(
            submission.checkpoint,
            "latest",
            lambda _: folder / checkpoint.folder_name(self.rounds_done) if self.rounds_done else None,
        )
        patience = Patience(pause_s=10.0, longest_s=25.0, tries=4)
        self.submission = Submission(self.link, self.folder, 3, patience, clock=lambda: self.now)

    def after(self, seconds: float) -> bool:
        self.now += seconds
        return self.submission.step()

    def begin(self) -> int:
        assert not self.submission.step()
        assert self.submission.run is not None
        return self.submission.run

    def ended(self, run: int, error: UnimissError | None = None) -> None:
        self.link.states[run] = LOST
        if error is not None:
            self.folder.note_end(run, error)


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    return Trial(tmp_path / "run", monkeypatch)


def test_a_run_that_finishes_is_submitted_once(trial: Trial) -> None:
    run = trial.begin()
    assert trial.link.submitted == [{"coordinator": "run", "resume": True}]  # no path: every site is told
    assert not trial.after(60)
    trial.rounds_done = 3
    assert not trial.after(60)  # its report is still being written
    trial.folder.note_finished(3)
    trial.link.states[run] = RunState(is_finished=True, how="completed", details="")
    assert trial.after(60)
    assert len(trial.link.submitted) == 1


def test_a_finished_run_is_not_submitted(trial: Trial) -> None:
    trial.rounds_done = 3
    trial.folder.note_finished(3)
    assert trial.submission.step()
    assert trial.link.submitted == []


def test_a_run_that_went_back_to_an_earlier_round_is_not_finished(trial: Trial) -> None:
    trial.folder.note_finished(3)
    trial.rounds_done = 2
    trial.begin()


def test_what_flower_calls_completed_is_not_believed(trial: Trial) -> None:
    run = trial.begin()
    trial.link.states[run] = RunState(is_finished=True, how="completed", details="")
    assert not trial.after(60)
    assert not trial.after(60)
    assert len(trial.link.submitted) == 2


def test_what_flower_calls_failed_is_finished_where_the_run_says_so(trial: Trial) -> None:
    trial.ended(trial.begin())
    trial.rounds_done = 3
    trial.folder.note_finished(3)
    assert trial.after(60)


def test_a_run_that_was_killed_after_its_last_round_is_submitted_again_until_it_is_finished(trial: Trial) -> None:
    """The model, or the report, may not be there yet."""
    run = trial.begin()
    trial.rounds_done = 3
    trial.ended(run)
    assert not trial.after(60)
    trial.now += 60
    trial.ended(trial.begin())
    trial.folder.note_finished(3)
    assert trial.after(60)
    assert len(trial.link.submitted) == 2


def test_how_it_ended_goes_before_how_many_rounds_are_done(trial: Trial) -> None:
    run = trial.begin()
    trial.rounds_done = 3
    trial.ended(run, AuditError("the audit log cannot be written to"))
    with pytest.raises(RunEnded, match="the audit log cannot be written to") as caught:
        trial.after(60)
    assert caught.value.exit_code == 8


def test_a_disk_that_stays_full_after_the_last_round_is_told_as_that(trial: Trial) -> None:
    trial.rounds_done = 3
    for _ in range(3):
        trial.ended(trial.begin(), RunFolderError("no room"))
        assert not trial.after(60)
        trial.now += 60
    trial.ended(trial.begin(), RunFolderError("no room"))
    with pytest.raises(RunEnded, match=r"4 tries did not bring the run to its end, .* the last: no room") as caught:
        trial.after(60)
    assert caught.value.resumes


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_round(trial: Trial) -> None:
    for pause in (10, 20, 25):
        trial.ended(trial.begin(), RoundError("too few replied"))
        assert not trial.after(submission.ASK_S)
        assert not trial.after(pause - 0.1)
        assert trial.submission.run is None
        trial.now += 0.2
    run = trial.begin()
    trial.rounds_done = 1
    trial.ended(run, RoundError("too few replied"))
    assert not trial.after(submission.ASK_S)
    assert trial.submission.fruitless == 0
    assert not trial.after(10.1)
    assert trial.submission.run is not None


def test_tries_without_a_round_come_to_an_end(trial: Trial) -> None:
    for _ in range(3):
        trial.ended(trial.begin(), RoundError("too few replied"))
        assert not trial.after(60)
        trial.now += 60
    trial.ended(trial.begin(), RoundError("too few replied"))
    with pytest.raises(RunEnded, match="4 tries finished no round; the last: too few replied") as caught:
        trial.after(60)
    assert (caught.value.exit_code, caught.value.resumes) == (RoundError.exit_code, True)


def test_what_is_tried_again_by_itself_is_not_said_to_need_a_person(
    trial: Trial, caplog: pytest.LogCaptureFixture
) -> None:
    told = "1 of at least 2 sites are there; beta: policy. No time mends this; a person can:\n  - beta: lower it"
    trial.ended(trial.begin(), RoundError(told))
    trial.after(5.0)
    (said,) = caplog.messages
    assert said.endswith(
        "(1 of at least 2 sites are there; beta: policy); tried again in 10 s; `unimiss-server status` says "
        "what can be done meanwhile"
    )


def test_an_error_that_lasts_ends_it_at_once(trial: Trial) -> None:
    trial.ended(trial.begin(), ConfigError("the study is another"))
    with pytest.raises(RunEnded, match="the study is another") as caught:
        trial.after(60)
    assert (caught.value.exit_code, caught.value.resumes) == (ConfigError.exit_code, False)


def test_the_end_of_an_earlier_run_is_not_taken_for_this_ones(trial: Trial) -> None:
    trial.folder.note_end(7, ConfigError("of old"))
    trial.ended(trial.begin())
    assert not trial.after(60)
    assert trial.submission.fruitless == 1


def test_a_superlink_that_lost_its_database_gets_the_run_anew(trial: Trial) -> None:
    trial.link.states[trial.begin()] = None
    assert not trial.after(60)
    trial.now += 60
    assert trial.begin() == 2
