"""What `unimiss-site check` finds on this machine and on the way to the coordinator; `status` and `leave`."""

import json
import os
import socket
import subprocess
import sys
from collections import namedtuple
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_address
from pathlib import Path

import pytest
import torch

from client import listening, readiness, status
from client.audit import site_log
from client.health import CONTACT, HEALTH, PROBLEMS, Contact, Health, note_noise_alone, write
from client.listening import Listener, listeners_of
from client.reachability import reach
from client.readiness import Point, points
from client.site_command import main
from client.site_config import load_site
from tests.flower_deployment import free_port
from tests.joined_site import Joined, joined
from tests.tls_coordinator import Answer, answering
from unimiss_core import certificates

UNSIGNED: Answer = (401, {}, b'{"detail": "Missing signature"}')
"""As SuperLink answers whom its front lets through."""


def found(pair: Joined) -> dict[str, Point]:
    return {point.what: point for point in points(pair.site, load_site(pair.site.site))}


def at(skew_s: float, answer: Answer = UNSIGNED) -> Answer:
    """`answer` from a coordinator whose clock is `skew_s` ahead of ours."""
    told = format_datetime(datetime.now(UTC) + timedelta(seconds=skew_s), usegmt=True)
    return answer[0], {"date": told}, answer[2]


def test_all_is_well(pair: Joined, port: int) -> None:
    with answering(pair.coordinator, port, lambda _: at(0)) as heard:
        all_of_it = found(pair)
    assert {point.mark for point in all_of_it.values()} <= {"good", "warning"}  # a small disk is a warning
    for what in ("keys", "audit log", "code", "inbound", "certificate", "coordinator", "clock", "device cpu"):
        assert all_of_it[what].mark == "good", all_of_it[what]
    assert heard.peers == ["alpha"]
    ((method, path, headers),) = heard.requests
    assert (method, path, headers["content-length"]) == ("POST", "/v1/fleet/send-node-heartbeat", "0")
    assert "flwr-signature" not in headers  # without it nothing can come of the question


def test_an_audit_log_with_which_no_daemon_begins_is_bad(pair: Joined) -> None:
    state = load_site(pair.site.site).state
    site_log(state).record("init", site="alpha")
    assert found(pair)["audit log"].words == "whole, 1 lines"
    log = state / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b"init", b"inot", 1))
    point = found(pair)["audit log"]
    assert point.mark == "bad"
    assert "docs/audit.md" in point.words


@pytest.mark.parametrize(
    ("ahead_s", "mark"), [(0, "good"), (3, "good"), (8, "bad"), (-200, "good"), (-280, "bad"), (-4000, "bad")]
)
def test_a_clock_that_flower_would_refuse_is_bad(pair: Joined, port: int, ahead_s: float, mark: str) -> None:
    """Flower takes a signature up to 5 s from the future and 300 s from the past."""
    with answering(pair.coordinator, port, lambda _: at(-ahead_s)):
        assert found(pair)["clock"].mark == mark


@pytest.mark.parametrize(
    ("answer", "problem", "mark"),
    [
        ((401, {}, b'{"detail": "not_approved"}'), "not_approved", "bad"),
        ((401, {}, b'{"detail": "wrong_key"}'), "not_approved", "bad"),
        ((503, {}, b'{"detail": "coordinator_down"}'), "no_run", "warning"),
        ((503, {}, b'{"detail": "coordinator_failed"}'), "failed", "warning"),
        pytest.param((503, {}, b"[" * 50_000), "no_run", "warning", id="deep"),
        ((302, {"location": "https://127.0.0.1:1/"}, b""), "answer", "bad"),
        ((200, {}, b"<html>welcome</html>"), "answer", "bad"),
    ],
)
def test_what_the_coordinator_says_is_told_in_words(
    pair: Joined, port: int, answer: Answer, problem: str, mark: str
) -> None:
    with answering(pair.coordinator, port, lambda _: answer):
        point = found(pair)["coordinator"]
    assert point.mark == mark
    assert PROBLEMS[problem] in point.words


def test_nobody_there_and_another_in_its_place_are_told_apart(pair: Joined, port: int, tmp_path: Path) -> None:
    assert reach(pair.site).problem == "unreachable"
    stranger = joined(tmp_path / "stranger", address=f"127.0.0.1:{port}")
    with answering(stranger.coordinator, port, lambda _: UNSIGNED):
        reached = reach(pair.site)
    assert reached.problem == "tls"
    assert "certificate" in reached.detail.lower()


