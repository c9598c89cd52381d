"""Private rounds of the real site over the in-process grid: what leaves, what is charged, what is refused, and when."""

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import ConfigRecord, Message, RecordDict

from client import accounting, cache, ledger, private_round
from client import site as sites
from client.app import app
from client.health import read_noise_alone
from client.pictures import write_png
from client.site_command import main
from server.coordinator_config import CoordinatorConfig
from server.local_grid import LocalGrid
from server.rounds import Federation
from tests.federation import RUN, layout_for, metric_rows, random_tensors, small_study, whole_layout
from unimiss_core import progress
from unimiss_core.chain import BEGINNING, Head
from unimiss_core.errors import (
    ConfigError,
    DeviceError,
    MemoryTooSmallError,
    NonFiniteLossError,
    NoUsableScanError,
    RoundError,
    ScanError,
    WireError,
)
from unimiss_core.privacy import Mechanism, mechanisms
from unimiss_core.study import StudyConfig
from unimiss_core.wire import (
    Hello,
    Introduction,
    Refusal,
    TrainReply,
    TrainRequest,
    arrays_in,
    with_ledger,
)

IMAGES = layout_for(frozenset({2}))
SCANS = 5


def private_study(rounds: int = 2, *, max_epsilon: float = 50.0, **changes: object) -> StudyConfig:
    privacy = {
        "mode": "patient",
        "max_epsilon": max_epsilon,
        "delta": 1e-4,
        "noise_multiplier": 1.0,
        "centre_noise": 5.0,
        "sampling_rate": {"images": 0.5, "volumes": 0.5},
    }
    fits = {"batch": {"images": 40, "volumes": 40}, "objective": {"centre_momentum": 0.99}}
    return small_study(rounds, **{"privacy": privacy, **fits, **changes})


_epsilon = functools.cache(accounting.epsilon)


def remembered_epsilon(history: Sequence[Mechanism], delta: float) -> float:
    """The accountant takes a second for each history, and the tests ask for the same ones."""
    return _epsilon(tuple(history), delta)


@pytest.fixture(autouse=True)
def quick_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "epsilon", remembered_epsilon)


class Hospital:
    """A site with pictures of a few patients, asked over the grid as a coordinator asks."""

    def __init__(self, folder: Path, *, scans: int = SCANS, **settings: object) -> None:
        self.folder = folder
        (folder / "scans").mkdir(parents=True)
        for number in range(scans):
            pixels = np.random.default_rng(number).integers(0, 255, (41, 35)).astype(np.uint8)
            write_png(folder / "scans" / f"{number}.png", pixels)
        data = [{"folder": "scans", "file_is_patient": True}]
        raw: dict[str, Any] = {"name": "north", "data": data, "state": "state", "devices": "cpu"}
        limits = {"holds": ["images"], **settings.pop("privacy", {})}  # type: ignore[dict-item]
        (folder / "site.yaml").write_text(yaml.safe_dump({**raw, "privacy": limits, **settings}))

    @property
    def nodes(self) -> dict[str, dict[str, Any]]:
        return {"node": {"site": str(self.folder / "site.yaml")}}

    @contextmanager
    def asked(self) -> Iterator[Callable[[RecordDict, str], RecordDict]]:
        with LocalGrid(app, self.nodes, run_config={}) as grid:
            (node,) = grid.get_nodes()

            def ask(content: RecordDict, kind: str) -> RecordDict:
                sent = list(grid.push_messages([Message(content, node.node_id, kind)]))
                while not (replies := list(grid.pull_messages(sent))):
                    time.sleep(0.01)
                return replies[0].content

            yield ask

    @property
    def entries(self) -> list[dict[str, Any]]:
        path = self.folder / "state" / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def request(study: StudyConfig, round: int = 1, *, seed: int = 0, head: Head | None = None) -> RecordDict:
    """Whole student and teacher, so that the site rebuilds nothing."""
    tensors = {name: 0.02 * tensor for name, tensor in random_tensors(IMAGES, seed).items()}
    content = TrainRequest(study, RUN, round, tensors, None if round == 1 else tensors, {}).pack(IMAGES)
    return content if head is None else with_ledger(content, head)


