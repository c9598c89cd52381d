"""A coordinator of real processes on loopback: Flower's SuperLink and SuperExec, the front, and a run without a site.

One `unimiss-server run` serves the tests in their order; the last kill it and let another go on.
"""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import yaml
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from server.approval import revoke
from server.audit import coordinator_log
from server.control import Control
from server.home import Home
from server.run_command import runner, stop
from server.running import Running, status
from server.superlink import environment
from tests.coordinator_home import approved_site, found_home, write_study
from tests.flower_deployment import ROOT, free_port, tells_end_of
from unimiss_core import bundle, keys
from unimiss_core.keys import SiteKey

START_S = 240.0
"""How long processes may take; some ten seconds on a machine with nothing else to do."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc")


@dataclass
class Coordinator:
    home: Home
    port: int
    superlink_port: int
    study: Path
    process: "subprocess.Popen[bytes] | None" = None

    def run(self) -> "subprocess.Popen[bytes]":
        with (self.home.path / "run.log").open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server.server_command", "run", str(self.study), "--home", str(self.home.path)],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return self.process

    @property
    def superlink_log(self) -> Path:
        """What a thread of the coordinator's copies from SuperLink, which outlives it by a moment."""
        return self.home.flower / "superlink.log"

    @property
    def log(self) -> str:
        return (self.home.path / "run.log").read_text()

    def until(self, condition: Callable[[], object], what: str) -> None:
        give_up = time.monotonic() + START_S
        while not condition():
            assert time.monotonic() < give_up, f"not in time: {what}\n{self.logs()}"
            assert self.process is None or self.process.poll() is None, f"ended before: {what}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """The end of what each process wrote."""
        return "\n".join(f"{path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.home.path.rglob("*.log")))

    def is_submitted(self) -> bool:
        running = Running.read(self.home.running)
        return running is not None and running.submitted

    def children(self) -> list[int]:
        """Processes that were started for this folder, and what they started."""
        mark = f"FLWR_HOME={self.home.flower}".encode()
        return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if mark in _environment_of(entry)]

    def patience(self, **settings: object) -> None:
        self.home.coordinator.write_text(yaml.safe_dump({"min_sites": 1, "round_tries": 1, **settings}))


def _environment_of(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    folder = tmp_path_factory.mktemp("coordinator")
    port, superlink_port = free_port(), free_port()
    home = found_home(folder / "home", port=port, superlink_port=superlink_port)
    settings = yaml.safe_load(home.server.read_text())
    home.server.write_text(yaml.safe_dump({**settings, "patience": {"pause_s": 1.0, "tries": 1}}))
    for name in ("alpha", "beta"):
        approved_site(home, name)
    one = Coordinator(home, port, superlink_port, write_study(folder / "study.yaml"))
    one.patience(wait_s=3600.0)
    one.run()
    try:
        one.until(one.is_submitted, "the run is submitted")
        yield one
    finally:
        if one.process is not None:
            one.process.terminate()
            one.process.wait(60)
        for number in one.children():
            os.kill(number, signal.SIGKILL)


@dataclass
class SiteLink:
    """Flower's own client of a site, with the site's certificate."""

    client: FleetHttpClient
    key: SiteKey
    tls: ssl.SSLContext

    @property
    def public(self) -> bytes:
        return keys.pem_of_public(self.key.public_key())


def site_link(coordinator: Coordinator, name: str) -> SiteLink:
    folder = coordinator.home.path.parent / name
    tls = ssl.create_default_context(cafile=str(coordinator.home.authority_certificate))
    tls.load_cert_chain(folder / "site.crt", folder / "site.key")
    key = load_pem_private_key((folder / "site.key").read_bytes(), None)
    assert isinstance(key, SiteKey)
    interceptor = NodeAuthHttpInterceptor(key, key.public_key())
    address = f"https://localhost:{coordinator.port}"
    return SiteLink(FleetHttpClient(address, interceptors=[interceptor], verify=tls), key, tls)


@pytest.fixture(scope="module")
def alpha(coordinator: Coordinator) -> Iterator[SiteLink]:
    link = site_link(coordinator, "alpha")
    yield link
    link.client.close()


def test_an_approved_site_gets_the_runs_question_through_the_front(coordinator: Coordinator, alpha: SiteLink) -> None:
    answer = alpha.client.ActivateNode(ActivateNodeRequest(public_key=alpha.public, heartbeat_interval=300.0))
    node = Node(node_id=answer.node_id)
    heard: list[object] = []

    def pulled() -> bool:
        heard.extend(alpha.client.PullMessages(PullMessagesRequest(node=node)).messages_list)
        return bool(heard)

    coordinator.until(pulled, "the site is asked who it is")


def test_what_a_superlink_would_let_anybody_do_does_not_pass(coordinator: Coordinator, alpha: SiteLink) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        alpha.client.RegisterNode(RegisterNodeFleetRequest(public_key=alpha.public))
    with httpx.Client(verify=alpha.tls, trust_env=False) as client:
        for path in ("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs"):
            assert client.post(f"https://localhost:{coordinator.port}{path}").status_code == 403


def test_superlink_listens_on_loopback_alone_and_asks_superexec_for_its_secret(coordinator: Coordinator) -> None:
    local = f":{coordinator.superlink_port:04X}"
    listening = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()
    ]
    addresses = [words[1] for words in listening[1:] if words[1].endswith(local) and words[3] == "0A"]
    assert addresses == [f"0100007F{local}"]
    tls = ssl.create_default_context(cafile=str(coordinator.home.authority_certificate))
    with httpx.Client(verify=tls, trust_env=False) as client:
        answer = client.post(
            f"https://127.0.0.1:{coordinator.superlink_port}/v1/runtime/acquire-task",
            headers={"content-type": "application/protobuf"},
        )
    assert answer.status_code == 401


def test_flwr_commands_find_the_run_of_the_installed_code(coordinator: Coordinator) -> None:
    (run,) = json.loads(flwr(coordinator, "ls", "unimiss", "--format", "json"))["runs"]
    assert run["fab-hash"] == bundle.fab_hash()
    assert run["status"].startswith("running")


def test_flwr_run_brings_the_installed_code_to_the_coordinators_superlink(coordinator: Coordinator) -> None:
    """As docs/coordinator.md has it typed; its ServerApp finds the folder in use by the run that is at work."""
    settings = f'coordinator="{coordinator.study.stem}" resume=true'
    taken = json.loads(flwr(coordinator, "run", "../bundle", "unimiss", "--run-config", settings, "--format", "json"))
    assert taken["success"]

    told = [{"status": "running"}]

    def is_finished() -> bool:
        """SuperLink's log says when to ask."""
        if tells_end_of(taken["run-id"], coordinator.superlink_log.read_text()):
            runs = json.loads(flwr(coordinator, "ls", "unimiss", "--format", "json"))["runs"]
            told.extend(run for run in runs if str(run["run-id"]) == str(taken["run-id"]))
        return told[-1]["status"].startswith("finished")

    coordinator.until(is_finished, "the second run ends")
    assert told[-1]["fab-hash"] == bundle.fab_hash()


