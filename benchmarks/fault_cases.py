"""Faults of a federation, each of which ends in a finished run or in a clear stop: what was lost on the way.

Each case has a federation of its own (benchmarks/deployed.py): two sites, of which one is enough to close a round.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import confined, sabotage
from benchmarks.deployed import COORDINATOR, Deployment, DeploymentError, Operator, audit_of, deployed
from server.coordinator_config import CoordinatorConfig

ROUNDS = 3
SITES = ("alpha", "beta")
LEASE_S = 60.0
"""So long the coordinator holds the connection of a site that died for live."""
CUT_S, LONG_CUT_S = 90.0, 600.0
DOWN_S = 45.0
"""So long a machine takes to start again."""
DEADLINE_S, SLOW_S = 60.0, 120.0
CASE_S = 900.0
SHIPPED = {name: CoordinatorConfig.model_fields[name].default for name in ("wait_s", "deadline_s", "retry_s")}
"""How long a coordinator waits whose operator set nothing."""
NUMBERED = ("state/health.json", "flower/run.lock", "flower/running.json")
"""Files of a site's folder, and of a coordinator's, that name processes by their numbers."""


class NotRunError(Exception):
    """The machine does not allow the case; it says why."""


@dataclass(frozen=True)
class Outcome:
    """case: its name. ended: how. lost: in words. seconds: of the run, from its start to its end.

    rounds_lost: tries of rounds that had to be made again. updates_lost: requests that no update counted for.
    """

    case: str
    ended: str
    seconds: float
    rounds: int
    rounds_lost: int
    updates_lost: int
    lost: str


Fault = Callable[[Deployment], str]
"""Makes it happen, in a run that has begun; what was seen, in words."""


def site_killed(federation: Deployment) -> str:
    """SIGKILL of all of a site's processes in mid-round; started again when its lease is over."""
    _kill_in_mid_round(federation)
    time.sleep(LEASE_S + 10.0)
    federation.sites["beta"].starts("run")
    return f"beta killed in mid-round, started again after {LEASE_S + 10:g} s"


def site_restarted(federation: Deployment) -> str:
    """SIGKILL in mid-round, and another start at once, while the coordinator holds the old connection for live."""
    _kill_in_mid_round(federation)
    federation.sites["beta"].starts("run")
    return f"beta killed in mid-round and started again at once; {_refused_starts(federation)}"


def _refused_starts(federation: Deployment) -> str:
    """How long it took until the coordinator let it in, and how often the daemon had to start the SuperNode anew."""
    beta, run = federation.sites["beta"], federation.coordinator.process
    before = len(_events(beta, "connected"))
    assert run is not None

    def is_over() -> bool:
        return len(_events(beta, "connected")) > before or run.poll() is not None

    took = federation.until(is_over, "beta is let in", within_s=CASE_S)
    if len(_events(beta, "connected")) == before:
        return "the run was over before it was let in"
    return f"let in after {took:.0f} s, in try {json.loads(_health_of(beta))['restarts'] + 1}"


def _health_of(site: Operator) -> str:
    return (site.home / "state" / "health.json").read_text()


def coordinator_killed(federation: Deployment) -> str:
    """SIGKILL of all of the coordinator's processes in mid-round, and the same command again."""
    _until_mid_round(federation)
    federation.coordinator.loses_power()
    federation.runs()
    return "coordinator killed in mid-round, the same command again"


def superlink_hangs(federation: Deployment) -> str:
    """SIGSTOP: Flower's SuperLink is there, and answers nothing."""
    _until_mid_round(federation)
    (stopped,) = federation.coordinator.processes("flower-superlink")
    os.kill(stopped, signal.SIGSTOP)
    took = federation.until(lambda: stopped not in federation.coordinator.processes(), "it is ended", within_s=CASE_S)
    return f"SuperLink stopped in mid-round; ended, and another started, after {took:.0f} s"


def network_cut(federation: Deployment) -> str:
    """Nothing passes between sites and coordinator."""
    return _cut(federation, CUT_S)


def network_cut_long(federation: Deployment) -> str:
    """The same for ten minutes, under the waits that are shipped."""
    told = _cut(federation, LONG_CUT_S)
    before = len(federation.rounds())
    took = federation.until(lambda: len(federation.rounds()) > before, "a round is finished", within_s=CASE_S)
    return f"{told}; the next round was finished {took:.0f} s after it"


def _cut(federation: Deployment, seconds: float) -> str:
    _until_mid_round(federation)
    federation.line.closes()
    time.sleep(seconds)
    federation.line.opens()
    return f"no way between sites and coordinator for {seconds:g} s, from mid-round on"


