"""Hostile peers of a federation on loopback: strangers, a hostile coordinator, a hostile site. Each is to be refused,
and what refused it is to be found in an audit log.

The cases share one federation whose run waits for a site that never comes, so that all its processes are there;
`hostile-updates` has one of its own, in which a hostile site with a certificate takes part.
"""

import json
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from flwr.proto.message_pb2 import PullObjectRequest

from benchmarks import sabotage
from benchmarks.deployed import STUDY, Deployment, Operator, audit_of, deployed
from client.home import Home as SiteHome
from client.listening import listeners_of
from server.control import Control
from server.registry import Registry, registered
from server.superlink import environment
from tests import foreign_app
from unimiss_core import keys

WAIT_S = 300.0
NOISY: Mapping[str, Any] = {
    "privacy": {"mode": "patient", "max_epsilon": 1e4, "noise_multiplier": 0.5, "centre_noise": 0.5},
    "aggregation": {"weighting": "uniform"},
    "objective": {"centre_momentum": 0.9999},
}
"""A study with half the noise that LIMITS asks for, at least."""
LIMITS: Mapping[str, Mapping[str, Any]] = {
    "alpha": {
        "policy": {"studies": ["toy"], "losses_may_leave": False},
        "privacy": {"holds": ["images"], "allow_unprotected": True, "least_noise_multiplier": 1.0},
    },
    "gamma": {"policy": {"groups_may_leave": ["shared", "2d", "head"]}},
}
"""What the two sites' operators allow."""


@dataclass(frozen=True)
class Refused:
    """case: its name. answer: what the peer got. where: the entry of an audit log; empty where there is none."""

    case: str
    answer: str
    where: str


@dataclass
class Stage:
    """The federation, and the coordinator's way to its own SuperLink, which a hostile one would have as well."""

    federation: Deployment
    control: Control

    @property
    def public(self) -> int:
        return self.federation.line.port

    def site(self, name: str) -> SiteHome:
        return SiteHome(self.federation.sites[name].home)

    def tls(self, name: str | None) -> ssl.SSLContext:
        """Of a site, by its name; None shows no certificate."""
        context = ssl.create_default_context(cafile=str(self.federation.home.authority_certificate))
        if name is not None:
            context.load_cert_chain(self.site(name).certificate, self.site(name).tls_key)
        return context

    def noted(self, who: Operator, act: Callable[[], str], **facts: str) -> tuple[str, str]:
        """(what the peer got, the audit entry that came of it, with these facts)"""
        before = len(audit_of(who))
        answer = act()
        found: list[dict[str, Any]] = []

        def is_noted() -> bool:
            new = audit_of(who)[before:]
            found[:] = [entry for entry in new if facts.items() <= entry.items()]
            return bool(found)

        self.federation.until(is_noted, f"{who.home.name} notes {facts}", within_s=WAIT_S)
        return answer, _in_words(who.home.name, found[0])


def _in_words(who: str, entry: Mapping[str, Any]) -> str:
    told = [
        f"{name}={entry[name]}"
        for name in ("decision", "reason", "peer", "site", "study_name", "code")
        if name in entry
    ]
    return f"{who}'s log, #{entry['seq']}: {entry['kind']} {' '.join(told)}"


Case = Callable[[Stage], tuple[str, str]]


def no_certificate(stage: Stage) -> tuple[str, str]:
    return _at_the_front(stage, None, _request(stage, "gamma"), reason="no_certificate")


def unknown_key(stage: Stage) -> tuple[str, str]:
    """A whole other federation's site, with its own authority's certificate."""
    folder = stage.federation.folder / "elsewhere"
    with deployed(folder, ["stranger"]) as other:
        home = SiteHome(other.sites["stranger"].home)
        tls = stage.tls(None)
        tls.load_cert_chain(home.certificate, home.tls_key)
        return _at_the_front(stage, tls, _request(stage, "gamma"), reason="stranger")


def revoked_key(stage: Stage) -> tuple[str, str]:
    stage.federation.coordinator.types("revoke", "ghost", "--yes")
    return _at_the_front(stage, stage.tls("ghost"), _request(stage, "ghost"), reason="not_approved")


def key_of_another_site(stage: Stage) -> tuple[str, str]:
    return _at_the_front(stage, stage.tls("gamma"), _request(stage, "alpha"), reason="wrong_key")


def object_of_another_site(stage: Stage) -> tuple[str, str]:
    """The coordinator's message to alpha, by the very name that SuperLink has it under."""
    file = stage.federation.home.passage / "alpha" / "given.json"
    stage.federation.until(file.exists, "alpha is asked", within_s=WAIT_S)
    body = PullObjectRequest(object_id=list(json.loads(file.read_text()))[-1]).SerializeToString()
    request = _request(stage, "gamma", path="/v1/fleet/pull-object", length=len(body)) + body
    return _at_the_front(stage, stage.tls("gamma"), request, reason="not_given")


def control_api(stage: Stage) -> tuple[str, str]:
    request = _request(stage, "gamma", path="/v1/control/start-run")
    return _at_the_front(stage, stage.tls("gamma"), request, reason="path")


