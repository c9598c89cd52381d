"""Both ends' audit logs: what is in them, that it is there before anything leaves, that no change goes unnoticed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from client import app as site_app
from client import message_facts
from client.audit import KINDS as SITE_KINDS
from client.audit import site_log
from client.site_command import main as site_command
from server.audit import KINDS as COORDINATOR_KINDS
from server.audit import coordinator_log
from server.coordinator_config import CoordinatorConfig
from server.local_grid import LocalGrid
from server.rounds import Federation
from tests.federation import RUN, StubSite, small_study, stub_app
from tests.test_private_rounds import Hospital, private_study, quick_accountant, request  # noqa: F401
from unimiss_core import durable
from unimiss_core.audit_log import AuditLog, Entry
from unimiss_core.errors import AuditError
from unimiss_core.wire import Hello, Refusal, arrays_in, content_digest, num_bytes

STUDY = small_study()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def kinds(folder: Path) -> list[str]:
    return [line["kind"] for line in lines(folder)]


# -- what stands in a site's ------------------------------------------------------------------------------------------


def test_what_left_is_written_down_as_it_left(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path)
    with hospital.asked() as ask:
        told = ask(Hello(STUDY, RUN).pack(), "query")
        reply = ask(sent := request(STUDY), "train")
    asked, introduction, asked_to_train, answer = lines(tmp_path / "state")
    study = {"run": RUN, "study": STUDY.digest(), "study_name": "toy"}
    assert asked.items() >= {"kind": "request", "asked": "introduction", **study}.items()
    assert introduction.items() >= {"kind": "introduction", "scans_2d": 5, "scans_3d": 0, **study}.items()
    assert introduction["sha256"] == content_digest(told)
    assert asked_to_train.items() >= {"asked": "round", "round": 1, "bytes": num_bytes(sent), **study}.items()
    sizes = {group: len(array.data) for group, array in arrays_in(reply)["update"].items()}
    assert answer.items() >= {"kind": "reply", "round": 1, "groups": sizes, "bytes": sum(sizes.values())}.items()
    assert answer["sha256"] == content_digest(reply) != content_digest(sent)
    assert "epsilon" in answer
    assert answer["epsilon"] is None
    assert answer["figures"] > 0


def test_a_private_reply_is_written_down_with_what_patients_have_cost(tmp_path: Path) -> None:
    study, hospital = private_study(), Hospital(tmp_path)
    with hospital.asked() as ask:
        ask(Hello(study, RUN).pack(), "query")
        first, again = ask(request(study), "train"), ask(request(study), "train")
    replies = [line for line in lines(tmp_path / "state") if line["kind"] == "reply"]
    assert len(replies) == 2
    assert replies[0]["epsilon"] == replies[1]["epsilon"] > 0  # sent again: the same bytes, charged once
    assert replies[0]["sha256"] == replies[1]["sha256"] == content_digest(first) == content_digest(again)
    assert replies[0]["figures"] == 0
    assert replies[0]["ledger"].startswith("2:")


def test_no_patient_no_path_and_no_word_of_a_peer_is_in_it(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "DOE^JANE")
    with hospital.asked() as ask:
        ask(Hello(STUDY, RUN).pack(), "query")
        odd = RecordDict({"facts": ConfigRecord({"protocol": 4, "study": "SMITH^JOHN", "round": 7})})
        assert Refusal.found_in(ask(odd, "train")) == Refusal("study")
    text = (hospital.folder / "state" / "audit.jsonl").read_text()
    assert "DOE" not in text
    assert "SMITH" not in text
    assert "0.png" not in text


@pytest.mark.parametrize(
    "odd", [{"batch": {"images": 10**400}}, {"objective": {"teacher_temperature": 5e-324}}], ids=["huge", "tiny"]
)
@pytest.mark.parametrize("kind", ["query", "train"])
def test_a_study_with_which_arithmetic_fails_is_refused_and_written_down(
    tmp_path: Path, odd: dict[str, Any], kind: str
) -> None:
    privacy = {"mode": "patient", "max_epsilon": 8.0, "noise_multiplier": 1.0}
    facts = {"protocol": 4, "study": json.dumps({"name": "a", "privacy": privacy, **odd}), "run": RUN}
    with Hospital(tmp_path).asked() as ask:
        assert Refusal.found_in(ask(RecordDict({"facts": ConfigRecord(facts)}), kind)) == Refusal("study")
    assert kinds(tmp_path / "state") == ["request", "refusal"]


def test_a_message_at_which_reading_fails_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever nobody thought of: the log begins with it."""

    def failing(_: object) -> None:
        raise ArithmeticError

    monkeypatch.setattr(message_facts, "study_of", failing)
    with Hospital(tmp_path).asked() as ask:
        ask(Hello(STUDY, RUN).pack(), "query")
    assert kinds(tmp_path / "state")[0] == "request"


