"""A coordinator and two sites as separate processes, with TLS and keys, from `init` to a signed model, and to an end.

All is done by the commands of the two programs; what is looked at is what an operator has: exit codes, the commands'
words, files, and the kernel's list of who listens.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.deploy_files import COORDINATOR_UNIT, SITE_UNIT, directives
from benchmarks.deployed import COORDINATOR, KINDS, Deployment, audit_of, deployed
from client.listening import Listener, listeners_of
from client.research_command import main

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc"),
    pytest.mark.timeout(600),
]

SITES = ("alpha", "gamma")
"""One with images alone, and one with volumes too: what each sends differs by that."""
LITTLE = {"schedule": {"rounds": 2, "local_steps": 1}, "batch": {"images": 2, "volumes": 1}}


class Run:
    """A federation that has run to its last round, what listened meanwhile, and how the daemons ended."""

    def __init__(self, federation: Deployment) -> None:
        self.federation = federation
        self.listened: dict[str, set[Listener]] = {name: set() for name in ("coordinator", *federation.sites)}
        for site in federation.sites.values():
            site.starts("run")
        federation.runs()
        federation.until(self._is_over, "the run ends", within_s=480.0)
        self.code = federation.until_ended()
        self.codes = {name: site.ends() for name, site in federation.sites.items()}
        self.left = [n for each in (federation.coordinator, *federation.sites.values()) for n in each.processes()]

    def _is_over(self) -> bool:
        people = {"coordinator": self.federation.coordinator, **self.federation.sites}
        for name, operator in people.items():
            assert operator.process is not None
            self.listened[name].update(listeners_of(operator.process.pid) or ())
        process = self.federation.coordinator.process
        return process is not None and process.poll() is not None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with deployed(tmp_path_factory.mktemp("federation"), SITES, **LITTLE) as federation:
        yield Run(federation)


def test_all_rounds_are_finished_with_every_site(run: Run) -> None:
    assert run.code == 0, run.federation.logs()
    told = [{name: site["status"] for name, site in row["sites"].items()} for row in run.federation.rounds()]
    assert told == [dict.fromkeys(SITES, "ok")] * 2


def test_the_operator_sees_what_the_server_app_says(run: Run) -> None:
    """A process of SuperLink's own, whose screen is a log."""
    assert "\nthere was no finished round to resume: a new run begins\n" in run.federation.coordinator.log.read_text()


def test_the_model_is_signed_by_the_coordinator_and_by_nobody_else(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run.federation.run_folder / "checkpoints" / "round-0002"
    assert verify(newest, run.federation.home.signing_public_key) == 0
    assert "signed by SHA256:" in capsys.readouterr().out
    stranger = run.federation.folder / "stranger"
    run.federation.coordinator.types("init", stranger, "--address", "127.0.0.1:9443")
    assert verify(newest, stranger / "certificates" / "signing.pub") == 4


def verify(checkpoint: Path, key: Path) -> int:
    return main(["verify", str(checkpoint), "--key", str(key)])


def test_what_left_each_site_is_what_the_coordinator_counted(run: Run) -> None:
    """Two logs, written by two machines, name the same digests and sizes; reading them verifies their chains."""
    heard = audit_of(run.federation.coordinator, "toy")
    assert [entry["kind"] for entry in audit_of(run.federation.coordinator)].count("approve") == len(SITES)
    assert [entry["round"] for entry in heard if entry["kind"] == "release"] == [1, 2]
    for name, site in run.federation.sites.items():
        left = [entry for entry in audit_of(site) if entry["kind"] == "reply"]
        counted = [entry for entry in heard if entry["kind"] == "counted" and entry["site"] == name]
        facts = ("round", "run", "bytes", "sha256")
        assert [[e[f] for f in facts] for e in left] == [[e[f] for f in facts] for e in counted]
        assert len(left) == 2
        assert ("3d" in left[0]["groups"]) == (KINDS[name] != "cr")


def test_nothing_listens_but_on_loopback(run: Run) -> None:
    for listeners in run.listened.values():
        assert listeners, "nothing was seen to listen: the line below proves nothing"
        assert not [str(one) for one in listeners if one.is_open_to_a_network]


def test_all_that_listens_is_what_the_units_let_bind(run: Run) -> None:
    """systemd.resource-control(5), SocketBindAllow: a rule that names a family holds for sockets of that one alone, and
    some servers bind 127.0.0.1 by a socket of IPv6."""
    for name, listeners in run.listened.items():
        rules = directives(COORDINATOR_UNIT if name == COORDINATOR else SITE_UNIT)["SocketBindAllow"]
        assert not [str(one) for one in listeners if not any(_lets_bind(rule, one) for rule in rules)], name


def _lets_bind(rule: str, one: Listener) -> bool:
    """rule: [ipv4:|ipv6:]tcp[:FIRST-LAST]."""
    *families, _, ports = rule.split(":") if rule[-1].isdigit() else [*rule.split(":"), "1-65535"]
    first, last = map(int, ports.split("-"))
    return (not families or families == [f"ipv{one.address.version}"]) and first <= one.port <= last


def test_nothing_is_left_when_all_have_ended(run: Run) -> None:
    assert run.codes == dict.fromkeys(SITES, 0)
    assert run.left == []