def facts_of(content: RecordDict) -> dict[str, Any]:
    record = content["facts"]
    assert isinstance(record, ConfigRecord)
    return dict(record)


def bytes_of(content: RecordDict) -> dict[str, bytes]:
    return {f"{part}/{group}": a.data for part, r in arrays_in(content).items() for group, a in r.items()}


def test_what_leaves_a_private_site_is_the_update_and_what_everybody_knows(tmp_path: Path) -> None:
    """The whole message, key by key: a key that is added here needs a line in docs/privacy.md's table."""
    study = private_study()
    with Hospital(tmp_path).asked() as ask:
        told = facts_of(ask(Hello(study, RUN).pack(), "query"))
        reply = ask(request(study), "train")
    assert told.keys() == {"protocol", "site", "left_out", "scans_2d", "scans_3d", "ledger"}
    assert (told["scans_2d"], told["scans_3d"], told["left_out"]) == (1, 0, 0)
    facts = facts_of(reply)
    everybody_knows = {
        "protocol": told["protocol"],
        "status": "ok",
        "site": "north",
        "run": RUN,
        "round": 1,
        "study_digest": study.digest(),
        "steps": study.schedule.local_steps,
        "scans_2d": 1,
        "scans_3d": 0,
        "seconds": 0.0,
        "losses": "{}",
        "diagnostics": "{}",
    }
    head = facts.pop("ledger")
    assert facts == everybody_knows
    assert Head.of(head).seq == 2  # reserved and replied: a count of private rounds, not of patients
    assert arrays_in(reply).keys() == {"update"}


def test_two_attempts_at_a_round_share_neither_draw_nor_noise(tmp_path: Path) -> None:
    """The study's seed is public; what came of it twice could be subtracted."""
    study, updates = private_study(), []
    for name in ("a", "b"):
        with Hospital(tmp_path / name).asked() as ask:
            ask(Hello(study, RUN).pack(), "query")
            reply = ask(request(study), "train")
            updates.append(TrainReply.unpack(reply, IMAGES, study.wire.dtype).update)
    first, second = updates
    large = [name for name in first if first[name].numel() > 500]
    assert all((first[name] != second[name]).float().mean() > 0.5 for name in large)


def test_a_round_asked_for_again_gets_the_same_bytes_and_is_charged_once(tmp_path: Path) -> None:
    study, hospital = private_study(), Hospital(tmp_path)
    with hospital.asked() as ask:
        ask(Hello(study, RUN).pack(), "query")
        first, second = ask(request(study), "train"), ask(request(study), "train")
        assert bytes_of(first) == bytes_of(second) != {}
        assert facts_of(first) == facts_of(second)
        assert [entry["kind"] for entry in hospital.entries] == ["reserved", "replied"]
        other = ask(request(study, seed=1), "train")  # of the same round, from another student: a new release
        assert bytes_of(other) != bytes_of(first)
    assert [entry["kind"] for entry in hospital.entries] == ["reserved", "replied"] * 2


def test_what_would_overspend_is_refused_before_a_scan_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = private_study()
    cost = accounting.epsilon(mechanisms(study, {2}, [1]), 1e-4)
    hospital = Hospital(tmp_path, privacy={"max_epsilon": 1.2 * cost, "delta": 1e-4})
    heard: list[progress.Event] = []
    with progress.listen(heard.append), hospital.asked() as ask:
        ask(Hello(study, RUN).pack(), "query")
        assert facts_of(ask(request(study), "train"))["status"] == "ok"
        monkeypatch.setattr(sites, "open_private_library", lambda *_, **__: pytest.fail("read"))
        monkeypatch.setattr(private_round, "run_round", lambda *_: pytest.fail("trained"))
        assert Refusal.found_in(ask(request(study, 2), "train")) == Refusal("budget")
    assert len(hospital.entries) == 2
    before, told = [event.text for event in heard if isinstance(event, progress.Note)]
    assert "bear 1 of the 2 rounds of study" in before
    assert f"above {1.2 * cost:g} that this site allows over all studies" in told


