"""A site's daemon as it is: its processes, a real SuperLink with TLS and keys, and a run with somebody else's code."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.audit import log_of
from client.daemon import _alone, _prepare, environment_of, is_running
from client.gate import UNSAID
from client.health import HEALTH, Health, read_contact, read_health, write
from client.leaving import stop
from client.listening import listeners_of
from client.reachability import reach
from client.site_config import load_site
from client.watch import ONE_MESSAGE
from server import home as coordinator
from tests import foreign_app
from tests.flower_deployment import START_S, Flower, free_port
from tests.joined_site import Joined, joined
from unimiss_core.errors import ConfigError

LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds what it started by Linux's /proc")


def start_superlink(flower: Flower, home: coordinator.Home, port: int) -> None:
    flower.start(
        "superlink.log",
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth"),
        *("--ssl-ca-certfile", str(home.authority_certificate), "--ssl-certfile", str(home.server_certificate)),
        *("--ssl-keyfile", str(home.server_key)),
    )
    flower.wait_until(lambda: _listens(port), "the SuperLink listens", timeout_s=START_S)
    connection = f'address = "127.0.0.1:{port}"\nroot-certificates = "{home.authority_certificate}"\n'
    (flower.folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\n{connection}'
    )


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def daemon(pair: Joined) -> Iterator[subprocess.Popen[bytes]]:
    code = "import sys; from client.site_command import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", "--home", str(pair.site.path)],
        cwd=pair.site.path,
        env=environment_of(pair.site.path / "unused"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def processes_of(pair: Joined) -> list[int]:
    """Of the daemon's making: Flower's home in the site's state is theirs alone."""
    mark = f"FLWR_HOME={pair.site.path / 'state' / 'flower'}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@LINUX
def test_a_site_joins_in_refuses_foreign_code_and_leaves_nothing_behind(tmp_path: Path) -> None:
    port = free_port()
    pair = joined(tmp_path, address=f"127.0.0.1:{port}")
    state = pair.site.path / "state"
    with Flower.opened(tmp_path / "coordinators") as flower:
        start_superlink(flower, pair.coordinator, port)
        flower._told("supernode", "register", str(pair.site.public_key))
        assert reach(pair.site).problem is None  # SuperLink misses the signature, and that is the way being free
        with daemon(pair) as process:
            flower.wait_until(lambda: _is_connected(state), "the site connects", timeout_s=START_S)
            assert is_running(state)
            assert not [found for found in listeners_of(process.pid) or () if found.is_open_to_a_network]
            assert listeners_of(process.pid), "the gate's Runtime API was not seen: the line above proves nothing"
            mark = tmp_path / "mark"
            project = foreign_app.write(tmp_path / "federated-unimiss", mark)
            run = flower.submit({"coordinator": ""}, project=project)
            logs = [""]

            def is_told() -> bool:
                if flower.has_ended(run):
                    logs.append(flower._log_of_run(run))
                return "ANSWER evaluate" in logs[-1]

            flower.wait_until(is_told, "the foreign run ends", timeout_s=START_S)
            told = [line.split("ANSWER ")[1] for line in logs[-1].splitlines() if "ANSWER " in line]
            assert told == [f"{kind} {code} {UNSAID!r}" for kind, code in (("train", 7), ("evaluate", 2))]
            assert not mark.exists()
            assert not (state / "flower" / "apps").exists()
            process.send_signal(signal.SIGKILL)
            process.wait()
            flower.wait_until(lambda: not processes_of(pair), "all of the site's processes end", timeout_s=30.0)
    assert not is_running(state)
    noted = [(entry.kind, *entry.facts().values()) for entry in log_of(pair.site.site).read().entries]
    assert noted[0] == ("daemon", "started")
    assert ("daemon", "connected") in noted
    refused = [facts for kind, *facts in noted if kind == "bundle"]
    assert [facts[-1] for facts in refused] == ["bundle", "message_type"]


def _is_connected(state: Path) -> bool:
    contact = read_contact(state)
    return contact is not None and contact.connected is not None


@LINUX
def test_a_site_waits_for_a_coordinator_that_is_not_there_and_ends_when_asked(tmp_path: Path) -> None:
    pair = joined(tmp_path, address=f"127.0.0.1:{free_port()}")
    state = pair.site.path / "state"
    with Flower.opened(tmp_path / "unused") as flower, daemon(pair) as process:
        flower.wait_until(lambda: _problem(state) == "unreachable", "the site says why it waits", timeout_s=START_S)
        health = read_health(state)
        assert health is not None
        assert (health.state, health.restarts) == ("running", 0)  # it asks again and again, and nothing is started anew
        assert process.poll() is None
        assert stop(state)
        assert process.wait(timeout=30) == 0
        assert not processes_of(pair)
        assert (health := read_health(state)) is not None
        assert health.state == "stopped"


def _problem(state: Path) -> str | None:
    contact = read_contact(state)
    return contact.problem if contact else None


def test_two_daemons_never_share_a_state_folder(tmp_path: Path) -> None:
    site = load_site(joined(tmp_path).site.site)
    with _alone(site), pytest.raises(ConfigError, match="runs already"), _alone(site):
        pass
    with _alone(site):
        assert is_running(site.state)
    assert not is_running(site.state)


def test_each_start_has_a_secret_of_its_own_and_no_code_of_an_older_bundle(tmp_path: Path) -> None:
    site = load_site(joined(tmp_path).site.site)
    secret = _prepare(site).secret.read_bytes()
    (site.state / "flower" / "apps" / "unimiss.federated-unimiss.0.0.9.00000000").mkdir(parents=True)
    folders = _prepare(site)
    assert folders.secret.read_bytes() != secret
    assert len(secret) == 64
    assert folders.secret.stat().st_mode & 0o077 == 0
    assert not (site.state / "flower" / "apps").exists()
    assert list(folders.empty.iterdir()) == []


def test_what_is_started_is_quiet_and_keeps_to_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "inner.example")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    environment = environment_of(tmp_path)
    assert environment["NO_PROXY"] == "inner.example,127.0.0.1,localhost"
    assert environment["HTTPS_PROXY"] == "http://proxy.example:3128"  # the way to the coordinator is the hospital's
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment[ONE_MESSAGE] == "1"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert environment["GLOO_SOCKET_IFNAME"].startswith("lo")
    assert environment["NCCL_SOCKET_IFNAME"].startswith("lo")


def test_a_daemon_that_begins_forgets_which_process_the_last_one_was(tmp_path: Path) -> None:
    """After a reboot its number may be anybody's, whom `leave` would end."""
    site = load_site(joined(tmp_path).site.site, reads_scans=False)
    write(site.state / HEALTH, Health(pid=1, state="running", since=0.0))
    _prepare(site)
    assert read_health(site.state) is None


def test_a_daemon_that_has_not_said_which_process_it_is_is_not_taken_for_gone(tmp_path: Path) -> None:
    """`leave` would destroy its keys while it works; a disk that is full is enough for that."""
    site = load_site(joined(tmp_path).site.site, reads_scans=False)
    with _alone(site), pytest.raises(ConfigError, match="a daemon runs, and has not written which process it is"):
        stop(site.state, sleep=lambda _: None)
    assert stop(site.state) is False
