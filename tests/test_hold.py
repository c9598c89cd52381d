"""A private round that failed is told once; then a person has to let the site go on."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import RecordDict

from client import accounting, hold, private_round
from client.hold import Hold
from client.ledger_entries import Request
from client.site_command import main
from client.site_config import SiteConfig, load_site
from tests.federation import RUN
from tests.test_private_rounds import Hospital, facts_of, private_study, remembered_epsilon, request
from unimiss_core import progress
from unimiss_core.errors import WireError
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Hello, Refusal

Ask = Callable[[RecordDict, str], RecordDict]

FAILED, OTHER = Request(RUN, 3, "a" * 64, "b" * 64), Request(RUN, 4, "a" * 64, "c" * 64)


def of_room(longest_side: int) -> StudyConfig:
    """A study by whose plan the scans take this much room; its name, under which it is charged, says so."""
    return private_study(name=f"side-{longest_side}", plan={"image_longest_side": longest_side})


def answer(ask: Ask, study: StudyConfig, round: int = 1) -> str:
    """The reason, or `ok`."""
    refusal = Refusal.found_in(ask(request(study, round), "train"))
    return "ok" if refusal is None else refusal.reason


def clear(hospital: Hospital) -> int:
    return main(["clear", str(hospital.folder / "site.yaml")])


@pytest.fixture(autouse=True)
def quick_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "epsilon", remembered_epsilon)


@pytest.fixture
def site(tmp_path: Path) -> SiteConfig:
    return load_site(Hospital(tmp_path).folder / "site.yaml").model_copy(update={"state": tmp_path})


def test_what_has_no_room_is_told_once_for_each_time_that_a_person_looks(tmp_path: Path) -> None:
    """Whoever asks with one plan after the other learns no more of what all scans together need."""
    hospital = Hospital(tmp_path, cache_limit_gb=5e-6)  # five pictures of 16 x 14, at two bytes, and not of 32 x 27
    fits, too_large, larger = of_room(16), of_room(32), of_room(40)
    with hospital.asked() as ask:
        introduced = facts_of(ask(Hello(too_large, RUN).pack(), "query"))
        assert answer(ask, too_large) == "undisclosed"
        charged = hospital.entries
        assert [answer(ask, study) for study in (fits, larger)] == ["held", "held"]
        assert answer(ask, too_large, round=2) == "held"
        assert answer(ask, too_large) == "undisclosed"  # the same request, and the same fact
        assert hospital.entries == charged
        assert facts_of(ask(Hello(too_large, RUN).pack(), "query")).keys() == introduced.keys()
        assert clear(hospital) == 0
        assert [answer(ask, study) for study in (fits, larger, fits, too_large)] == ["ok", "undisclosed", "ok", "held"]


def test_a_request_that_succeeds_at_last_does_not_let_the_site_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else every round could fail once and be told, and nobody had looked."""

    def fails(*_: object) -> None:
        raise ValueError("x")

    study, hospital, heard = private_study(), Hospital(tmp_path), list[progress.Event]()
    with progress.listen(heard.append), hospital.asked() as ask:
        with monkeypatch.context() as patched:
            patched.setattr(private_round, "run_round", fails)
            assert answer(ask, study) == "undisclosed"
        assert [answer(ask, study), answer(ask, study, round=2)] == ["ok", "held"]
        assert main(["ledger", str(tmp_path / "site.yaml")]) == 0
        assert "Held: round 1 of run" in capsys.readouterr().out
        assert [clear(hospital), answer(ask, study, round=2)] == [0, "ok"]
    said = [event.text for event in heard if isinstance(event, progress.Note) and "unimiss-site clear" in event.text]
    assert len(said) == 2  # when it failed, and when another was held
    assert clear(hospital) == 2
    assert "nothing is held" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_of_rounds_at_work_together_only_the_first_failure_is_told(site: SiteConfig, fails: bool) -> None:
    """Of another that was at work meanwhile neither that it failed nor that it did not."""

    def work() -> None:
        with pytest.raises(WireError, match="undisclosed"), Hold(site).where_it_fails(FAILED):
            raise WireError("undisclosed", "x")
        if fails:
            raise WireError("undisclosed", "x")

    with pytest.raises(WireError, match="held"), Hold(site).where_it_fails(OTHER):
        work()
    Hold(site).check(FAILED)
    with pytest.raises(WireError, match="held"):
        Hold(site).check(OTHER)


def test_a_full_disk_holds_every_request(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(hold.json, "dumps", full)  # what cannot be written
    with pytest.raises(WireError, match="held"), Hold(site).where_it_fails(FAILED):
        raise WireError("undisclosed", "x")
    monkeypatch.undo()
    for asked in (FAILED, OTHER):
        with pytest.raises(WireError, match="held"):
            Hold(site).check(asked)
    Hold(site).clear()
    Hold(site).check(FAILED)


def test_whoever_listens_does_not_change_what_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise WireError("not_finite", "x")

    def breaks(event: progress.Event) -> None:
        if isinstance(event, progress.Note):
            raise RuntimeError("a screen that is gone")

    monkeypatch.setattr(private_round, "run_round", fails)
    with progress.listen(breaks), Hospital(tmp_path).asked() as ask:
        assert [answer(ask, private_study()), answer(ask, private_study(), round=2)] == ["undisclosed", "held"]


def test_an_unknown_patient_holds_nothing(tmp_path: Path) -> None:
    """It hangs on no plan, and is told to whoever asks."""
    hospital = Hospital(tmp_path, data=[{"folder": "scans"}])
    with hospital.asked() as ask:
        assert [answer(ask, private_study(), round=number) for number in (1, 2)] == ["undisclosed"] * 2
    assert clear(hospital) == 2


def test_scans_that_stand_under_several_patients_are_told_at_the_site(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path)
    for number in (0, 1):
        (tmp_path / "scans" / f"copy-{number}.png").write_bytes((tmp_path / "scans" / f"{number}.png").read_bytes())
    heard: list[progress.Event] = []
    with progress.listen(heard.append), hospital.asked() as ask:
        told = facts_of(ask(Hello(private_study(), RUN).pack(), "query"))
    assert [event.text for event in heard if isinstance(event, progress.Note) and "2 scans stand under" in event.text]
    assert told["scans_2d"] == 1