def test_the_question_goes_through_the_proxy_that_the_environment_names(
    pair: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To where nobody listens: were the proxy not asked, the coordinator's port would be refused instead."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "elsewhere.example")
    monkeypatch.setenv("no_proxy", "elsewhere.example")
    reached = reach(pair.site)
    assert "proxy" in reached.way
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert reach(pair.site).way == "directly"


@pytest.mark.parametrize("can_be_written", [True, False])
def test_a_shared_ledger_that_cannot_be_written_to_is_bad(
    pair: Joined, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, can_be_written: bool
) -> None:
    config, asked = load_site(pair.site.site), []
    assert "ledger" not in found(pair)
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "ledger.jsonl").touch()

    def access(path: Path, mode: int) -> bool:
        asked.append((path.name, mode))
        return can_be_written or path.suffix == ""

    monkeypatch.setattr(readiness.os, "access", access)
    shared = config.model_copy(update={"ledger": tmp_path / "both"})
    (point,) = (point for point in points(pair.site, shared) if point.what == "ledger")
    assert point.mark == ("good" if can_be_written else "bad")
    assert asked == [("both", os.W_OK | os.X_OK), ("ledger.jsonl", os.R_OK | os.W_OK)]


def test_keys_that_others_can_read_are_bad(pair: Joined) -> None:
    pair.site.tls_key.chmod(0o640)
    assert found(pair)["keys"].mark == "bad"