def site_rebooted(federation: Deployment) -> str:
    """A site's machine loses power in mid-round, and starts its unit when it is up again."""
    return _reboot(federation, "beta")


def coordinator_rebooted(federation: Deployment) -> str:
    """The same of the coordinator's."""
    return _reboot(federation, COORDINATOR)


def _reboot(federation: Deployment, name: str) -> str:
    """All processes and whatever lay in /tmp are gone at once; their numbers are somebody else's by then, who must not
    be ended for that. What runs then is the ExecStart of the unit."""
    machine = federation.operator(name)
    _until_mid_round(federation)
    numbers = machine.processes()
    machine.loses_power()
    time.sleep(DOWN_S)
    with subprocess.Popen(["sleep", "infinity"]) as stranger:
        try:
            told = _given_to(stranger.pid, numbers, machine.home)
            _require_down(machine)
            federation.boots(name)
            federation.until_ended(within_s=CASE_S)
            if stranger.poll() is not None:
                raise DeploymentError(f"{name} ended a process that had the number of one of its own before the reboot")
        finally:
            stranger.kill()
    return f"{name} gone in mid-round with its /tmp, back after {DOWN_S:g} s, its numbers ({told}) being another's"


def _given_to(number: int, before: Sequence[int], folder: Path) -> str:
    """Let what a machine wrote of its processes name another, as if that had got their numbers; where that was."""
    changed = []
    for file in (folder / name for name in NUMBERED):
        if file.exists():
            told = file.read_text()
            file.write_text(re.sub(r"\b\d+\b", lambda n: str(number) if int(n[0]) in before else n[0], told))
            changed += [file.name] if file.read_text() != told else []
    return ", ".join(changed)


def _require_down(machine: Operator) -> None:
    """Whether its own `status` knows that nothing of it runs. Raises DeploymentError."""
    said = machine.types("status", codes=(0, 1))
    if not re.search("does not run|no run is at work", said):
        raise DeploymentError(f"nothing of {machine.home.name} runs, and its status does not say so: {said}")


def as_deployed(federation: Deployment) -> str:
    """Nothing is amiss, but nobody may write anywhere but where deploy/ lets them: to run, and to check."""
    _until_round(federation, 1)
    for name in federation.sites:
        federation.operator(name).tries(federation.check(name))
    return "coordinator and beta as their units, alpha as a container: all read-only but their state; so `check`"


def slow_site(federation: Deployment) -> str:
    """The update of round 2 comes after the round's deadline."""
    _until_round(federation, 2)
    return f"beta needs {SLOW_S:g} s more than the deadline of {DEADLINE_S:g} s allows in round 2"


def site_disk_full(federation: Deployment) -> str:
    """The disk of the site's state folder is full for a round."""
    _until_round(federation, 1)
    refused = _refusals(federation)
    with full(federation.sites["beta"].home / "state"):
        federation.until(lambda: _refusals(federation) > refused, "beta says no", within_s=CASE_S)
    entry = [e for e in audit_of(federation.coordinator, "toy") if e["kind"] == "refused"][-1]
    return f"beta's state folder full from round 1 on, until it had said no once (reason {entry.get('reason')})"


def coordinator_disk_full(federation: Deployment) -> str:
    """The disk of the coordinator's folder is full for two minutes."""
    _until_round(federation, 1)
    with full(federation.coordinator.home):
        time.sleep(120.0)
    return "the coordinator's folder full from round 1 on, for 120 s"


def wrong_clock(federation: Deployment) -> str:
    """A site's clock is an hour ahead; the rounds go on without it."""
    said: list[str] = []

    def is_told() -> bool:
        said[:] = [line for line in federation.coordinator.types("status").splitlines() if "its clock is" in line]
        return bool(said)

    federation.until(is_told, "status tells of the clock", within_s=CASE_S)
    return f"beta's clock an hour ahead; status: {said[0].split(';')[1].strip()}"


@dataclass(frozen=True)
class FaultCase:
    fault: Fault
    coordinator: Mapping[str, object] = field(default_factory=dict)
    """Other settings of coordinator.yaml."""
    orders: Mapping[str, object] | None = None
    """Of sabotage.py, to beta."""
    rounds: int = ROUNDS
    as_deployed: bool = False
    """Whether all is started as deploy/ does, and left no more than there."""
    small_disk: str = ""
    """Whose folder lies on a disk of DISK_MB. Of a site without its cache, which leaves a gigabyte free."""