def test_a_study_that_cannot_keep_its_promise_is_refused_before_the_first_round(tmp_path: Path) -> None:
    with Hospital(tmp_path).asked() as ask:
        answer = ask(Hello(private_study(200, max_epsilon=0.5), RUN).pack(), "query")
    assert Refusal.found_in(answer) == Refusal("promise")


def test_a_state_folder_that_was_put_back_is_noticed_by_what_the_coordinator_knows(tmp_path: Path) -> None:
    study, hospital = private_study(), Hospital(tmp_path)
    state, files = tmp_path / "state", ("ledger.jsonl", "ledger.head", "audit.jsonl", "audit.head")
    with hospital.asked() as ask:
        ask(Hello(study, RUN).pack(), "query")
        old = {name: (state / name).read_bytes() for name in files if (state / name).exists()}
        head = Head.of(facts_of(ask(request(study), "train"))["ledger"])
        for name in files:
            (state / name).unlink()
            if name in old:
                (state / name).write_bytes(old[name])
        told = Introduction.unpack(ask(Hello(study, RUN).pack(), "query"))
        assert told.ledger == BEGINNING
        assert Refusal.found_in(ask(request(study, 2, head=head), "train")) == Refusal("ledger")


def test_an_archive_that_is_gone_in_mid_run_is_told_at_the_site_alone(tmp_path: Path) -> None:
    study, hospital, state = private_study(3), Hospital(tmp_path), tmp_path / "state"
    events: list[progress.Event] = []
    with hospital.asked() as ask, progress.listen(events.append):
        ask(Hello(study, RUN).pack(), "query")
        there = facts_of(ask(request(study, 1), "train"))
        assert read_noise_alone(state) is None
        (tmp_path / "scans").rename(tmp_path / "unmounted")
        (tmp_path / "scans").mkdir()
        gone = facts_of(ask(request(study, 2), "train"))
        assert gone.keys() == there.keys()
        assert gone["status"] == "ok"
        told = [event.text for event in events if isinstance(event, progress.Note) and "noise alone" in event.text]
        assert told == [
            "north: no usable 2D scan for this study: its 2D steps are noise alone (privacy.holds), and charged"
        ]
        alone = read_noise_alone(state)
        assert alone is not None
        assert (alone.study, alone.ranks) == (study.name, (2,))
        (tmp_path / "scans").rmdir()
        (tmp_path / "unmounted").rename(tmp_path / "scans")
        ask(request(study, 3), "train")
        assert read_noise_alone(state) is None


@pytest.mark.parametrize("planted", ["sent first", "loss in clear"])
def test_planted_faults_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    """Of a site that sends before its ledger knows, and one that tells a loss."""
    study, hospital = private_study(), Hospital(tmp_path)
    if planted == "sent first":
        monkeypatch.setattr(ledger.Ledger, "record_reply", lambda *_: None)
    else:
        monkeypatch.setattr(private_round, "undisclosed", lambda reply, _: reply)
    with hospital.asked() as ask:
        ask(Hello(study, RUN).pack(), "query")
        facts = facts_of(ask(request(study), "train"))
    if planted == "sent first":
        assert [entry["kind"] for entry in hospital.entries] != ["reserved", "replied"]
    else:
        assert facts["losses"] != "{}"


def test_a_private_federation_runs_and_its_coordinator_learns_no_count_and_no_loss(tmp_path: Path) -> None:
    study, hospital = private_study(), Hospital(tmp_path / "north")
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path / "out", retry_s=0)
    with LocalGrid(app, hospital.nodes, run_config={}) as grid:
        state = Federation(grid, study, config).run()
    assert state.round == 2
    assert [entry["kind"] for entry in hospital.entries] == ["reserved", "replied"] * 2
    for row in metric_rows(tmp_path / "out"):
        line = row["sites"]["north"]
        assert line["status"] == "ok"
        assert (line["scans"], line["losses"], line["diagnostics"]) == ({"2d": 1, "3d": 0}, {}, {})
    assert state.attendance.ledgers["north"].seq == 4


