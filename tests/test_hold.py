"""A private round that failed is told once; then a person has to let the site go on."""

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import pytest
from flwr.app import RecordDict

from client import accounting, hold, private_round
from client.audit import log_of
from client.hold import Hold
from client.home import Home
from client.ledger_entries import Request
from client.site import Site
from client.site_command import main
from client.site_config import SiteConfig, load_site
from tests.federation import RUN
from tests.test_private_rounds import IMAGES, Hospital, facts_of, private_study, remembered_epsilon, request
from unimiss_core import durable, progress
from unimiss_core.errors import ConfigError, WireError
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Hello, Refusal, TrainRequest

Ask = Callable[[RecordDict, str], RecordDict]

FAILED, OTHER = Request(RUN, 3, "a" * 64, "b" * 64), Request(RUN, 4, "a" * 64, "c" * 64)


def of_room(longest_side: int) -> StudyConfig:
    """A study by whose plan the scans take this much room; its name, under which it is charged, says so."""
    return private_study(name=f"side-{longest_side}", plan={"image_longest_side": longest_side})


def answer(ask: Ask, study: StudyConfig, round: int = 1) -> str:
    """The reason, or `ok`."""
    refusal = Refusal.found_in(ask(request(study, round), "train"))
    return "ok" if refusal is None else refusal.reason


def fails(*_: object) -> NoReturn:
    raise ValueError("x")


def fail(site: SiteConfig, asked: Request) -> None:
    with Hold(site).at_work(asked):
        raise WireError("undisclosed", "x")


def die_in_a_round(site: SiteConfig, asked: Request) -> None:
    """A process of its own, killed as the system kills what takes too much memory."""
    program = f"""
import os, signal
from pathlib import Path
from types import SimpleNamespace
from client.hold import Hold, Request
with Hold(SimpleNamespace(name="x", state=Path({str(site.state)!r}))).at_work(Request(*{tuple(asked)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL


def marks(hospital: Hospital) -> list[Path]:
    return list((hospital.folder / "state" / "unanswered").iterdir())


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
        assert [answer(ask, study) for study in (fits, larger, too_large)] == ["held"] * 3
        assert answer(ask, too_large, round=2) == "held"
        assert hospital.entries == charged
        assert facts_of(ask(Hello(too_large, RUN).pack(), "query")).keys() == introduced.keys()
        assert clear(hospital) == 0
        assert [answer(ask, study) for study in (fits, larger, fits, too_large)] == [
            "ok",
            "undisclosed",
            "ok",
            "held",
        ]


def test_the_request_that_failed_is_not_looked_at_again_before_a_person_has_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a coordinator would change something else in between, and ask it for ever under one charge."""
    study, hospital, heard = private_study(), Hospital(tmp_path), list[progress.Event]()
    with progress.listen(heard.append), hospital.asked() as ask:
        with monkeypatch.context() as patched:
            patched.setattr(private_round, "run_round", fails)
            assert answer(ask, study) == "undisclosed"
        with monkeypatch.context() as patched:
            patched.setattr(private_round, "run_round", lambda *_: pytest.fail("read"))
            assert answer(ask, study) == "held"
        assert main(["ledger", str(tmp_path / "site.yaml")]) == 0
        assert "Held: round 1 of run" in capsys.readouterr().out
        assert [clear(hospital), answer(ask, study), answer(ask, study, round=2)] == [0, "ok", "ok"]
    assert [entry["kind"] for entry in hospital.entries] == ["reserved", "replied"] * 2
    said = [event.text for event in heard if isinstance(event, progress.Note) and "unimiss-site clear" in event.text]
    assert len(said) == 2  # when it failed, and when it was held
    assert clear(hospital) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("north: nothing is held")
    key = Home(hospital.folder).private_key
    key.parent.mkdir(exist_ok=True)
    key.touch()
    assert main(["clear", "--home", str(hospital.folder)]) == 0


def test_a_reply_that_was_recorded_is_sent_again_while_the_site_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hospital(tmp_path).asked() as ask:
        assert answer(ask, private_study()) == "ok"
        monkeypatch.setattr(private_round, "run_round", fails)
        assert [answer(ask, private_study(), round=number) for number in (2, 1, 2)] == ["undisclosed", "ok", "held"]


@pytest.mark.parametrize("fails", [False, True])
def test_of_rounds_at_work_together_only_the_first_failure_is_told(site: SiteConfig, fails: bool) -> None:
    """Of another that was at work meanwhile neither that it failed nor that it did not."""

    def work() -> None:
        with pytest.raises(WireError, match="undisclosed"):
            fail(site, FAILED)
        if fails:
            raise WireError("undisclosed", "x")
        Hold(site).check()

    with pytest.raises(WireError, match="held"), Hold(site).at_work(OTHER):
        work()
    with pytest.raises(WireError, match="held"):
        Hold(site).check()
    Hold(site).clear()
    Hold(site).check()