def five_gigabytes(stage: Stage) -> tuple[str, str]:
    request = _request(stage, "gamma", path="/v1/fleet/push-object", length=5_000_000_000)
    return _at_the_front(stage, stage.tls("gamma"), request, reason="length")


def front_scanned(stage: Stage) -> tuple[str, str]:
    """A scan of ports speaks no TLS."""

    def act() -> str:
        with socket.create_connection(("127.0.0.1", stage.public), timeout=20) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return "cut off" if not connection.recv(1) else "an answer"

    return stage.noted(stage.federation.coordinator, act, kind="peer_refused", reason="not_tls")


def site_scanned(stage: Stage) -> tuple[str, str]:
    """What a site's processes listen on: nothing that a network reaches, and so nothing to log."""
    found = [listener for site in stage.federation.sites.values() if site.process for listener in _listeners(site)]
    assert found, "nothing was seen to listen: the line below proves nothing"
    reachable = [str(listener) for listener in found if listener.is_open_to_a_network]
    told = f"open to a network: {', '.join(reachable) or 'nothing'}; on loopback: {len(found)} ports, with a secret"
    return told, "nothing comes in, so nothing is logged"


def _listeners(site: Operator) -> Sequence[Any]:
    assert site.process is not None
    return listeners_of(site.process.pid) or ()


def another_bundle(stage: Stage) -> tuple[str, str]:
    """Straight at the coordinator's loopback, as whoever owns that machine could."""
    return _foreign(stage, "bundle")


def message_of_another_kind(stage: Stage) -> tuple[str, str]:
    """A request that no site answers, as somebody would send who wants raw scans in the place of an update."""
    return _foreign(stage, "message_type")