CASES: Mapping[str, FaultCase] = {
    "site-killed": FaultCase(site_killed),
    "site-restarted": FaultCase(site_restarted, rounds=2 * ROUNDS),
    "coordinator-killed": FaultCase(coordinator_killed),
    "superlink-hangs": FaultCase(superlink_hangs),
    "network-cut": FaultCase(network_cut),
    "network-cut-long": FaultCase(network_cut_long, SHIPPED),
    "site-rebooted": FaultCase(site_rebooted, as_deployed=True, rounds=2 * ROUNDS),
    "coordinator-rebooted": FaultCase(coordinator_rebooted, as_deployed=True),
    "as-deployed": FaultCase(as_deployed, as_deployed=True),
    "slow-site": FaultCase(slow_site, {"deadline_s": DEADLINE_S}, {"slow_s": {"2": SLOW_S}}),
    "site-disk-full": FaultCase(site_disk_full, small_disk="beta/state"),
    "coordinator-disk-full": FaultCase(coordinator_disk_full, small_disk="coordinator"),
    "wrong-clock": FaultCase(wrong_clock, {"min_sites": 1}, {"clock_s": 3600.0}),
}
DISK_MB = 400


def run_case(name: str, folder: Path) -> Outcome:
    """Raises NotRunError; DeploymentError, where neither of the two good ends was reached."""
    case = CASES[name]
    schedule = {"rounds": case.rounds, "local_steps": 2}
    with deployed(folder, SITES, schedule=schedule) as federation, _disk(federation, case):
        federation.set_coordinator(**{"min_replies": 1, **case.coordinator})
        if case.orders is not None:
            federation.sites["beta"].extra.update(sabotage.place(folder / "sabotage", **case.orders))
        began = time.monotonic()
        _begin(federation, as_deployed=case.as_deployed)
        seen = case.fault(federation)
        code = federation.until_ended(within_s=CASE_S)
        return _outcome(name, federation, code, time.monotonic() - began, seen)


def _begin(federation: Deployment, *, as_deployed: bool) -> None:
    """Raises NotRunError."""
    if as_deployed and not confined.is_possible():
        raise NotRunError("no program may be put into a mount namespace of its own here")
    for name, site in federation.sites.items():
        if as_deployed:
            (site.home / "state").mkdir(mode=0o700, exist_ok=True)  # as systemd makes it
            federation.boots(name)
        else:
            site.starts("run")
    if as_deployed:
        federation.boots(COORDINATOR)
    else:
        federation.runs()


def _outcome(name: str, federation: Deployment, code: int, seconds: float, seen: str) -> Outcome:
    """Counted in the run's own audit log."""
    entries = audit_of(federation.coordinator, str(federation.study["name"]))
    asked = [(e["site"], e["round"]) for e in entries if e["kind"] == "asked"]
    counted = sum(e["kind"] == "counted" for e in entries)
    tries = {round: max(asked.count((site, round)) for site in SITES) for _, round in asked}
    last = federation.coordinator.log.read_text(errors="replace").strip().splitlines()[-1:]
    ended = "finished" if code == 0 else f"clear stop, code {code}: {''.join(last)[:200]}"
    done = len(federation.rounds())
    return Outcome(name, ended, seconds, done, sum(tries.values()) - len(tries), len(asked) - counted, seen)


def _kill_in_mid_round(federation: Deployment) -> None:
    _until_mid_round(federation)
    federation.sites["beta"].loses_power()


def _until_mid_round(federation: Deployment) -> None:
    """Until one round is finished, and beta trains for the next."""
    _until_round(federation, 1)
    federation.until(lambda: federation.is_training("beta"), "beta trains", within_s=CASE_S)


def _until_round(federation: Deployment, number: int) -> None:
    federation.until(lambda: len(federation.rounds()) >= number, f"round {number} is finished", within_s=CASE_S)


def _refusals(federation: Deployment) -> int:
    lines = (federation.run_folder / "audit.jsonl").read_text().splitlines()
    return sum('"kind":"refused"' in line.replace(" ", "") for line in lines)


def _events(site: Operator, event: str) -> Sequence[object]:
    return [entry for entry in audit_of(site) if entry.get("event") == event]


@contextmanager
def _disk(federation: Deployment, case: FaultCase) -> Iterator[None]:
    """Puts a folder on a disk of its own: a tmpfs, which needs a namespace in which mounting is allowed."""
    if not case.small_disk:
        yield
        return
    folder = federation.folder
    place = folder / case.small_disk
    if place.name == "state":
        federation.set_site(place.parent.name, cache=str(folder / "cache"))
        place.mkdir(exist_ok=True)
    moved = place.rename(place.with_name(f"{place.name}-moved"))
    place.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m,mode=0700", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        raise NotRunError("no file system may be mounted here, not even in a namespace of one's own")
    try:
        shutil.copytree(moved, place, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Not a byte more can be written to the disk of `folder`, within."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    os.sync()
    yield
    filler.unlink()