def test_a_round_that_succeeds_after_another_failed_keeps_its_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a person has looked: that it did not fail is a fact, too."""
    hospital, run_round = Hospital(tmp_path), private_round.run_round
    site = load_site(hospital.folder / "site.yaml")

    def another_fails(*asked: Any) -> Any:
        with pytest.raises(WireError, match="undisclosed"):
            fail(site, OTHER)
        return run_round(*asked)

    with hospital.asked() as ask:
        with monkeypatch.context() as patched:
            patched.setattr(private_round, "run_round", another_fails)
            assert answer(ask, private_study()) == "held"
        assert answer(ask, private_study()) == "held"
        assert [entry["kind"] for entry in hospital.entries] == ["reserved"]
        assert [clear(hospital), answer(ask, private_study())] == [0, "ok"]
    assert [entry["kind"] for entry in hospital.entries] == ["reserved", "replied"]


# --- a process that dies


def test_the_second_death_holds_the_site_until_a_person_has_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine is started anew once in a while; whoever kills the site by what it asks for learns no more."""
    hospital = Hospital(tmp_path)
    site = load_site(hospital.folder / "site.yaml")
    with hospital.asked() as ask:
        die_in_a_round(site, OTHER)
        assert answer(ask, of_room(20)) == "ok"  # one alone costs nothing
        die_in_a_round(site, FAILED)
        charged = hospital.entries
        assert [answer(ask, of_room(32)), answer(ask, of_room(20))] == ["held", "ok"]  # what was answered is sent again
        assert hospital.entries == charged
        assert main(["ledger", str(tmp_path / "site.yaml")]) == 0
        assert f"round {FAILED.round} of run '{RUN}' died" in capsys.readouterr().out
        assert [clear(hospital), answer(ask, of_room(32))] == [0, "ok"]


def test_a_first_death_is_told_at_the_site_and_may_be_cleared(tmp_path: Path) -> None:
    hospital, heard = Hospital(tmp_path), list[progress.Event]()
    die_in_a_round(load_site(hospital.folder / "site.yaml"), OTHER)
    with progress.listen(heard.append), hospital.asked() as ask:
        assert answer(ask, private_study()) == "ok"
    assert any(isinstance(event, progress.Note) and "the next one that dies holds" in event.text for event in heard)
    assert [Hold(load_site(hospital.folder / "site.yaml")).clear() for _ in range(2)] == [True, False]


@pytest.mark.parametrize("dies", [False, True])
def test_a_round_leaves_its_mark_before_it_reads_a_scan_and_takes_it_away_with_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    hospital, run_round, found = Hospital(tmp_path), private_round.run_round, list[str]()

    class Killed(BaseException):
        """The nearest that a thread comes to a process that is gone: nobody catches it."""

    def looks(*asked: Any) -> Any:
        found.extend(mark.read_text() for mark in marks(hospital))
        if dies:
            raise Killed
        return run_round(*asked)

    monkeypatch.setattr(private_round, "run_round", looks)
    site = Site(load_site(hospital.folder / "site.yaml"), private_study(), RUN)
    asked = TrainRequest.unpack(request(private_study()), IMAGES)
    with pytest.raises(Killed) if dies else nullcontext():
        private_round.private_round(site, asked, IMAGES)
    assert [json.loads(each)["round"] for each in found] == [1]
    assert len(marks(hospital)) == dies
    Hold(site.config).check()
    if dies:
        monkeypatch.setattr(private_round, "run_round", run_round)
        private_round.private_round(site, asked, IMAGES)
    assert [entry["kind"] for entry in hospital.entries] == ["reserved", "replied"]  # under its charge
    assert len(marks(hospital)) == dies  # it is counted until a person has looked


def test_an_introduction_that_dies_counts_too_and_a_held_site_reads_nothing_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs nothing, and reads the scans by whatever plan it is asked with."""
    hospital, read = Hospital(tmp_path), list[int]()
    site = load_site(hospital.folder / "site.yaml")
    die_in_a_round(site, OTHER)
    monkeypatch.setattr(private_round, "tell_of_scans", lambda *_: read.append(len(marks(hospital))))
    with hospital.asked() as ask:
        hello = Hello(private_study(), RUN).pack()
        first = facts_of(ask(hello, "query"))
        assert (read, len(marks(hospital))) == ([2], 1)
        die_in_a_round(site, OTHER._replace(round=0))
        assert facts_of(ask(hello, "query")) == first
        assert len(read) == 1
    assert f"the introduction of run '{RUN}' died" in (Hold(site).in_words() or "")


def test_a_round_at_work_is_no_death(site: SiteConfig) -> None:
    with Hold(site).at_work(FAILED), Hold(site).at_work(OTHER):
        Hold(site).check()
        assert not Hold(site).clear()
    Hold(site).check()


# --- what a person reads


def test_what_a_person_reads_says_what_happened_what_it_means_and_the_way_on(
    site: SiteConfig,
) -> None:
    with pytest.raises(WireError, match="undisclosed"):
        fail(site, FAILED)
    happened, means, look, way_on = (Hold(site).in_words() or "").splitlines()
    assert happened == f"round 3 of run '{RUN}' failed."
    assert "begins no private round" in means
    assert "this site's log" in look
    assert "the system's log" not in look  # nothing died
    assert "`unimiss-site clear SITE.yaml`" in way_on
    for _ in range(2):
        die_in_a_round(site, OTHER)
    happened, _, look, _ = (Hold(site).in_words() or "").splitlines()
    assert happened.count(f"round 4 of run '{RUN}' died with its process") == 2
    assert "the system's log" in look


# --- one at a time


HOLDS_THE_SITE = """
import sys
from pathlib import Path
from client.ledger import Ledger
from client.site_config import PatientLimits
with Ledger(Path(sys.argv[1]), PatientLimits(), lambda *_: 0.0).alone("f" * 16):
    print("at work", flush=True)
    sys.stdin.read()