@pytest.mark.parametrize("kind", ["evaluate", "query.raw_scans", "train.export", "query.default"])
def test_what_no_site_answers_is_refused_with_a_code_and_written_down(tmp_path: Path, kind: str) -> None:
    """There is no message that asks for scans; Flower would answer an unknown one with an exception's text."""
    with Hospital(tmp_path).asked() as ask:
        assert Refusal.found_in(ask(Hello(STUDY, RUN).pack(), kind)) == Refusal("unknown_request")
    asked, refused = lines(tmp_path / "state")
    assert asked["asked"] == "unknown"
    assert refused.items() >= {"kind": "refusal", "reason": "unknown_request"}.items()


def test_a_site_whose_file_is_wrong_writes_down_that_it_refused(tmp_path: Path) -> None:
    with Hospital(tmp_path, devices="abacus").asked() as ask:
        assert Refusal.found_in(ask(Hello(STUDY, RUN).pack(), "query")) == Refusal("site_setup")
    assert [line.get("reason") for line in lines(tmp_path / "state")] == [None, "site_setup"]


# -- before it leaves -------------------------------------------------------------------------------------------------


def full_after(lines_left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes so many more lines of a log."""
    really, left = durable.append, [lines_left]

    def append(file: Any, payload: bytes) -> None:
        if Path(file.name).name == "audit.jsonl":
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/archive/DOE^JANE")
            left[0] -= 1
        really(file, payload)

    monkeypatch.setattr(durable, "append", append)


def test_a_request_that_cannot_be_written_down_is_not_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_after(0, monkeypatch)
    monkeypatch.setattr(site_app, "open_site", lambda *_: pytest.fail("looked into"))
    with Hospital(tmp_path).asked() as ask:
        assert Refusal.found_in(ask(Hello(STUDY, RUN).pack(), "query")) == Refusal("audit")


@pytest.mark.parametrize("study", [STUDY, private_study()], ids=["plain", "private"])
def test_a_reply_that_cannot_be_written_down_does_not_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: Any
) -> None:
    with Hospital(tmp_path).asked() as ask:
        with monkeypatch.context() as patched:
            full_after(1, patched)
            refused = ask(request(study), "train")
        assert Refusal.found_in(refused) == Refusal("audit")
        assert arrays_in(refused) == {}
        assert kinds(tmp_path / "state") == ["request"]
        reply = ask(request(study), "train")  # room was made
    assert arrays_in(reply).keys() == {"update"}
    assert kinds(tmp_path / "state") == ["request", "request", "reply"]


def test_nothing_leaves_a_site_whose_log_is_damaged(tmp_path: Path) -> None:
    with Hospital(tmp_path).asked() as ask:
        ask(Hello(STUDY, RUN).pack(), "query")
        (tmp_path / "state" / "audit.head").unlink()
        assert Refusal.found_in(ask(request(STUDY), "train")) == Refusal("audit")


# -- the coordinator's ------------------------------------------------------------------------------------------------


def federation(out: Path, sites: list[StubSite], **changes: Any) -> Callable[..., Any]:
    def run(*, resume: bool = False) -> None:
        nodes: dict[str, Any] = {site.name: {"name": site.name} for site in sites}
        config = CoordinatorConfig(study=Path("unused"), out=out, retry_s=0, **changes)
        with LocalGrid(stub_app({site.name: site for site in sites}), nodes, run_config={}) as grid:
            Federation(grid, STUDY, config).run(resume=resume)

    return run


def test_a_run_writes_down_requests_replies_and_releases(tmp_path: Path) -> None:
    good, bad = StubSite("good", {2: 3}), StubSite("bad", {2: 3})
    bad.tamper = lambda content, _: RecordDict({"facts": content["facts"]})
    federation(tmp_path / "out", [good, bad])()
    found = lines(tmp_path / "out")
    for number in (1, 2):
        of_round = [line for line in found if line["round"] == number]
        assert [line["kind"] for line in of_round[:2]] == ["asked", "asked"]
        assert sorted((line["kind"], line["site"], line["reason"]) for line in of_round[2:4]) == [
            ("counted", "good", None),
            ("refused", "bad", "malformed"),
        ]
        release = of_round[4]
        manifest = tmp_path / "out" / "checkpoints" / f"round-{number:04d}" / "manifest.json"
        assert (release["kind"], release["study"]) == ("release", STUDY.digest())
        if manifest.exists():  # older ones are pruned
            assert release["manifest"] == hashlib.sha256(manifest.read_bytes()).hexdigest()


def test_a_refused_introduction_is_written_down_once(tmp_path: Path) -> None:
    """As of round 0. It is asked for in every round; the second says nothing new."""
    federation(tmp_path / "out", [StubSite("good", {2: 3}), StubSite("empty", {})])()
    (refused,) = (line for line in lines(tmp_path / "out") if line["kind"] == "refused")
    assert refused.items() >= {"site": "empty", "round": 0, "bytes": 0, "reason": "no_usable_scans"}.items()
    assert len(refused["sha256"]) == 64


def test_both_ends_know_an_update_by_the_same_digest(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "north")
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path / "out", retry_s=0)
    with LocalGrid(site_app.app, hospital.nodes, run_config={}) as grid:
        Federation(grid, STUDY, config).run()
    left = [line["sha256"] for line in lines(hospital.folder / "state") if line["kind"] == "reply"]
    came = [line["sha256"] for line in lines(tmp_path / "out") if line["kind"] == "counted"]
    assert left == came
    assert len(set(left)) == 2


def test_a_release_that_a_killed_coordinator_did_not_write_down_is_when_it_goes_on(tmp_path: Path) -> None:
    out, sites = tmp_path / "out", [StubSite("north", {2: 3})]
    federation(out, sites)()
    whole = lines(out)
    without = (out / "audit.jsonl").read_text().splitlines(keepends=True)[:-1]
    (out / "audit.jsonl").write_text("".join(without))
    digest = hashlib.sha256(without[-1].rstrip("\n").encode()).hexdigest()
    (out / "audit.head").write_text(json.dumps({"seq": len(without), "sha256": digest}) + "\n")
    federation(out, sites)(resume=True)
    federation(out, sites)(resume=True)
    told = [{key: value for key, value in line.items() if key != "time"} for line in lines(out)]
    assert told == [{key: value for key, value in line.items() if key != "time"} for line in whole]


def test_a_run_that_cannot_write_down_releases_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = federation(out := tmp_path / "out", [StubSite("north", {2: 3})])
    with monkeypatch.context() as patched:
        full_after(1, patched)
        with pytest.raises(AuditError, match="not written down") as caught:
            goes_on()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["round-0000"]
    assert (caught.value.exit_code, caught.value.resumes) == (8, True)  # `unimiss-server run` tries again by itself
    goes_on(resume=True)
    assert (out / "checkpoints" / "round-0001").is_dir()


# -- no change goes unnoticed ------------------------------------------------------------------------------------------


def a_site_log(folder: Path) -> AuditLog[Entry]:
    log = site_log(folder)
    log.record("init", site="north")
    for number in range(1, 6):
        log.record("refusal", run=RUN, round=number, reason="policy")
    log.record("clear")
    return log


def a_coordinator_log(folder: Path) -> AuditLog[Entry]:
    log = coordinator_log(folder / "audit.jsonl")
    log.record("init", address="host.example:9443")
    for number in range(1, 6):
        log.record("asked", run=RUN, round=number, site="north", bytes=10)
    log.record("revoke", site="north")
    return log


BOTH = pytest.mark.parametrize("make", [a_site_log, a_coordinator_log])


def raw(folder: Path) -> list[bytes]:
    return (folder / "audit.jsonl").read_bytes().splitlines(keepends=True)


EDITS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a value": lambda found: [*found[:3], found[3].replace(b'"round":3', b'"round":4'), *found[4:]],
    "the last line": lambda found: [*found[:-1], found[-1].replace(b"Z", b"Y", 1)],
    "a line cut": lambda found: found[:2] + found[3:],
    "the first line cut": lambda found: found[1:],
    "the last line cut": lambda found: found[:-1],
    "all lines cut": lambda _: [],
    "two swapped": lambda found: [found[1], found[0], *found[2:]],
    "one repeated": lambda found: [*found, found[-1]],
    "a line cut short": lambda found: [*found[:-1], found[-1][:40]],
    "a line put in": lambda found: [*found[:2], found[1], *found[2:]],
    "two made up": lambda found: [*found, found[-1], found[-1]],
}


@BOTH
@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_is_found(tmp_path: Path, make: Callable[[Path], AuditLog[Entry]], edit: str) -> None:
    log = make(tmp_path)
    assert len(log.read().entries) == 7
    before = raw(tmp_path)
    (tmp_path / "audit.jsonl").write_bytes(b"".join(edited := EDITS[edit](before)))
    assert edited != before
    if edit == "one repeated":  # as what a crash left of a line that never counted: it is not shown, and cut away
        assert len(log.read().entries) == 7
        return
    with pytest.raises(AuditError, match=r"audit\.jsonl.*docs/audit\.md"):
        log.read()


@BOTH
def test_a_deleted_or_changed_head_is_found(tmp_path: Path, make: Callable[[Path], AuditLog[Entry]]) -> None:
    log = make(tmp_path)
    (tmp_path / "audit.head").write_text('{"seq": 7, "sha256": "' + "0" * 64 + '"}\n')
    with pytest.raises(AuditError):
        log.read()
    (tmp_path / "audit.head").unlink()
    with pytest.raises(AuditError):
        log.read()


@BOTH
def test_an_older_copy_is_found_by_a_head_that_was_noted(
    tmp_path: Path, make: Callable[[Path], AuditLog[Entry]]
) -> None:
    """The limit of a chain: a whole older copy, or one made up anew, is whole. Only what lies elsewhere tells."""
    log, older = make(tmp_path / "log"), tmp_path / "older"
    shutil.copytree(tmp_path / "log", older)
    noted = log.read().head
    log.record(*(("clear",) if make is a_site_log else ("stop",)))
    later = log.read().head
    assert log.read().holds(noted)
    shutil.rmtree(tmp_path / "log")
    older.rename(tmp_path / "log")
    assert log.read().holds(noted)
    assert not log.read().holds(later)


def test_the_command_shows_verifies_and_remembers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hospital = Hospital(tmp_path)
    with hospital.asked() as ask:
        ask(Hello(STUDY, RUN).pack(), "query")
        ask(request(STUDY), "train")
        ask(Hello(STUDY, RUN).pack(), "evaluate")
    site = str(tmp_path / "site.yaml")
    assert site_command(["audit", site]) == 0
    said = capsys.readouterr().out
    assert "study toy: 1 replies" in said
    assert "refused as unknown_request: 1" in said
    assert "6 entries, the chain is whole; head 6:" in said
    assert site_command(["audit", site, "--newest", "1"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("     ")] == ["refusal"]
    assert site_command(["audit", site, "--json"]) == 0
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 6
    assert site_command(["audit", site, "--head"]) == 0
    head = capsys.readouterr().out.strip()
    assert site_command(["audit", site, "--expect", head]) == 0
    assert site_command(["audit", site, "--expect", "6:" + "0" * 64]) == 8
    assert "put back to an older one" in capsys.readouterr().err
    assert site_command(["audit", site, "--expect", "six"]) == 2
    (tmp_path / "state" / "audit.jsonl").write_bytes(b"".join(raw(tmp_path / "state")[:-1]))
    assert site_command(["audit", site]) == 8
    assert "line 6 of 'audit.jsonl' is damaged or missing" in capsys.readouterr().err


@pytest.mark.parametrize("kinds_of", [SITE_KINDS, COORDINATOR_KINDS])
def test_no_field_is_free_text(kinds_of: dict[str, type[Entry]]) -> None:
    """Every text has a form or is one of a few: what a peer writes cannot get into a log."""
    for kind, model in kinds_of.items():
        for name, shape in model.model_json_schema()["properties"].items():
            for each in shape.get("anyOf", [shape]):
                if each.get("type") == "string" and name not in ("previous", "kind"):
                    assert "pattern" in each or "enum" in each or "const" in each, (kind, name)


def test_a_kind_or_field_that_is_not_agreed_is_our_own_mistake(tmp_path: Path) -> None:
    log = site_log(tmp_path)
    for kind, facts in (("dance", {}), ("clear", {"path": "/archive"}), ("refusal", {"reason": "DOE^JANE"})):
        with pytest.raises(ValueError, match=r"no kind|validation error"):
            log.record(kind, facts)
    assert not (tmp_path / "audit.jsonl").exists() or log.read().entries == []