def test_a_certificate_is_told_before_it_runs_out(pair: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    lasts = certificates.days_left(certificates.read_certificate(pair.site.certificate), datetime.now(UTC))
    for days, mark in {0.0: "good", lasts - 20: "warning", lasts + 3: "bad"}.items():
        moment = datetime.now(UTC) + timedelta(days=days)
        monkeypatch.setattr(readiness, "datetime", namedtuple("Clock", "now")(lambda _, m=moment: m))
        assert found(pair)["certificate"].mark == mark


def test_a_disk_without_room_is_told(pair: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    for free, mark in {900e9: "good", 100e9: "warning"}.items():
        monkeypatch.setattr(readiness.shutil, "disk_usage", lambda _, free=free: usage(1e12, 0, int(free)))
        assert found(pair)["disk, state and cache"].mark == mark


def test_a_gpu_that_another_program_fills_is_told(pair: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "devices_of", lambda _: [torch.device("cuda", 0)])
    for free, mark in {60e9: "good", 3e9: "warning"}.items():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (int(free), int(80e9)))
        assert found(pair)["device cuda:0"].mark == mark


def test_a_gpu_that_does_not_answer_is_bad_in_words(pair: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: object) -> tuple[int, int]:
        raise RuntimeError("CUDA error: device is busy\nCUDA kernel errors might be reported elsewhere")

    monkeypatch.setattr(readiness, "devices_of", lambda _: [torch.device("cuda", 0)])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    point = found(pair)["device cuda:0"]
    assert point.mark == "bad"
    assert point.words.startswith("cuda:0 cannot be used (CUDA error: device is busy); nvidia-smi shows")


def test_a_gpu_that_auto_leaves_unused_is_told(pair: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pair.site.site.write_text(pair.site.site.read_text() + "devices: auto\n")
    points = found(pair)
    assert points["device cuda:0"].mark == "warning"
    assert points["device cuda:0"].words.startswith("stays unused: CUDA does not start")
    assert points["device cpu"].mark == "good"


def test_a_device_that_is_not_there_is_bad(pair: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    pair.site.site.write_text(pair.site.site.read_text() + "devices: cuda:0\n")
    assert found(pair)["devices"].mark == "bad"


def test_who_has_not_joined_is_told_how(pair: Joined) -> None:
    pair.site.welcome.unlink()
    point = found(pair)["coordinator"]
    assert point.mark == "bad"
    assert "unimiss-site join" in point.words


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("host", "is_open"), [("127.0.0.1", False), ("0.0.0.0", True), ("::1", False), ("::", True)])
def test_what_a_process_listens_on_is_found(host: str, is_open: bool) -> None:
    family = "AF_INET6" if ":" in host else "AF_INET"
    code = (
        f"import socket, sys\nwith socket.socket(socket.{family}) as s:\n s.bind(({host!r}, 0)); s.listen()\n"
        " print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    try:
        with socket.socket(getattr(socket, family)) as probe:
            probe.bind((host, 0))
    except OSError:
        pytest.skip("this machine has no such address")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert listeners_of(process.pid) == [Listener(ip_address(host), port)]
        assert [listener.is_open_to_a_network for listener in listeners_of(process.pid) or ()] == [is_open]
        process.kill()
        process.communicate()


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux's /proc")
def test_a_process_that_ended_meanwhile_listens_on_nothing() -> None:
    """As one of a family does between being named and being looked at."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert listeners_of(process.pid) == []


def test_the_kernels_way_of_writing_addresses_is_read() -> None:
    """proc(5)'s own example and the IPv4 address that IPv6 sockets see."""
    assert listening._address("0100007F") == ip_address("127.0.0.1")
    assert listening._address("0000000000000000FFFF00000100007F") == ip_address("::ffff:127.0.0.1")
    assert not Listener(ip_address("::ffff:127.0.0.1"), 1).is_open_to_a_network


NOW = 1_800_000_000.0
RUNS = Health(pid=77, state="running", since=NOW - 900)


@pytest.mark.parametrize(
    ("contact", "health", "said"),
    [
        (None, RUNS, "no word yet"),
        (Contact(connected=NOW - 60, answered=NOW - 3), RUNS, "connected since"),
        (Contact(connected=NOW - 900, answered=NOW - 500), RUNS, "silent since"),
        (Contact(problem="unreachable", problem_since=NOW - 50), RUNS, "cannot be reached"),
        (
            Contact(problem="not_approved", problem_since=NOW - 50),
            Health(pid=77, state="waiting", since=NOW - 900, restarts=3, ended="exit code 1", next_try=NOW + 240),
            "revoked it; only its operator can mend that, since 2027-01-15 07:59:10 UTC; the next try is in 240 s",
        ),
        (Contact(connected=NOW - 60, answered=NOW, asked=NOW - 30, round=12), RUNS, "for round 12"),
        (Contact(connected=NOW - 60, answered=NOW, asked=NOW - 30), RUNS, "who this site is"),
    ],
)
def test_status_in_words(
    contact: Contact | None, health: Health, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "is_running", lambda _: True)
    write(tmp_path / HEALTH, health)
    if contact is not None:
        write(tmp_path / CONTACT, contact)
    assert said in "\n".join(status.lines(tmp_path, NOW))


def test_status_tells_of_a_private_study_that_finds_no_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "is_running", lambda _: True)
    write(tmp_path / HEALTH, RUNS)
    note_noise_alone(tmp_path, "first", [2, 3])
    (line,) = [line for line in status.lines(tmp_path, NOW) if line.startswith("scans ")]
    assert "study first found no usable 2D and 3D scan at " in line
    assert json.loads(status.as_json(tmp_path))["noise_alone"]["ranks"] == [2, 3]
    note_noise_alone(tmp_path, "first", [])
    assert not any(line.startswith("scans ") for line in status.lines(tmp_path, NOW))


def test_status_of_a_daemon_that_is_gone(tmp_path: Path) -> None:
    assert "never did" in "\n".join(status.lines(tmp_path, NOW))
    write(tmp_path / HEALTH, RUNS)
    assert "ended by force" in "\n".join(status.lines(tmp_path, NOW))
    write(tmp_path / HEALTH, RUNS.model_copy(update={"state": "stopped"}))
    assert "was stopped" in "\n".join(status.lines(tmp_path, NOW))
    assert json.loads(status.as_json(tmp_path))["running"] is False


def test_status_of_a_daemon_that_has_just_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "is_running", lambda _: True)
    assert list(status.lines(tmp_path, NOW)) == ["daemon       is starting"]


def test_a_damaged_file_is_no_word(tmp_path: Path) -> None:
    (tmp_path / CONTACT).write_text('{"connected": "yesterday"}')
    (tmp_path / HEALTH).write_text("{")
    assert "never did" in "\n".join(status.lines(tmp_path, NOW))


def test_the_command_status_fails_where_no_daemon_runs(pair: Joined, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--home", str(pair.site.path)]) == 1
    assert "does not run" in capsys.readouterr().out


def test_leaving_destroys_the_keys_and_keeps_what_the_hospital_answers_for(
    pair: Joined, capsys: pytest.CaptureFixture[str]
) -> None:
    state = pair.site.path / "state"
    (state / "ledger.jsonl").write_text("what patients have cost")
    (state / "audit.jsonl").write_text("what has left")
    home = ["--home", str(pair.site.path)]
    assert main(["leave", *home]) == 2
    assert f"unimiss-site leave --yes --home {pair.site.path}" in capsys.readouterr().err
    assert pair.site.private_key.exists()
    assert main(["leave", "--yes", *home]) == 0
    out = capsys.readouterr().out
    assert "unimiss-server revoke alpha" in out
    for stays in ("cache", "runs", "patient_secret"):
        assert str(state / stays) in out
    for command in ("status", "check", "run"):
        assert main([command, *home]) == 2
        assert "this site has left" in capsys.readouterr().err
    assert not pair.site.private_key.exists()
    assert not pair.site.tls_key.exists()
    assert {path.name for path in state.iterdir()} >= {"ledger.jsonl", "audit.jsonl"}


def test_check_of_a_whole_site_says_what_is_amiss(pair: Joined, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody answers at the coordinator's address; the scans are looked at all the same."""
    assert main(["check", "--home", str(pair.site.path)]) in (2, 3)
    out = capsys.readouterr().out
    assert "warning  coordinator" in out  # nobody listens there: no study runs, as far as a site can tell
    assert "no study runs there just now" in out
    assert "good     keys" in out