"""


def test_while_another_process_is_at_work_on_any_run_nothing_is_charged_or_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two daemons, or two coordinators, on one state folder: each round could fail of what the other takes."""
    hospital, read = Hospital(tmp_path), list[str]()
    monkeypatch.setattr(private_round, "tell_of_scans", lambda *_: read.append("scans"))
    command = [sys.executable, "-c", HOLDS_THE_SITE, str(tmp_path / "state")]
    with hospital.asked() as ask:
        alone = facts_of(ask(Hello(private_study(), RUN).pack(), "query"))
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "at work\n"
            assert answer(ask, private_study()) == "busy"
            assert (hospital.entries, marks(hospital)) == ([], [])
            assert facts_of(ask(Hello(private_study(), RUN).pack(), "query")) == alone
            assert read == ["scans"]  # by the first introduction
            other.communicate("")
        assert answer(ask, private_study()) == "ok"


# --- where nothing can be written


@pytest.mark.parametrize("renames", [False, True])
def test_without_a_free_descriptor_a_failure_holds_all_the_same(
    site: SiteConfig, monkeypatch: pytest.MonkeyPatch, renames: bool
) -> None:
    """renames: as the system does. Where even that is refused, what is left counts as a death."""

    def none_free(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EMFILE, "too many open files")

    def fail_without() -> None:
        with monkeypatch.context() as patched, Hold(site).at_work(FAILED):
            for name in ("open", "iterdir") if renames else ("open", "iterdir", "rename"):
                patched.setattr(Path, name, none_free)
            patched.setattr(hold.os, "open", none_free)
            assert "cannot be told" in (Hold(site).in_words() or "")
            raise WireError("undisclosed", "x")

    for _ in range(1 if renames else 2):
        with pytest.raises(WireError, match="held"):
            fail_without()
    with pytest.raises(WireError, match="held"):
        Hold(site).check()
    Hold(site).clear()
    Hold(site).check()


def test_on_a_full_disk_no_round_begins(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(hold.os, "fsync", full)
    with pytest.raises(ConfigError, match="no space left"), Hold(site).at_work(FAILED):
        pytest.fail("began")
    monkeypatch.undo()
    assert not Hold(site).clear()


def test_clearing_is_written_down_before_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what could not be written down nothing is done; of what could not be done the log tells all the same."""
    site_file = tmp_path / "site.yaml"
    (tmp_path / "scans").mkdir()
    site_file.write_text("name: a\ndata: [{folder: scans}]\nstate: state\n")
    site = load_site(site_file)
    with pytest.raises(WireError, match="undisclosed"):
        fail(site, FAILED)

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "no space left")

    for at, name, code, logged in ((durable, "append", 8, []), (Path, "unlink", 2, ["clear"])):
        with monkeypatch.context() as patched:
            patched.setattr(at, name, full)
            assert main(["clear", str(site_file)]) == code
        assert Hold(site).in_words() is not None
        assert [entry.kind for entry in log_of(site_file).read().entries] == logged
    assert main(["clear", str(site_file)]) == 0
    assert Hold(site).in_words() is None


def test_a_damaged_mark_holds(site: SiteConfig) -> None:
    with pytest.raises(WireError, match="undisclosed"):
        fail(site, FAILED)
    (mark,) = (site.state / "unanswered").iterdir()
    for damaged in (b"\xff", b"[]", b"[" * 50_000):
        mark.write_bytes(damaged)
        assert (Hold(site).in_words() or "").startswith("a private round failed")


# --- what holds nothing


def test_whoever_listens_does_not_change_what_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert not Hold(load_site(hospital.folder / "site.yaml")).clear()


def test_scans_that_stand_under_several_patients_are_told_at_the_site(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path)
    for number in (0, 1):
        (tmp_path / "scans" / f"copy-{number}.png").write_bytes((tmp_path / "scans" / f"{number}.png").read_bytes())
    heard: list[progress.Event] = []
    with progress.listen(heard.append), hospital.asked() as ask:
        told = facts_of(ask(Hello(private_study(), RUN).pack(), "query"))
    assert [event.text for event in heard if isinstance(event, progress.Note) and "2 scans stand under" in event.text]
    assert told["scans_2d"] == 1