def test_a_simulations_screen_which_is_its_coordinators_is_told_no_loss_and_no_count(tmp_path: Path) -> None:
    study, events = private_study(rounds=1), list[progress.Event]()
    with Hospital(tmp_path).asked() as ask, progress.listen(events.append):
        ask(Hello(study, RUN).pack(), "query")
        ask(request(study), "train")
    assert {event.is_secret for event in events if isinstance(event, progress.Preparing)} == {True}
    assert {event.loss for event in events if isinstance(event, progress.StepDone)} == {None}


def rounds_of(hospital: Hospital, study: StudyConfig, run: str, *, count: int = 2) -> list[str]:
    """What the site says to its introduction, and to each round."""
    said = []
    with hospital.asked() as ask:
        for content, kind in [
            (Hello(study, run).pack(), "query"),
            *((request(study, n + 1), "train") for n in range(count)),
        ]:
            told = facts_of(ask(content, kind))
            said.append(str(told.get("reason", told.get("status", "ok"))))
    return said


def test_a_ledger_that_was_put_back_is_noticed_by_the_sites_own_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a coordinator that knows nothing of it, and for another run."""
    hospital, state = Hospital(tmp_path), tmp_path / "state"
    assert rounds_of(hospital, private_study(), RUN, count=1) == ["ok", "ok"]
    older = {name: (state / name).read_bytes() for name in ("ledger.jsonl", "ledger.head")}
    assert rounds_of(hospital, private_study(), RUN) == ["ok"] * 3
    for name, content in older.items():
        (state / name).write_bytes(content)
    others = private_study(name="beta"), small_study(2, name="unprotected")
    for study in others:
        assert rounds_of(hospital, study, RUN, count=0) == ["ledger"]
    site = str(tmp_path / "site.yaml")
    assert main(["ledger", site]) == 6
    assert "this site's own audit log tells of entry 4 of this site's ledger" in capsys.readouterr().err
    assert main(["ledger", site, "--begin-anew"]) == 0
    assert "told of 4 entries, and the ledger goes on from the 2 that it holds" in capsys.readouterr().out
    assert rounds_of(hospital, private_study(name="beta"), RUN, count=0) == ["ok"]
    assert main(["ledger", site, "--begin-anew"]) == 0
    assert "nothing to begin anew" in capsys.readouterr().out


@pytest.mark.parametrize("grown", [False, True])
def test_a_coordinator_remembers_over_its_own_restart_where_a_ledger_stood(tmp_path: Path, grown: bool) -> None:
    """grown: the ledger that was put back has grown past the head that is known, by another run's rounds."""
    study, hospital = private_study(3), Hospital(tmp_path / "north")
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path / "out", retry_s=0, round_tries=1, wait_s=1)
    config = config.model_copy(update={"ledgers": tmp_path / "ledgers.json"})
    state = tmp_path / "north" / "state"

    def run(config: CoordinatorConfig, *, resume: bool) -> int:
        with LocalGrid(app, hospital.nodes, run_config={}) as grid:
            return Federation(grid, study, config).run(resume=resume).round

    class Killed(BaseException):
        pass

    def kill_after_the_first(event: progress.Event) -> None:
        if isinstance(event, progress.RoundDone) and event.round == 1:
            raise Killed

    with progress.listen(kill_after_the_first), pytest.raises(Killed):
        run(config, resume=False)
    kept = {name: (state / name).read_bytes() for name in ("ledger.jsonl", "ledger.head")}
    for name in ("ledger.jsonl", "ledger.head", "audit.jsonl", "audit.head"):  # as a state folder that was lost
        (state / name).unlink()
    if grown:
        with hospital.asked() as ask:
            ask(Hello(study, RUN).pack(), "query")
            for round in (1, 2):
                assert facts_of(ask(request(study, round), "train"))["status"] == "ok"
        assert len(hospital.entries) > len(kept["ledger.jsonl"].splitlines())
    with pytest.raises(RoundError, match="ledger"):
        run(config, resume=True)
    anew = config.model_copy(update={"out": tmp_path / "another-run"})
    with pytest.raises(RoundError, match="ledger"):
        run(anew, resume=False)
    assert run(anew.model_copy(update={"ledgers": None}), resume=True) == 3  # nothing else would tell
    assert run(config.model_copy(update={"forget_ledgers": ("north",)}), resume=True) == 3