def _foreign(stage: Stage, reason: str) -> tuple[str, str]:
    mark = stage.federation.folder / f"mark-{reason}"
    project = foreign_app.write(stage.federation.folder / f"foreign-{reason}" / "federated-unimiss", mark)
    home = stage.federation.home

    def act() -> str:
        command = [str(Path(sys.executable).with_name("flwr")), "run", str(project), "unimiss", "--format", "json"]
        done = subprocess.run(command, env=environment(home), cwd=home.workplace, capture_output=True, timeout=WAIT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return "an error without a word"

    answer, where = stage.noted(stage.federation.sites["alpha"], act, kind="bundle", reason=reason)
    assert not mark.exists(), "foreign code was run"
    return f"{answer}; the foreign code was not run", where


def run_config_changed(stage: Stage) -> tuple[str, str]:
    """The right bundle, with settings in the run's configuration that lower noise, widen tensors, rename the study.

    An honest SuperLink takes none but those that the bundle declares; a hostile one says what it likes.
    """
    override = {"noise_multiplier": "0.0", "groups_may_leave": "3d", "study": "other"}
    return _asked(stage, "alpha", {}, override=override, kind="bundle", reason="run_config")


def less_noise(stage: Stage) -> tuple[str, str]:
    return _asked(stage, "alpha", NOISY, kind="refusal", reason="budget")


def more_tensors(stage: Stage) -> tuple[str, str]:
    return _asked(stage, "gamma", {}, kind="refusal", reason="policy")


def study_renamed(stage: Stage) -> tuple[str, str]:
    return _asked(stage, "alpha", {"name": "other"}, kind="refusal", reason="policy", study_name="other")


def losses_asked(stage: Stage) -> tuple[str, str]:
    return _asked(stage, "alpha", {"wire": {"losses": True}}, kind="refusal", reason="policy", study_name="toy")


def tampered_checkpoint(stage: Stage) -> tuple[str, str]:
    """One bit of the checkpoint that a run would go on from. Comes last: it ends the run."""
    federation = stage.federation
    federation.coordinator.types("stop")
    federation.until_ended()
    federation.set_coordinator(min_sites=1)  # the third was revoked in another case
    newest = sorted((federation.run_folder / "checkpoints").glob("round-*[0-9]"))[-1]
    student = newest / "student.safetensors"
    content = student.read_bytes()
    student.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    Operator("client.research_command", "UNIMISS_SERVER_HOME", federation.folder).types("verify", newest, codes=[4])

    def act() -> str:
        federation.runs()
        return f"`unimiss verify` ends with 4, `unimiss-server run` with {federation.until_ended(within_s=WAIT_S)}"

    return stage.noted(federation.coordinator, act, kind="run_ended")


CASES: Mapping[str, Case] = {
    "no-certificate": no_certificate,
    "unknown-key": unknown_key,
    "revoked-key": revoked_key,
    "key-of-another-site": key_of_another_site,
    "object-of-another-site": object_of_another_site,
    "control-api": control_api,
    "5-gb-claimed": five_gigabytes,
    "front-scanned": front_scanned,
    "site-scanned": site_scanned,
    "run-config-changed": run_config_changed,
    "less-noise": less_noise,
    "more-tensors": more_tensors,
    "study-renamed": study_renamed,
    "losses-asked": losses_asked,
    "another-bundle": another_bundle,
    "raw-data-asked": message_of_another_kind,
    "tampered-checkpoint": tampered_checkpoint,
}


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """Two sites that are connected, and a run that waits for a third."""
    with deployed(folder, ("alpha", "gamma", "ghost"), wire={"losses": False}) as federation:
        federation.set_coordinator(min_replies=1, wait_s=36_000.0)
        for name, limits in LIMITS.items():
            federation.set_site(name, **limits)
            federation.sites[name].starts("run")
        federation.runs()
        connected = [federation.sites[name].home / "state" / "contact.json" for name in LIMITS]
        federation.until(lambda: all(_is_connected(path) for path in connected), "both sites are connected")
        server = yaml.safe_load(federation.home.server.read_text())
        control = Control(server["superlink_port"], federation.home.authority_certificate)
        try:
            yield Stage(federation, control)
        finally:
            control.close()


def hostile_updates(folder: Path) -> Iterator[Refused]:
    """A site with a certificate whose updates of rounds 2 to 4 are not what they say; beside it an honest one."""
    orders = {"2": "replay", "3": "pickle", "4": "claim"}
    with deployed(folder, ("alpha", "beta"), schedule={"rounds": 4, "local_steps": 2}) as federation:
        federation.set_coordinator(min_replies=1)
        place = folder / "sabotage"
        federation.sites["beta"].extra.update(sabotage.place(place, tamper=orders))
        for site in federation.sites.values():
            site.starts("run")
        federation.runs()
        code = federation.until_ended(within_s=900.0)
        entries = [e for e in audit_of(federation.coordinator, "toy") if e["kind"] == "refused"]
        for round, how in orders.items():
            where = [_in_words("the run", e) for e in entries if e["round"] == int(round) and e["site"] == "beta"]
            opened = "; what was pickled ran" if (place / "opened").exists() else ""
            yield Refused(f"update-{how}", f"does not count; the run ended with {code}{opened}", "; ".join(where))


def _is_connected(contact: Path) -> bool:
    with suppress(OSError, ValueError):
        return "connected" in contact.read_text() and '"connected":null' not in contact.read_text()
    return False


def _request(stage: Stage, key_of: str, *, path: str = "/v1/fleet/pull-messages", length: int = 0) -> bytes:
    """The head of what a SuperNode of that site would write. length: of a body, as claimed."""
    private = keys.read_site_key(stage.site(key_of).tls_key)
    headers = {
        "host": "127.0.0.1",
        "content-type": "application/protobuf",
        "flwr-public-key": b64encode(keys.pem_of_public(private.public_key())).decode(),
        "flwr-timestamp": datetime.now(UTC).isoformat(),
        "content-length": str(length),
    }
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode()


def _at_the_front(stage: Stage, tls: ssl.SSLContext | None, request: bytes, *, reason: str) -> tuple[str, str]:
    """tls: None shows no certificate."""

    def act() -> str:
        context = tls or stage.tls(None)
        try:
            with (
                socket.create_connection(("127.0.0.1", stage.public), timeout=20) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
            ):
                connection.sendall(request)
                return (connection.recv(4096).split(b"\r\n")[0] or b"cut off").decode()
        except OSError as error:
            return f"cut off ({getattr(error, 'reason', type(error).__name__)})"

    return stage.noted(stage.federation.coordinator, act, kind="peer_refused", reason=reason)


def _rewrite(database: Path, run: int, settings: Mapping[str, str | bool]) -> None:
    """What SuperLink says of a run's configuration, changed behind its back, as whoever owns the machine can."""
    with closing(sqlite3.connect(database, timeout=30.0)) as link, link:
        changed = link.execute(
            "UPDATE run SET override_config = ? WHERE run_id = ?",
            (json.dumps(settings), run - (1 << 64) if run >= 1 << 63 else run),
        )
        assert changed.rowcount == 1


def _asked(
    stage: Stage, site: str, changes: Mapping[str, Any], *, override: Mapping[str, str] | None = None, **facts: str
) -> tuple[str, str]:
    """A run of the right code with a study of a hostile coordinator's making. changes: to a study that would do."""
    folder = stage.federation.folder / f"hostile-{time.monotonic_ns()}"
    folder.mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, "wire": {"losses": False}, **changes}))
    found = [registered(one) for one in Registry(stage.federation.home).approved() if one.name == site]
    alone = {"min_sites": 1, "min_replies": 1, "round_tries": 1, "wait_s": 5.0, "retry_s": 0.0}  # asked once
    settings = {"study": "study.yaml", "out": "out", "sites": [one.model_dump(mode="json") for one in found], **alone}
    (folder / "coordinator.yaml").write_text(yaml.safe_dump(settings))

    def act() -> str:
        told = {"coordinator": str(folder / "coordinator.yaml"), "resume": True}
        run = stage.control.submit(told)
        if override:  # once the ServerApp has its own, and before the site has asked
            stage.federation.until((folder / "out" / "study.yaml").exists, "the ServerApp begins")
            _rewrite(stage.federation.home.database, run, {**told, **override})
        return "the reason alone" if facts["kind"] == "refusal" else "an error without a word"

    return stage.noted(stage.federation.sites[site], act, **facts)