def flwr(coordinator: Coordinator, *words: str) -> str:
    """A command of Flower's in the coordinator's folder; the JSON that it prints."""
    done = subprocess.run(
        [Path(sys.executable).with_name("flwr"), *words],
        env=environment(coordinator.home),
        cwd=coordinator.home.workplace,
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert "{" in done.stdout, done.stdout + done.stderr
    return done.stdout[done.stdout.index("{") :]


def test_status_is_told_from_another_terminal(coordinator: Coordinator) -> None:
    def said() -> str:
        at_work = runner(coordinator.home) is not None
        return "\n".join(status(coordinator.home, at_work=at_work, now=datetime.now(UTC)))

    coordinator.until(lambda: "alpha: heard" in said(), "the front writes down whom it heard")
    assert all(f"{name} works" in said() for name in ("superlink", "superexec", "front"))


def test_a_revoked_site_is_out_at_once_and_unknown_to_superlink_soon(coordinator: Coordinator, alpha: SiteLink) -> None:
    revoke(coordinator.home, "alpha")
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        alpha.client.ActivateNode(ActivateNodeRequest(public_key=alpha.public, heartbeat_interval=30.0))
    control = Control(coordinator.superlink_port, coordinator.home.authority_certificate)
    coordinator.until(lambda: alpha.public not in control.nodes(), "SuperLink forgets the site")
    assert len(control.nodes()) == 1
    control.close()


def test_a_front_that_is_killed_is_back_soon(coordinator: Coordinator) -> None:
    running = Running.read(coordinator.home.running)
    assert running is not None
    (front,) = (child.number for child in running.children if child.name == "front")
    assert front is not None
    os.kill(front, signal.SIGKILL)
    beta = site_link(coordinator, "beta")

    def answers() -> bool:
        try:
            node = beta.client.ActivateNode(
                ActivateNodeRequest(public_key=beta.public, heartbeat_interval=30.0)
            ).node_id
            beta.client.DeactivateNode(DeactivateNodeRequest(node_id=node))  # or the next run would wait for it
        except httpx.HTTPError:
            return False
        return True

    coordinator.until(answers, "the front is back")
    beta.client.close()


def test_nothing_outlives_a_coordinator_that_is_killed_and_the_next_goes_on(coordinator: Coordinator) -> None:
    assert coordinator.process is not None
    assert len(coordinator.children()) >= 3
    coordinator.process.kill()
    coordinator.process.wait()
    coordinator.process = None
    coordinator.until(lambda: not coordinator.children(), "all children end")
    coordinator.patience(wait_s=1.0)
    assert coordinator.run().wait(START_S) == 5
    assert "1 tries finished no round; the last: 0 of at least 1 sites are there" in coordinator.log
    assert "The same command goes on from there." in coordinator.log
    assert coordinator.children() == []
    coordinator.until(
        lambda: "Finished server process" in coordinator.superlink_log.read_text().rstrip().rpartition("\n")[2],
        "SuperLink's last word is there",
    )


def test_stop_ends_a_run_in_order_also_while_it_begins(coordinator: Coordinator) -> None:
    coordinator.patience(wait_s=3600.0)
    process = coordinator.run()
    coordinator.until(coordinator.children, "SuperLink is starting")
    assert stop(coordinator.home)
    assert process.wait(START_S) == 130
    assert coordinator.children() == []
    noted = [entry.facts() for entry in coordinator_log(coordinator.home.audit).read().entries]
    assert [facts["code"] for facts in noted if "code" in facts] == [5, 130]  # the one that was killed had no time
    assert "stopped; what was finished is saved\nThe same command goes on from there." in coordinator.log