def test_where_nobody_is_drawn_noise_is_sent(tmp_path: Path) -> None:
    """Whether anybody took part must not show."""
    privacy = private_study().privacy.model_dump() | {"sampling_rate": {"images": 1e-6, "volumes": 1e-6}}
    study = private_study(privacy=privacy)
    with Hospital(tmp_path).asked() as ask:
        ask(Hello(study, RUN).pack(), "query")
        reply = TrainReply.unpack(ask(request(study), "train"), IMAGES, study.wire.dtype)
    assert all(bool(tensor.float().abs().sum() > 0) for tensor in reply.update.values())


def test_a_round_that_crashed_goes_on_under_its_charge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, hospital = private_study(), Hospital(tmp_path)

    def killed(*_: object) -> None:
        raise RuntimeError("the process died")

    with hospital.asked() as ask:
        ask(Hello(study, RUN).pack(), "query")
        with monkeypatch.context() as patched:
            patched.setattr(private_round, "run_round", killed)
            assert Refusal.found_in(ask(request(study), "train")) == Refusal("undisclosed")
        assert main(["clear", str(tmp_path / "site.yaml")]) == 0
        with monkeypatch.context() as patched:  # trained, but the reply was not noted: it may not leave
            patched.setattr(ledger.Ledger, "record_reply", killed)
            assert Refusal.found_in(ask(request(study), "train")) == Refusal("undisclosed")
        assert Refusal.found_in(ask(request(study), "train")) == Refusal("held")
        assert main(["clear", str(tmp_path / "site.yaml")]) == 0
        assert facts_of(ask(request(study), "train"))["status"] == "ok"
    assert [entry["kind"] for entry in hospital.entries] == ["reserved", "replied"]


def test_several_devices_take_a_private_round_together(tmp_path: Path) -> None:
    study, hospital = private_study(), Hospital(tmp_path, devices=["cpu", "cpu"], threads=1)
    with hospital.asked() as ask:
        ask(Hello(study, RUN).pack(), "query")
        reply = ask(request(study), "train")
    assert facts_of(reply)["status"] == "ok"
    assert [entry["kind"] for entry in hospital.entries] == ["reserved", "replied"]


# --- of scans, nothing is told


def test_an_introduction_is_the_same_whatever_becomes_of_the_scans(tmp_path: Path) -> None:
    """It costs nothing and may be asked for with any plan: usable scans, none, or none that this plan has room for."""
    study, told, steps = private_study(), [], []
    for name, settings in {"whole": {}, "blank": {}, "no-room": {"cache_limit_gb": 1e-9}}.items():
        hospital = Hospital(tmp_path / name, **settings)
        if name == "blank":
            for path in (hospital.folder / "scans").iterdir():
                write_png(path, np.zeros((41, 35), np.uint8))
        with hospital.asked() as ask:
            told.append(facts_of(ask(Hello(study, RUN).pack(), "query")))
            steps.append(ask(request(study), "train"))
    assert told[0] == told[1] == told[2]
    assert (told[0]["scans_2d"], told[0]["scans_3d"]) == (1, 0)
    assert [Refusal.found_in(step) for step in steps] == [None, None, Refusal("undisclosed")]
    whole, blank = (facts_of(step) for step in steps[:2])
    assert whole.keys() == blank.keys()
    assert all(whole[key] == blank[key] for key in whole.keys() - {"ledger"})


def test_what_a_site_declares_it_trains_with_or_without_such_scans(tmp_path: Path) -> None:
    """Pictures alone, and declared are both: steps of volumes are noise, and the volumes' tensors are sent."""
    study = private_study(schedule={"rounds": 1, "local_steps": 3, "alternate": [1, 2]})
    tensors = {name: 0.02 * tensor for name, tensor in random_tensors(whole_layout(), 0).items()}
    with Hospital(tmp_path, privacy={"holds": ["images", "volumes"]}).asked() as ask:
        told = Introduction.unpack(ask(Hello(study, RUN).pack(), "query"))
        asked = TrainRequest(study, RUN, 1, tensors, None, {}).pack(whole_layout())
        reply = TrainReply.unpack(ask(asked, "train"), whole_layout(), study.wire.dtype)
    assert told.scans == reply.scans == {2: 1, 3: 1}
    assert all(bool(tensor.float().abs().sum() > 0) for tensor in reply.update.values())


@pytest.mark.parametrize(
    "error",
    [
        NoUsableScanError("x"),
        ScanError("blank"),
        NonFiniteLossError("x"),
        DeviceError("x"),
        MemoryTooSmallError("x"),
        ConfigError("x"),
        WireError("not_finite", "x"),
        ValueError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_goes_wrong_with_scans_looks_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(private_round, "run_round", fails)
    monkeypatch.setattr(sites, "open_private_library", fails)
    with Hospital(tmp_path).asked() as ask:
        assert Introduction.unpack(ask(Hello(private_study(), RUN).pack(), "query")).scans == {2: 1, 3: 0}
        assert Refusal.found_in(ask(request(private_study()), "train")) == Refusal("undisclosed")


def test_files_whose_patient_would_be_a_guess_are_refused_in_words_for_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the plan: before anything is prepared by it."""
    sources = [{"folder": "scans", "patient_pattern": "(?P<patient>[0-9]+)"}, {"folder": "scans"}]
    monkeypatch.setattr(cache, "build", lambda *_: pytest.fail("prepared"))
    heard: list[progress.Event] = []
    with progress.listen(heard.append), Hospital(tmp_path, data=sources, cache_limit_gb=1e-9).asked() as ask:
        assert Refusal.found_in(ask(Hello(private_study(), RUN).pack(), "query")) == Refusal("undisclosed")
        assert Refusal.found_in(ask(request(private_study()), "train")) == Refusal("undisclosed")
    said = [event.text for event in heard if isinstance(event, progress.Note) and "whose these files are" in event.text]
    assert len(said) == 2
    assert f"{SCANS} of 'data.1' (" in said[0]
    assert "data.0" not in said[0]
    assert "file_is_patient: true" in said[0]


def test_an_introduction_with_another_plan_drops_no_scan_of_a_round(tmp_path: Path) -> None:
    """It costs nothing, so it must not end what somebody else has paid for."""
    hospital = Hospital(tmp_path, cache_limit_gb=2e-5)  # room for the scans of one plan
    other = private_study(plan={"percentiles": [1.0, 99.0]})
    with hospital.asked() as ask:
        ask(Hello(private_study(), RUN).pack(), "query")
        prepared = set((tmp_path / "state" / "cache").glob("*.npy"))
        assert Introduction.unpack(ask(Hello(other, "1" * 16).pack(), "query")).ranks == {2}
        assert len(prepared) == SCANS
        assert set((tmp_path / "state" / "cache").glob("*.npy")) == prepared
        assert facts_of(ask(request(other), "train"))["status"] == "ok"  # a round is charged, and may


@pytest.mark.parametrize(("delta", "is_weak"), [(1e-5, False), (9e-4, True)])
def test_a_delta_that_is_weak_for_so_many_patients_is_told_at_the_site_alone(
    tmp_path: Path, delta: float, is_weak: bool
) -> None:
    """A tenth of one over the patients is the most."""
    heard: list[progress.Event] = []
    study = private_study(1, privacy={**private_study(1).privacy.model_dump(), "delta": delta})
    with progress.listen(heard.append), Hospital(tmp_path, scans=120).asked() as ask:
        told = facts_of(ask(Hello(study, RUN).pack(), "query"))
    said = [event.text for event in heard if isinstance(event, progress.Note) and "weak for 120 patients" in event.text]
    assert len(said) == int(is_weak)
    assert "120" not in json.dumps(told)
